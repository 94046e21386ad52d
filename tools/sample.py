"""Sample images with a sampling recipe, or from a trained diffusion recipe.

Writes samples.npz (arr_0 images, arr_1 labels), a contact sheet of up to 100 of them, and a manifest of everything that
decides a score. --num-images 50000 is what FID is computed of: exactly 50 of each of 1,000 classes, whatever the number
of hosts. A job that was killed goes on where it was when the same command is run again, on as many hosts as there are.
Image i depends on the seed, i and its label alone; batch size and number of devices change it by rounding at most.
sampler.labels=random draws labels, sampler.labels=unconditional has none.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the manifest."""
    from rae_xla import runtime
    from rae_xla.errors import UserError
    from rae_xla.evaluation.generation import read_labels
    from rae_xla.evaluation.sample_set import write_sample_set
    from rae_xla.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, "sampling", "diffusion")
    if arguments.num_images < 1:
        raise UserError(f"--num-images: must be at least 1, got {arguments.num_images}")
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"--seed: must be at least 0, got {arguments.seed}")
    labels = read_labels(arguments.labels, arguments.labels_file)
    if arguments.initial_noise is not None and labels is None:
        raise UserError("--initial-noise: goes with --labels or --labels-file, one label for each noise")
    manifest = write_sample_set(
        recipe,
        runtime.create(recipe.runtime, recipe.mesh, recipe.precision),
        arguments.out,
        seed=recipe.seed if arguments.seed is None else arguments.seed,
        num_images=arguments.num_images,
        labels=labels,
        initial_noise=arguments.initial_noise,
        save_latents=arguments.save_latents,
    )
    print(f"{manifest['num_images']} images: {arguments.out}")
    return manifest


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write; may be gs://")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num-images", type=int, default=1000, metavar="N", help="labels as the recipe's sampler says (default: 1000)"
    )
    which.add_argument("--labels", metavar="L,L,...", help="one image for each of these labels")
    which.add_argument("--labels-file", metavar="Y.npy", help="the same from a file of whole numbers")
    parser.add_argument(
        "--initial-noise", metavar="X.npy", help="noise [N, C, h, w] to start from, in place of a seed's"
    )
    parser.add_argument("--save-latents", metavar="Z.npy", help="also write the latents [N, C, h, w]")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the recipe's")
    cli.run(main, parser)
