"""Exponential moving averages of parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.training.optimizer import OptimizerConfig


def averages(config: OptimizerConfig) -> dict[str, float]:
    """Parts of a training's state that are averages, and their decays; ``ema`` is what samples and scores are of."""
    return {"ema": config.ema_decay, **{f"ema_{decay}": decay for decay in config.more_ema_decays}}


def decay_at(updates: Tensor, decay: float, config: OptimizerConfig) -> Tensor:
    """Float32 scalar on the device, for the int32 number of ``updates`` made before this one: ``decay``.

    With ``ema_warmup`` it grows towards that as (1 + n) / (10 + n), so that a run forgets its start sooner.
    """
    done = updates.float()
    if not config.ema_warmup:
        return torch.full_like(done, decay)
    return ((1.0 + done) / (10.0 + done)).clamp(max=decay)


def update_ema(average: dict[str, Tensor], parameters: dict[str, Tensor], decay: Tensor) -> dict[str, Tensor]:
    """decay * average + (1 - decay) * parameters, by name."""
    return {name: old + (1.0 - decay) * (parameters[name] - old) for name, old in average.items()}
