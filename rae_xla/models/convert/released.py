"""The released state dicts (``DiTwDDTHead``, ``LightningDiT``, ``GeneralDecoder``, statistics) to ours and back.

The released layouts also store fixed tables (positions, rotary angles), which our modules compute. They are checked
against ours on the way in, to rounding, and computed again in float32 on the way out, for which a `Layout` keeps their
sizes. At the sizes of the paper ours are equal to the released code's, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rae_xla.models.convert.keys import (
    Tensors,
    inverse,
    num_blocks,
    rename,
    rename_all,
    rename_blocks,
    split_attention,
    stack_attention,
)
from rae_xla.models.decoder import Decoder
from rae_xla.models.dit import DiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.layers import rotary_angles, sincos_positions

Kind = Literal["dit_dh", "dit", "decoder", "latent_stats"]

TABLE_TOLERANCE = 1e-5

_BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.output",
    "mlp.w12": "mlp.gate_and_value",
    "mlp.w3": "mlp.output",
    "adaLN_modulation.1": "modulation",
    "norm1": "norm1",
    "norm2": "norm2",
}
_DIT = {
    "x_embedder.proj": "input",
    "t_embedder.W": "time_embedder.frequencies",
    "t_embedder.mlp": "time_embedder.mlp",
    "y_embedder.embedding_table": "label_embedder.table",
    "final_layer.norm_final": "output.norm",
    "final_layer.linear": "output.linear",
    "final_layer.adaLN_modulation.1": "output.modulation",
}
_DIT_DH = {
    **_DIT,
    "s_embedder.proj": "backbone_input",
    "x_embedder.proj": "head_input",
    "s_projector": "condition",
}
_DECODER = {
    "decoder_embed": "input",
    "trainable_cls_token": "class_token",
    "decoder_norm": "norm",
    "decoder_pred": "output",
}
_DECODER_BLOCK = {
    "attention.output.dense": "attention.output",
    "attention.attention.qkv": "attention.qkv",
    "intermediate.dense": "hidden",
    "output.dense": "output",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_DECODER_ATTENTION = ("attention.attention", ("query", "key", "value"))
_STATS = {"mean": "mean", "var": "variance"}
# Inputs and outputs of patch 1 are 1x1 convolutions in the released layouts, linear layers in ours.
_CONVOLUTIONS = re.compile(r"[xs]_embedder\.proj\.weight$")
_TABLES = re.compile(r"(pos_embed|decoder_pos_embed|(enc_|dec_)?feat_rope\.freqs_(cos|sin))$")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What our state dict does not show and a released one holds: the grid, and the width of an attention head.

    ``head_widths``: of the backbone, then of the head; empty for a decoder.
    """

    kind: Kind
    grid: int
    head_widths: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For a file's metadata."""
        return {**asdict(self), "head_widths": list(self.head_widths)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Layout:
        """Back from `as_json`."""
        return cls(kind=content["kind"], grid=content["grid"], head_widths=tuple(content["head_widths"]))


def layout_of(model: DiT | DiTDH | Decoder) -> Layout:
    """The `Layout` of a model, which weights saved from it carry along."""
    grid = round(model.positions.shape[0] ** 0.5)
    if isinstance(model, Decoder):
        return Layout(kind="decoder", grid=grid)
    if isinstance(model, DiT):
        return Layout(kind="dit", grid=grid, head_widths=(model.rotary.head_width,))
    head_widths = (model.backbone_rotary.head_width, model.head_rotary.head_width)
    return Layout(kind="dit_dh", grid=grid, head_widths=head_widths)


def is_table(key: str) -> bool:
    """Whether a key of a released layout holds a fixed table, not weights."""
    return _TABLES.match(key) is not None


def kind_of(tensors: Tensors) -> tuple[Kind, Literal["ours", "released"]] | None:
    """Which of the models a state dict belongs to and in which layout; ``None`` if it is none of them."""
    marks: list[tuple[str, Kind, Literal["ours", "released"]]] = [
        ("s_embedder.proj.weight", "dit_dh", "released"),
        ("x_embedder.proj.weight", "dit", "released"),
        ("decoder_pred.weight", "decoder", "released"),
        ("head_input.weight", "dit_dh", "ours"),
        ("label_embedder.table.weight", "dit", "ours"),
        ("class_token", "decoder", "ours"),
        ("variance", "latent_stats", "ours"),
        ("var", "latent_stats", "released"),
    ]
    return next(((kind, layout) for key, kind, layout in marks if key in tensors), None)


def from_released(tensors: Tensors, backbone_depth: int | None = None) -> tuple[dict[str, Tensor], Layout | None]:
    """A released state dict under our names, and its `Layout` (``None`` for statistics).

    ``backbone_depth`` is needed only for a DiT^DH whose backbone and head are equally wide. A released statistics file
    may lack the mean, which is then zero.

    Raises:
        ValueError: a key that the released layout does not have, or a fixed table other than ours.
    """
    found = kind_of(tensors)
    if found is None or found[1] != "released":
        raise ValueError("not a state dict in the released layout")
    kind = found[0]
    if kind == "latent_stats":
        return _stats_from_released(tensors), None
    if kind == "decoder":
        return _decoder_from_released(tensors)
    return _dit_from_released(tensors, kind, backbone_depth)


def to_released(tensors: Tensors, layout: Layout | None) -> dict[str, Tensor]:
    """The inverse of `from_released`; ``None`` stands for statistics."""
    if layout is None:
        _check_stats(tensors)
        return rename_all(tensors, lambda key: rename(key, inverse(_STATS)))
    if layout.kind == "decoder":
        return _decoder_to_released(tensors, layout)
    return _dit_to_released(tensors, layout)


def _stats_from_released(tensors: Tensors) -> dict[str, Tensor]:
    ours = rename_all(tensors, lambda key: rename(key, _STATS))
    stats = {"mean": torch.zeros_like(tensors["var"]), **ours}
    _check_stats(stats)
    return stats


def _check_stats(stats: Tensors) -> None:
    shapes = {key: list(value.shape) for key, value in stats.items()}
    fits = shapes.keys() == {"mean", "variance"} and shapes["mean"] == shapes["variance"]
    if not fits or len(shapes["mean"]) != 3:
        raise ValueError(f"statistics should be a mean and a variance [C, h, w] of one shape, found {shapes}")


def _dit_from_released(
    tensors: Tensors, kind: Literal["dit", "dit_dh"], backbone_depth: int | None
) -> tuple[dict[str, Tensor], Layout]:
    if kind == "dit_dh":
        backbone_depth = _backbone_depth(tensors, backbone_depth)
    layout = _dit_layout(tensors, kind)
    _check_tables(tensors, _dit_tables(tensors["pos_embed"].shape[-1], layout))

    def ours(key: str) -> str:
        block = re.match(r"blocks\.(\d+)\.(.*)", key)
        if block is None:
            return rename(key, _DIT if kind == "dit" else _DIT_DH)
        index, rest = int(block[1]), rename(block[2], _BLOCK)
        if kind == "dit":
            return f"blocks.{index}.{rest}"
        assert backbone_depth is not None
        place = f"backbone.{index}" if index < backbone_depth else f"head.{index - backbone_depth}"
        return f"{place}.{rest}"

    weights = {key: value for key, value in tensors.items() if not is_table(key)}
    flat = {key: value.flatten(1) if _CONVOLUTIONS.match(key) else value for key, value in weights.items()}
    return rename_all(flat, ours), layout


def _dit_to_released(tensors: Tensors, layout: Layout) -> dict[str, Tensor]:
    names, block_names = inverse(_DIT if layout.kind == "dit" else _DIT_DH), inverse(_BLOCK)
    backbone_depth = num_blocks(tensors, "backbone")

    def theirs(key: str) -> str:
        block = re.match(r"(blocks|backbone|head)\.(\d+)\.(.*)", key)
        if block is None:
            return rename(key, names)
        index = int(block[2]) + (backbone_depth if block[1] == "head" else 0)
        return f"blocks.{index}.{rename(block[3], block_names)}"

    released = rename_all(tensors, theirs)
    for key in released:
        if _CONVOLUTIONS.match(key):
            released[key] = released[key][:, :, None, None]
    embedding = "input" if layout.kind == "dit" else "backbone_input"
    return {**released, **_dit_tables(tensors[f"{embedding}.weight"].shape[0], layout)}


def _backbone_depth(tensors: Tensors, given: int | None) -> int:
    if given is not None:
        total = num_blocks(tensors, "blocks")
        if not 0 < given < total:
            raise ValueError(f"backbone depth {given}: backbone and head have {total} blocks together")
        return given
    missing = [key for key in ("s_embedder.proj.weight", "x_embedder.proj.weight") if key not in tensors]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    backbone, head = (tensors[f"{name}_embedder.proj.weight"].shape[0] for name in ("s", "x"))
    if backbone == head:
        raise ValueError(
            f"backbone and head are both {backbone} wide, so the depth of the backbone cannot be read off the weights; "
            "give it"
        )
    widths = {key: value.shape[0] for key, value in tensors.items() if re.match(r"blocks\.\d+\.norm1\.weight$", key)}
    return sum(width == backbone for width in widths.values())


def _dit_layout(tensors: Tensors, kind: Literal["dit", "dit_dh"]) -> Layout:
    prefixes = ("",) if kind == "dit" else ("enc_", "dec_")
    angles = [_table(tensors, f"{prefix}feat_rope.freqs_cos", num_dims=2) for prefix in prefixes]
    grid = round(_table(tensors, "pos_embed", num_dims=3).shape[1] ** 0.5)
    return Layout(kind=kind, grid=grid, head_widths=tuple(table.shape[1] for table in angles))


def _table(tensors: Tensors, key: str, num_dims: int) -> Tensor:
    if key not in tensors or tensors[key].ndim != num_dims:
        found = list(tensors[key].shape) if key in tensors else "missing"
        raise ValueError(f"{key} is {found}; it should be a table of {num_dims} dimensions, which tells the sizes")
    return tensors[key]


def _dit_tables(width: int, layout: Layout) -> dict[str, Tensor]:
    tables = {"pos_embed": sincos_positions(width, layout.grid)[None]}
    prefixes = ("",) if layout.kind == "dit" else ("enc_", "dec_")
    for prefix, head_width in zip(prefixes, layout.head_widths, strict=True):
        cos, sin = rotary_angles(head_width, layout.grid)
        tables[f"{prefix}feat_rope.freqs_cos"] = cos
        tables[f"{prefix}feat_rope.freqs_sin"] = sin
    return tables


def _decoder_from_released(tensors: Tensors) -> tuple[dict[str, Tensor], Layout]:
    positions = _table(tensors, "decoder_pos_embed", num_dims=3)
    layout = Layout(kind="decoder", grid=round((positions.shape[1] - 1) ** 0.5))
    _check_tables(tensors, decoder_tables(positions.shape[2], layout.grid))
    stacked = stack_attention({k: v for k, v in tensors.items() if not is_table(k)}, *_DECODER_ATTENTION)
    return rename_blocks(stacked, _DECODER, ("decoder_layers", "blocks"), _DECODER_BLOCK), layout


def _decoder_to_released(tensors: Tensors, layout: Layout) -> dict[str, Tensor]:
    blocks = ("blocks", "decoder_layers")
    released = rename_blocks(tensors, inverse(_DECODER), blocks, inverse(_DECODER_BLOCK))
    tables = decoder_tables(tensors["norm.weight"].shape[0], layout.grid)
    return {**split_attention(released, *_DECODER_ATTENTION), **tables}


def decoder_tables(width: int, grid: int) -> dict[str, Tensor]:
    """The decoder's fixed positions as released, with a row of zeros for the class token."""
    positions = sincos_positions(width, grid)
    return {"decoder_pos_embed": torch.cat([torch.zeros(1, width), positions])[None]}


def _check_tables(tensors: Tensors, computed: Tensors) -> None:
    for key, table in computed.items():
        if key not in tensors:
            continue
        stored = tensors[key]
        # Half-precision files have half-precision tables.
        tolerance = max(TABLE_TOLERANCE, torch.finfo(stored.dtype).eps)
        if stored.shape != table.shape or not torch.allclose(stored.float(), table, rtol=0, atol=tolerance):
            raise ValueError(f"{key} differs from the fixed table of the released models; other positions were used")
