"""Score samples (generation) or the autoencoder (reconstruction), or its latents by a linear classifier (linear-probe).

generation      share recognised by an independent classifier, Frechet distance in its features, diversity
reconstruction  PSNR on the held-out split
linear-probe    top-1 and top-5 accuracy on held-out images; trains the classifier first, or goes on where it was

The recipe's task is evaluation, or linear_probe.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores."""
    from rae_xla import runtime
    from rae_xla.errors import UserError
    from rae_xla.evaluation.linear_probe import evaluate_linear_probe
    from rae_xla.evaluation.scores import evaluate_generation, evaluate_reconstruction
    from rae_xla.recipe import load_recipe

    task = "linear_probe" if arguments.what == "linear-probe" else "evaluation"
    recipe = load_recipe(arguments.recipe, arguments.overrides, task)
    if arguments.what == "generation" and arguments.samples is None:
        raise UserError("--samples: required for generation; give a samples.npz made by tools/sample.py")
    if arguments.what != "generation" and arguments.samples is not None:
        raise UserError(f"--samples: only for generation; {arguments.what} reads held-out images")
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    if arguments.what == "generation":
        scores = evaluate_generation(recipe, made, arguments.samples)
    elif arguments.what == "reconstruction":
        scores = evaluate_reconstruction(recipe, made)
    else:
        scores = evaluate_linear_probe(recipe, made)
    for name, value in scores.items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    return scores


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("what", choices=["generation", "reconstruction", "linear-probe"])
    cli.add_recipe_arguments(parser)
    parser.add_argument("--samples", metavar="FILE", help="samples.npz to score (generation)")
    cli.run(main, parser)
