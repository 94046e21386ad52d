"""Convert weights between layouts: rae_xla's own, the authors' released one, and diffusers' AutoencoderRAE.

  IN                                        --to         OUT
  released .pt or .safetensors of a         ours         .safetensors that recipes read (they read the released
    decoder, DiT, DiT^DH or statistics                     file itself too)
  transformers encoder                      ours         .safetensors in timm's layout
  safetensors written by rae_xla            released     .pt or .safetensors
  directory of a saved AutoencoderRAE       ours         directory: encoder, decoder and latent_stats .safetensors
  RECIPE.yaml with an autoencoder           diffusers    directory for AutoencoderRAE.from_pretrained

A training's file holds two sets of weights: the EMA is taken unless --weights model is given, and which it was is said.
There and back is the identity for every tensor, but a mean that a statistics file lacks comes back as zeros, and
diffusers keeps a standard deviation where others keep the variance (equal to float32 rounding).
"""

from __future__ import annotations

import argparse
from typing import Any

from rae_xla import cli


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what was converted."""
    from rae_xla import storage
    from rae_xla.errors import UserError
    from rae_xla.models.convert.checkpoints import convert_file, convert_from_diffusers, convert_to_diffusers
    from rae_xla.recipe import load_recipe, with_autoencoder

    source, target, to = arguments.source, arguments.target, arguments.to
    if arguments.overrides and to != "diffusers":
        raise UserError(f"{arguments.overrides[0]}: only a recipe has keys to override, with --to diffusers")
    if to == "diffusers":
        if not source.endswith((".yaml", ".yml")):
            raise UserError(f"IN: {source}: a recipe (.yaml) with an autoencoder is needed for --to diffusers")
        recipe = load_recipe(source, arguments.overrides, *with_autoencoder())
        result = convert_to_diffusers(recipe.autoencoder, recipe.root, target)
    elif storage.is_directory(source):
        if to != "ours":
            raise UserError(f"IN: {source} is a directory, a saved AutoencoderRAE converts to ours only")
        result = convert_from_diffusers(source, target)
    else:
        result = convert_file(source, target, to, arguments.weights, arguments.backbone_depth)
    taken = f", {result['taken']} weights" if result.get("taken") else ""
    print(f"{result['kind']}{taken}: wrote {result.get('path') or ', '.join(result['paths'].values())}")
    return result


if __name__ == "__main__":
    parser = cli.parser(__doc__, recipe=False)
    parser.add_argument("source", metavar="IN", help="a file, a directory or a recipe")
    parser.add_argument("target", metavar="OUT", help="a file or a directory; may be gs://")
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="laid over the recipe")
    parser.add_argument("--to", choices=["ours", "released", "diffusers"], default="ours", help="default: ours")
    parser.add_argument(
        "--weights", choices=["ema", "model"], help="of a training's file (default: ema if there is one)"
    )
    parser.add_argument(
        "--backbone-depth", type=int, metavar="N", help="for a released DiT^DH whose backbone is as wide as its head"
    )
    cli.run(main, parser)
