"""The Hugging Face ports of the encoders to timm's layout and back.

Ports: ``Dinov2WithRegistersModel``, ``Dinov2Model`` (Web-SSL), ``SiglipVisionModel``, ``ViTMAEModel`` of transformers
4, alone or inside the larger models that are published (``SiglipModel``, ``ViTMAEForPreTraining``).

Not the identity in two places, neither of which features show: timm's DINOv2 has the class token's position added to
the token, so on the way back that position is zero; and what features do not need (mask token, pooling head, text
tower, the scale of the last norm) is dropped on the way in and zero on the way back, where a port requires it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rae_xla.models.convert.keys import Tensors, inverse, rename_blocks, split_attention, stack_attention


@dataclass(frozen=True, kw_only=True)
class _Port:
    prefixes: tuple[str, ...]
    mark: str
    table: Mapping[str, str]
    blocks: str
    block_table: Mapping[str, str]
    attention: str
    parts: tuple[str, str, str]
    dropped: tuple[str, ...]
    restored: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)


_QUERY_KEY_VALUE = ("query", "key", "value")
_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
}
_DINOV2 = _Port(
    prefixes=("", "dinov2_with_registers."),
    mark="embeddings.register_tokens",
    table={**_EMBEDDINGS, "embeddings.register_tokens": "reg_token"},
    blocks="encoder.layer",
    block_table={
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.attention.qkv": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp": "mlp",
    },
    attention="attention.attention",
    parts=_QUERY_KEY_VALUE,
    dropped=("embeddings.mask_token", "layernorm."),
    restored={"embeddings.mask_token": (1, "D")},
)
_PORTS = {
    "dinov2": _DINOV2,
    "dinov2_plain": replace(
        _DINOV2,
        prefixes=("", "dinov2."),
        mark="embeddings.mask_token",
        table={**_EMBEDDINGS, "layernorm": "norm"},
        dropped=("embeddings.mask_token",),
    ),
    "siglip2": _Port(
        prefixes=("vision_model.", ""),
        mark="embeddings.position_embedding.weight",
        table={"embeddings.position_embedding.weight": "pos_embed", "embeddings.patch_embedding": "patch_embed.proj"},
        blocks="encoder.layers",
        block_table={
            "layer_norm1": "norm1",
            "layer_norm2": "norm2",
            "self_attn.qkv": "attn.qkv",
            "self_attn.out_proj": "attn.proj",
            "mlp": "mlp",
        },
        attention="self_attn",
        parts=("q_proj", "k_proj", "v_proj"),
        dropped=("head.", "post_layernorm."),
        restored={
            "head.probe": (1, 1, "D"),
            "head.attention.in_proj_weight": ("3D", "D"),
            "head.attention.in_proj_bias": ("3D",),
            "head.attention.out_proj.weight": ("D", "D"),
            "head.attention.out_proj.bias": ("D",),
            "head.layernorm.weight": ("D",),
            "head.layernorm.bias": ("D",),
            "head.mlp.fc1.weight": ("M", "D"),
            "head.mlp.fc1.bias": ("M",),
            "head.mlp.fc2.weight": ("D", "M"),
            "head.mlp.fc2.bias": ("D",),
        },
    ),
    "mae": _Port(
        prefixes=("vit.", ""),
        mark="embeddings.cls_token",
        table=_EMBEDDINGS,
        blocks="encoder.layer",
        block_table={
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "attention.attention.qkv": "attn.qkv",
            "attention.output.dense": "attn.proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        },
        attention="attention.attention",
        parts=_QUERY_KEY_VALUE,
        dropped=("layernorm.",),
    ),
}
PORTS = tuple(_PORTS)


def is_port(tensors: Tensors) -> bool:
    """Whether this is the state dict of one of the ports."""
    return _recognise(tensors) is not None


def timm_from_port(tensors: Tensors) -> dict[str, Tensor]:
    """A port's state dict in timm's layout, without what features do not need.

    Raises:
        ValueError: not a port's, or with a key that the port does not have.
    """
    found = _recognise(tensors)
    if found is None:
        raise ValueError(f"not a state dict of one of {', '.join(PORTS)}")
    name, prefix = found
    port = _PORTS[name]
    # Inside a larger model, keys without the prefix belong to its other parts.
    inner = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    inner = {key: value for key, value in inner.items() if not key.startswith(port.dropped)}
    stacked = stack_attention(inner, port.attention, port.parts)
    ours = rename_blocks(stacked, port.table, (port.blocks, "blocks"), port.block_table)
    if name == "siglip2":
        ours["pos_embed"] = ours["pos_embed"][None]
    if name == "dinov2":
        ours["cls_token"] = ours["cls_token"] + ours["pos_embed"][:, :1]
        ours["pos_embed"] = ours["pos_embed"][:, 1:]
    return ours


def port_from_timm(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """timm's state dict of an encoder in the layout of the port ``name``, one of `PORTS`; see above."""
    port = _PORTS[name]
    tensors = dict(tensors)
    width, mlp_width = tensors["blocks.0.mlp.fc2.weight"].shape
    if name == "siglip2":
        tensors["pos_embed"] = tensors["pos_embed"][0]
    if name == "dinov2":
        tensors["pos_embed"] = torch.cat([torch.zeros(1, 1, width), tensors["pos_embed"]], dim=1)
    blocks = ("blocks", port.blocks)
    theirs = rename_blocks(tensors, inverse(port.table), blocks, inverse(port.block_table))
    theirs = split_attention(theirs, port.attention, port.parts)
    sizes: dict[int | str, int] = {1: 1, "D": width, "3D": 3 * width, "M": mlp_width}
    for key, shape in port.restored.items():
        theirs[key] = torch.zeros([sizes[size] for size in shape])
    prefix = "vision_model." if name == "siglip2" else ""
    return {prefix + key: value for key, value in theirs.items()}


def features_only(tensors: Tensors, *, with_norm: bool = False) -> dict[str, Tensor]:
    """timm's state dict, or that of an encoder trained here, without what features do not need.

    ``with_norm``: they are those behind the last norm's own scale and shift.
    """
    backbone = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    unused = ("fc_norm.", "head.", "attn_pool.", "mask_token", *(() if with_norm else ("norm.",)))
    return {key: value for key, value in backbone.items() if not key.startswith(unused)}


def _recognise(tensors: Tensors) -> tuple[str, str] | None:
    for name, port in _PORTS.items():
        for prefix in port.prefixes:
            if prefix + port.mark in tensors:
                return name, prefix
    return None
