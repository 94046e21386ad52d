"""The released checkpoints' key names to ours. The only home of the released spellings.

Source: the state dicts described in the released code's ``DiTwDDTHead`` and ``GeneralDecoder``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.output",
    "mlp.w12": "mlp.gate_and_value",
    "mlp.w3": "mlp.output",
    "adaLN_modulation.1": "modulation",
}
_DIT_DH = {
    "s_embedder.proj": "backbone_input",
    "x_embedder.proj": "head_input",
    "s_projector": "condition",
    "t_embedder.W": "time_embedder.frequencies",
    "t_embedder.mlp": "time_embedder.mlp",
    "y_embedder.embedding_table": "label_embedder.table",
    "final_layer.norm_final": "output.norm",
    "final_layer.linear": "output.linear",
    "final_layer.adaLN_modulation.1": "output.modulation",
}
_DECODER = {
    "decoder_embed": "input",
    "trainable_cls_token": "class_token",
    "decoder_norm": "norm",
    "decoder_pred": "output",
}
_DECODER_BLOCK = {
    "attention.output.dense": "attention.output",
    "intermediate.dense": "hidden",
    "output.dense": "output",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
# Fixed tables that our modules compute.
_COMPUTED = re.compile(r"(pos_embed|decoder_pos_embed|(enc_|dec_)?feat_rope\.freqs_(cos|sin))$")


def dit_dh_from_released(released: Mapping[str, Tensor], *, backbone_depth: int) -> dict[str, Tensor]:
    """A released DiT^DH state dict under our names; 1x1 convolutions become linear weights.

    Raises:
        ValueError: a key that the released layout does not have.
    """
    ours = {}
    for key, value in released.items():
        if _COMPUTED.match(key):
            continue
        block = re.match(r"blocks\.(\d+)\.(.*)", key)
        if block:
            index = int(block[1])
            where = f"backbone.{index}" if index < backbone_depth else f"head.{index - backbone_depth}"
            name = f"{where}.{_rename(block[2], _BLOCK)}"
        else:
            name = _rename(key, _DIT_DH, required=True)
        ours[name] = value.flatten(1) if value.ndim == 4 else value
    return ours


def decoder_from_released(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released decoder state dict under our names; query, key and value are stacked.

    Raises:
        ValueError: a key that the released layout does not have.
    """
    ours = {}
    for key, value in released.items():
        if _COMPUTED.match(key) or ".attention.attention." in key:
            continue
        block = re.match(r"decoder_layers\.(\d+)\.(.*)", key)
        name = f"blocks.{block[1]}.{_rename(block[2], _DECODER_BLOCK)}" if block else _rename(key, _DECODER, True)
        ours[name] = value
    for prefix in sorted({key.split(".attention.")[0] for key in released if ".attention.attention." in key}):
        for kind in ("weight", "bias"):
            parts = [released[f"{prefix}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"blocks.{prefix.rpartition('.')[2]}.attention.qkv.{kind}"] = torch.cat(parts)
    return ours


def _rename(key: str, table: Mapping[str, str], required: bool = False) -> str:
    for theirs, ours in table.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key[len(theirs) :]
    if required:
        raise ValueError(f"{key}: not a key of the released layout")
    return key
