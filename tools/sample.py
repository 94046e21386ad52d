"""Sample images with a sampling recipe, or from a trained diffusion recipe.

Writes samples.npz (arr_0 images, arr_1 labels), a contact sheet and a manifest of everything that decides a score.
Image i depends on the seed, i and its label alone: batch size and number of devices do not change it.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the manifest."""
    from rae_xla import runtime
    from rae_xla.errors import UserError
    from rae_xla.evaluation.generation import write_sample_set
    from rae_xla.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, "sampling", "diffusion")
    labels = None
    if arguments.labels is not None:
        try:
            labels = [int(label) for label in arguments.labels.split(",")]
        except ValueError as error:
            raise UserError(f"--labels: {arguments.labels!r} is not a list of numbers such as 3,7") from error
    if labels is None and arguments.num_images < 1:
        raise UserError(f"--num-images: must be at least 1, got {arguments.num_images}")
    seed = recipe.seed if arguments.seed is None else arguments.seed
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    return write_sample_set(recipe, made, arguments.out, labels=labels, num_images=arguments.num_images, seed=seed)


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write; may be gs://")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--num-images", type=int, default=1000, metavar="N", help="class-balanced (default: 1000)")
    which.add_argument("--labels", metavar="L,L,...", help="one image for each of these labels")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the recipe's")
    cli.run(main, parser)
