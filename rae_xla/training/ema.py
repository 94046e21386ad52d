"""Exponential moving average of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.training.optimizer import OptimizerConfig


def decay_at(step: Tensor, config: OptimizerConfig) -> Tensor:
    """Float32 scalar for a zero-based int32 ``step`` on the device: ``ema_decay``.

    With ``ema_warmup`` it grows towards that as (1 + step) / (10 + step), so that a run forgets its start sooner.
    """
    updates = step.float()
    if not config.ema_warmup:
        return torch.full_like(updates, config.ema_decay)
    return ((1.0 + updates) / (10.0 + updates)).clamp(max=config.ema_decay)


def update_ema(average: dict[str, Tensor], parameters: dict[str, Tensor], decay: Tensor) -> dict[str, Tensor]:
    """decay * average + (1 - decay) * parameters, by name."""
    return {name: old + (1.0 - decay) * (parameters[name] - old) for name, old in average.items()}
