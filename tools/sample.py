"""Sample images with a sampling recipe, or from a trained diffusion recipe.

Writes samples.npz (arr_0 images, arr_1 labels), a contact sheet of up to 100 of them, and a manifest of everything that
decides a score. --num-images 50000 is what FID is computed of: exactly 50 of each of 1,000 classes, whatever the number
of hosts. A job that was killed goes on where it was when the same command is run again, on as many hosts as there are.
Image i depends on the seed, i and its label alone; batch size and number of devices change it by rounding at most.
sampler.labels=random draws labels, sampler.labels=unconditional has none.

--reference R scores them in the same pass, as tools/evaluate.py generation does, into DIR/scores; with --no-images they
are scored and not kept, but for the contact sheet: 0.8 GB of features in place of 10 GB of images for 50,000 of 256 px.
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
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    scoring = _scoring(arguments, recipe.autoencoder.image_size, made)
    manifest = write_sample_set(
        recipe,
        made,
        arguments.out,
        seed=recipe.seed if arguments.seed is None else arguments.seed,
        num_images=arguments.num_images,
        labels=labels,
        initial_noise=arguments.initial_noise,
        save_latents=arguments.save_latents,
        scoring=scoring,
    )
    print(f"{manifest['num_images']} images: {arguments.out}")
    cli.print_scores(manifest.get("scores", {}))
    return manifest


def _scoring(arguments: argparse.Namespace, image_size: int, made: Any) -> Any:
    from rae_xla.errors import UserError
    from rae_xla.evaluation.in_pass import ScoringInPass
    from rae_xla.recipe import load_recipe

    options = {"--no-images": arguments.no_images, "--inception-weights": arguments.inception_weights}
    if arguments.reference is None and arguments.evaluation is None:
        if given := next((name for name, value in options.items() if value), None):
            raise UserError(f"{given}: goes with --reference or --evaluation, which score the samples")
        return None
    overrides = cli.inception_override(arguments.inception_weights)
    evaluation = load_recipe(arguments.evaluation or str(cli.INCEPTION_RECIPE), overrides, "evaluation")
    cli.check_inception(arguments.inception_weights, evaluation)
    return ScoringInPass(evaluation, arguments.reference, image_size, made, keep_images=not arguments.no_images)


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
    parser.add_argument("--reference", metavar="R", help="score them against this: a name, or an .npz")
    parser.add_argument(
        "--evaluation",
        metavar="RECIPE",
        help="whose features, and data if there is no --reference (default: Inception)",
    )
    parser.add_argument("--inception-weights", metavar="W", help="as in tools/evaluate.py")
    parser.add_argument("--no-images", action="store_true", help="keep what scores need, and no images")
    parser.add_argument("--seed", type=int, metavar="S", help="default: the recipe's")
    cli.run(main, parser)
