"""Guidance as functions that wrap a velocity. A new method is one more function here.

A velocity is a function (x [B, ...], t [B], labels [B]) -> [B, ...]. Sources: classifier-free guidance, arXiv
2207.12598; its interval, arXiv 2404.07724; AutoGuidance, arXiv 2406.02507.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rae_xla.config import Config
from rae_xla.models.diffusion import DiffusionModelConfig

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Guided(Config):
    scale: float
    t_min: float = Field(default=0.0, ge=0.0, le=1.0)
    t_max: float = Field(default=1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _interval(self) -> _Guided:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} is above t_max {self.t_max}")
        return self


class NoGuidance(Config):
    """The velocity as it is."""

    method: Literal["none"] = "none"


class ClassifierFreeGuidance(_Guided):
    """Away from the same model's velocity without a label."""

    method: Literal["classifier_free"]


class AutoGuidance(_Guided):
    """Away from a weaker model: smaller, or trained for less."""

    method: Literal["autoguidance"]
    model: DiffusionModelConfig


GuidanceConfig = Annotated[NoGuidance | ClassifierFreeGuidance | AutoGuidance, Field(discriminator="method")]


def acts_at(config: GuidanceConfig, t: Tensor) -> Tensor:
    """Bool [S]: whether guidance changes the velocity at these times [S]."""
    if isinstance(config, NoGuidance):
        return torch.zeros_like(t, dtype=torch.bool)
    return (t >= config.t_min) & (t <= config.t_max)


def classifier_free(velocity: Velocity, config: ClassifierFreeGuidance, null_label: int) -> Velocity:
    """v_null + s (v - v_null) where t_min <= t <= t_max, v elsewhere. One evaluation on a batch of twice the size."""

    def guided(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        null = torch.full_like(labels, null_label)
        # Side by side, not end to end: a batch that is split over devices then stays where it is.
        pairs = [torch.stack(both, dim=1).flatten(0, 1) for both in ((x, x), (t, t), (labels, null))]
        conditional, unconditional = velocity(*pairs).unflatten(0, (-1, 2)).unbind(1)
        return _extrapolate(conditional, unconditional, t, config)

    return guided


def autoguidance(velocity: Velocity, weaker: Velocity, config: AutoGuidance) -> Velocity:
    """v_weak + s (v - v_weak) where t_min <= t <= t_max, v elsewhere."""

    def guided(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return _extrapolate(velocity(x, t, labels), weaker(x, t, labels), t, config)

    return guided


def _extrapolate(good: Tensor, weak: Tensor, t: Tensor, config: ClassifierFreeGuidance | AutoGuidance) -> Tensor:
    inside = acts_at(config, t).reshape(-1, *[1] * (good.ndim - 1))
    return torch.where(inside, weak + config.scale * (good - weak), good)
