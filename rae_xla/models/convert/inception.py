"""Inception-v3 in torch-fidelity's file layout."""

from __future__ import annotations

import torch

from rae_xla.models.convert.keys import Tensors

NORM_EPS = 0.001


def from_torch_fidelity(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Under our names, each batch norm as a factor and a summand, computed in float64.

    Raises:
        ValueError: a convolution has no whole batch norm, or there is none.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".conv.")
        if kind == "weight":
            try:
                weight, bias, mean, variance = [
                    tensors[f"{layer}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
                ]
            except KeyError as error:
                raise ValueError(f"{error.args[0]} is missing") from error
            scale = weight / (variance + NORM_EPS).sqrt()
            ours = layer.lower()
            renamed |= {f"{ours}.weight": value, f"{ours}.scale": scale, f"{ours}.shift": bias - mean * scale}
        elif ".bn." not in name:
            renamed[name] = value
    if not any(name.endswith(".scale") for name in renamed):
        raise ValueError("it has no convolutions with batch norms")
    return renamed
