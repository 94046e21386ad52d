"""AdamW, gradient clipping and learning-rate schedules as pure functions on dicts of tensors.

The learning rate is computed on the device from the step in the state, so a schedule never makes XLA trace again.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rae_xla.config import Config
from rae_xla.models.functional import Tensors

ADAM_EPS = 1e-8
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and its schedule: linear warm-up from zero, constant, then decay to ``final_learning_rate``.

    Lengths are in epochs of the training split. ``decay_end_epoch: null`` is the end of the run; a run may end before.
    ``clip_norm: null`` does not clip. ``ema_warmup``: see `decay_at`. ``more_ema_decays``: further averages, kept in
    checkpoints beside that of ``ema_decay``.
    """

    num_epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_learning_rate: float = Field(default=0.0, ge=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    decay_start_epoch: float = Field(default=0.0, ge=0)
    decay_end_epoch: float | None = Field(default=None, gt=0)
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    ema_decay: Beta
    more_ema_decays: tuple[Beta, ...] = Field(default=(), strict=False)
    ema_warmup: bool = False

    @model_validator(mode="after")
    def _fits(self) -> OptimizerConfig:
        decays = [self.ema_decay, *self.more_ema_decays]
        if len(set(decays)) < len(decays):
            raise ValueError(f"more_ema_decays: each once, and not ema_decay again; got {decays}")
        start = max(self.decay_start_epoch, self.warmup_epochs)
        if self.decay_end_epoch is not None and self.decay_end_epoch <= start:
            raise ValueError(f"decay_end_epoch: {self.decay_end_epoch} must be after {start}, where the decay starts")
        return self


def learning_rate_at(step: Tensor, config: OptimizerConfig, steps_per_epoch: float) -> Tensor:
    """Float32 scalar for a zero-based int32 ``step`` on the device."""
    end = float(total_steps(config, steps_per_epoch))
    if config.decay_end_epoch is not None:
        end = config.decay_end_epoch * steps_per_epoch
    warmup_steps = config.warmup_epochs * steps_per_epoch
    start = max(config.decay_start_epoch * steps_per_epoch, warmup_steps)
    position = step.float()
    progress = ((position - start) / max(end - start, 1.0)).clamp(0.0, 1.0)
    if config.schedule == "cosine":
        remaining = 0.5 + 0.5 * (math.pi * progress).cos()
    elif config.schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = torch.ones_like(progress)
    rate = config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * remaining
    warming = config.learning_rate * (position + 1.0) / max(warmup_steps, 1.0)
    return torch.where(position < warmup_steps, warming, rate)


def total_steps(config: OptimizerConfig, steps_per_epoch: float) -> int:
    """Updates in the whole run, at least one."""
    return max(1, round(config.num_epochs * steps_per_epoch))


def clip_by_global_norm(gradients: Tensors, largest: float | None) -> tuple[Tensors, Tensor]:
    """Gradients scaled so that their common norm is at most ``largest``, and the norm before."""
    norm = torch.stack([gradient.float().square().sum() for gradient in gradients.values()]).sum().sqrt()
    if largest is None:
        return gradients, norm
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    return {name: gradient * factor for name, gradient in gradients.items()}, norm


def adamw(
    parameters: Tensors,
    gradients: Tensors,
    first: Tensors,
    second: Tensors,
    done: Tensor,
    rate: Tensor,
    config: OptimizerConfig,
) -> tuple[Tensors, Tensors, Tensors]:
    """One AdamW update (arXiv 1711.05101): new parameters, first and second moments; ``done`` were made before it."""
    beta1, beta2 = config.betas
    updates = done.float() + 1.0
    correction1, correction2 = 1.0 - beta1**updates, 1.0 - beta2**updates
    new_parameters, new_first, new_second = {}, {}, {}
    for name, gradient in gradients.items():
        new_first[name] = beta1 * first[name] + (1.0 - beta1) * gradient
        new_second[name] = beta2 * second[name] + (1.0 - beta2) * gradient.square()
        direction = (new_first[name] / correction1) / ((new_second[name] / correction2).sqrt() + ADAM_EPS)
        decayed = parameters[name] * (1.0 - rate * config.weight_decay)
        new_parameters[name] = decayed - rate * direction
    return new_parameters, new_first, new_second
