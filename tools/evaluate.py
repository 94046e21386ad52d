"""Score samples (generation) or the autoencoder (reconstruction) with a recipe whose task is evaluation.

generation      share recognised by an independent classifier, Frechet distance in its features, diversity
reconstruction  PSNR on the held-out split
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores."""
    from rae_xla import runtime
    from rae_xla.errors import UserError
    from rae_xla.evaluation.scores import evaluate_generation, evaluate_reconstruction
    from rae_xla.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, "evaluation")
    if arguments.what == "generation" and arguments.samples is None:
        raise UserError("--samples: required for generation; give a samples.npz made by tools/sample.py")
    if arguments.what == "reconstruction" and arguments.samples is not None:
        raise UserError("--samples: only for generation; reconstruction encodes and decodes the held-out split")
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    if arguments.what == "generation":
        scores = evaluate_generation(recipe, made, arguments.samples)
    else:
        scores = evaluate_reconstruction(recipe, made)
    for name, value in scores.items():
        print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
    return scores


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("what", choices=["generation", "reconstruction"])
    cli.add_recipe_arguments(parser)
    parser.add_argument("--samples", metavar="FILE", help="samples.npz to score (generation)")
    cli.run(main, parser)
