"""Make a reference from a data set: the mean and covariance of its features over all images, and some of the images.

The file is an .npz as ADM's evaluator reads it, and says what it is for: one for generation is of what models are
trained on, one for reconstruction of what autoencoders are shown. The recipe's task is evaluation; its data is read
once, in the order of its shards, and its features say in which space.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what the file says of itself."""
    from rae_xla import runtime
    from rae_xla.evaluation.reference_stats import write_reference
    from rae_xla.recipe import load_recipe

    overrides = [*arguments.overrides, *cli.inception_override(arguments.inception_weights)]
    recipe = load_recipe(arguments.recipe, overrides, "evaluation")
    cli.check_inception(arguments.inception_weights, recipe)
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    result = write_reference(recipe, made, arguments.purpose, arguments.out, arguments.keep_images)
    print(f"{arguments.out}: {result['num_images']} images, {result['kept_images']} kept")
    return result


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--for", dest="purpose", choices=["generation", "reconstruction"], required=True, help="what is scored with it"
    )
    parser.add_argument("--out", metavar="R.npz", required=True, help="where to write; may be gs://")
    parser.add_argument(
        "--keep-images", type=int, default=0, metavar="N", help="for precision and recall; ADM keeps 10000 (default: 0)"
    )
    parser.add_argument("--inception-weights", metavar="W", help="as in tools/evaluate.py")
    cli.run(main, parser)
