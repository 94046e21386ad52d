"""Exponential moving average of parameters."""

from __future__ import annotations

from torch import Tensor


def update_ema(average: dict[str, Tensor], parameters: dict[str, Tensor], decay: float) -> dict[str, Tensor]:
    """decay * average + (1 - decay) * parameters, by name."""
    return {name: old + (1.0 - decay) * (parameters[name] - old) for name, old in average.items()}
