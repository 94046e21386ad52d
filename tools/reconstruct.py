"""Encode and decode images: each is written beside its reconstruction, with PSNR, SSIM and LPIPS.

Any recipe with an autoencoder will do. Images are cropped to a square of the decoder's size, as ADM prepares ImageNet.
LPIPS needs torchvision's VGG weights (vgg16-397923af.pth) in torch.hub's folder of checkpoints and is left out without.
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores of each image and their means."""
    from pathlib import Path

    from rae_xla import runtime
    from rae_xla.errors import UserError
    from rae_xla.evaluation.reconstruction import read_image, reconstruct_files
    from rae_xla.recipe import load_recipe, with_autoencoder

    overrides = [item for item in arguments.images if "=" in item and not Path(item).exists()]
    files = [item for item in arguments.images if item not in overrides]
    if not files:
        raise UserError("IMAGE: give at least one image file")
    for file in files:
        read_image(file)
    recipe = load_recipe(arguments.recipe, overrides, *with_autoencoder())
    made = runtime.create(recipe.runtime, recipe.mesh, recipe.precision)
    result = reconstruct_files(recipe.autoencoder, recipe.root, files, arguments.out, made)
    for row in result["images"]:
        print(f"{row['beside']}: {_shown(row)}")
    print(f"mean of {result['num_images']}: {_shown(result)}")
    return result


def _shown(scores: dict[str, Any]) -> str:
    lpips = "left out (no VGG weights)" if scores["lpips"] is None else f"{scores['lpips']:.4f}"
    ssim = "left out (too small)" if scores["ssim"] is None else f"{scores['ssim']:.4f}"
    return f"PSNR {scores['psnr']:.2f} dB, SSIM {ssim}, LPIPS {lpips}"


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and key.sub=value over the recipe")
    parser.add_argument(
        "--out", metavar="DIR", default="reconstructions", help="default: reconstructions; may be gs://"
    )
    cli.run(main, parser)
