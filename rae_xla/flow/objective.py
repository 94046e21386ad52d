"""The flow-matching objective (arXiv 2510.11690, section 4): x_t = (1 - t) x + t eps, target v = eps - x."""

from __future__ import annotations

from torch import Tensor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] for clean latents x, noise of the same shape and times t [B]."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return (1.0 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict, d x_t / d t."""
    return noise - x


def flow_matching_loss(predicted: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error per sample, float32 [B]."""
    return (predicted.float() - velocity_target(x, noise).float()).square().flatten(1).mean(dim=1)
