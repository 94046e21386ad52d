"""The diffusers ``AutoencoderRAE``: encoder, decoder and statistics in one state dict, sizes in its configuration.

It divides by (standard deviation + 1e-5) where the released code divides by sqrt(variance + 1e-5); the deviation stored
is chosen so that both divide by the same number, which keeps the variance to float32 rounding, not to the bit.

Its decoder scales positions to a grid of 16 (measured on diffusers 0.39): with 16x16 tokens its pictures are the
released code's, with any other grid, 512 px among them, the same weights make other pictures there. A conversion of
such a decoder warns.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rae_xla.models.convert.encoders import port_from_timm, timm_from_port
from rae_xla.models.convert.keys import Tensors, inverse, num_blocks
from rae_xla.models.convert.released import Layout, decoder_tables, from_released, is_table, to_released

logger = logging.getLogger(__name__)

EPS = 1e-5
SAME_POSITIONS_GRID = 16
# Ports of encoders, by which diffusers names them.
ENCODER_TYPES = ("dinov2", "siglip2", "mae")

_DECODER_PARTS = {
    ".attention.to_q.": ".attention.attention.query.",
    ".attention.to_k.": ".attention.attention.key.",
    ".attention.to_v.": ".attention.attention.value.",
    ".attention.to_out.0.": ".attention.output.dense.",
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderParts:
    """An autoencoder in our layouts: the encoder as timm has it, the decoder, and statistics if there are any."""

    encoder: Tensors
    decoder: Tensors
    stats: Tensors | None


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """What diffusers' configuration says and state dicts do not show. ``port``: one of `ENCODER_TYPES`."""

    port: str
    encoder_input_size: int
    encoder_patch_size: int
    encoder_depth: int
    pixel_mean: Tensor
    pixel_std: Tensor
    decoder_patch_size: int
    decoder_num_heads: int


def from_diffusers(tensors: Tensors, config: Mapping[str, Any]) -> tuple[AutoencoderParts, Layout]:
    """A saved ``AutoencoderRAE`` and its configuration in our layouts, and the decoder's `Layout`.

    Raises:
        ValueError: a key that the layout does not have, or one that is missing.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part in parts:
            parts[part][rest] = value
        elif key not in ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std"):
            raise ValueError(f"{key} is not a key of this layout")
    if not isinstance(config, Mapping) or config.get("encoder_type") not in ENCODER_TYPES:
        raise ValueError(f"config.json: encoder_type should be one of {', '.join(ENCODER_TYPES)}")
    for name in ("encoder_input_size", "encoder_patch_size", "decoder_hidden_size"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"config.json: {name} is missing or not a whole number")
    grid = config["encoder_input_size"] // config["encoder_patch_size"]
    _warn_of_positions(grid)
    released = {_replace(key, _DECODER_PARTS): value for key, value in parts["decoder"].items()}
    released |= decoder_tables(config["decoder_hidden_size"], grid)
    decoder, layout = from_released(released)
    assert layout is not None
    stats = _stats(tensors.get("_latents_mean", torch.zeros(1)), tensors.get("_latents_std", torch.ones(1)))
    return AutoencoderParts(encoder=timm_from_port(parts["encoder"]), decoder=decoder, stats=stats), layout


def _stats(mean: Tensor, std: Tensor) -> dict[str, Tensor] | None:
    # One value stands for "none".
    if mean.numel() == std.numel() == 1:
        return None
    variance = (std.double() + EPS).square() - EPS
    shape = max(mean.shape, std.shape, key=len)
    return {"mean": mean.expand(shape).clone(), "variance": variance.float().expand(shape).clone()}


def to_diffusers(parts: AutoencoderParts, sizes: AutoencoderSizes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `from_diffusers`: a state dict and the configuration.

    Position embeddings of the encoder must be those of its pretraining size, which diffusers resamples itself.
    """
    layout = Layout(kind="decoder", grid=sizes.encoder_input_size // sizes.encoder_patch_size)
    _warn_of_positions(layout.grid)
    decoder = {key: value for key, value in to_released(parts.decoder, layout).items() if not is_table(key)}
    tensors = {
        **{f"encoder.{key}": value for key, value in port_from_timm(parts.encoder, sizes.port).items()},
        **{f"decoder.{_replace(key, inverse(_DECODER_PARTS))}": value for key, value in decoder.items()},
        "encoder_mean": sizes.pixel_mean.reshape(1, 3, 1, 1),
        "encoder_std": sizes.pixel_std.reshape(1, 3, 1, 1),
        "_latents_mean": torch.zeros(1),
        "_latents_std": torch.ones(1),
    }
    if parts.stats is not None:
        tensors["_latents_mean"] = parts.stats["mean"]
        tensors["_latents_std"] = ((parts.stats["variance"].double() + EPS).sqrt() - EPS).float()
    width, channels = parts.decoder["input.weight"].shape
    config = {
        "_class_name": "AutoencoderRAE",
        "encoder_type": sizes.port,
        "encoder_hidden_size": channels,
        "encoder_patch_size": sizes.encoder_patch_size,
        "encoder_num_hidden_layers": sizes.encoder_depth,
        "encoder_input_size": sizes.encoder_input_size,
        "encoder_norm_mean": sizes.pixel_mean.flatten().tolist(),
        "encoder_norm_std": sizes.pixel_std.flatten().tolist(),
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": num_blocks(parts.decoder, "blocks"),
        "decoder_num_attention_heads": sizes.decoder_num_heads,
        "decoder_intermediate_size": parts.decoder["blocks.0.hidden.weight"].shape[0],
        "patch_size": sizes.decoder_patch_size,
        "image_size": sizes.decoder_patch_size * layout.grid,
        # Its constructor sizes the statistics' buffers by these; the values come from the weights.
        "latents_mean": None if parts.stats is None else parts.stats["mean"].tolist(),
        "latents_std": None if parts.stats is None else tensors["_latents_std"].tolist(),
    }
    return tensors, config


def _warn_of_positions(grid: int) -> None:
    if grid != SAME_POSITIONS_GRID:
        logger.warning("diffusers scales the decoder's positions for %dx%d tokens: pictures will differ", grid, grid)


def _replace(key: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        key = key.replace(old, new)
    return key
