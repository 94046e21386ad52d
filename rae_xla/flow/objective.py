"""The flow-matching objective (arXiv 2510.11690, section 4): x_t = (1 - t) x + t eps, target v = eps - x."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] for clean latents x, noise of the same shape and times t [B]."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return (1.0 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict, d x_t / d t."""
    return noise - x


def narrow_width_bound(latents: Tensor, width: int) -> float:
    """What the loss of a model of this width cannot fall below on latents [n, C, h, w] (Theorem 1).

    The sum of the smallest C - width eigenvalues of the covariance over tokens of eps - x, over C because the loss is a
    mean over channels; 0 from width C on. The last layer's outputs lie in an affine space of dimension ``width``, and
    by no other can more of the target's variance be reached than by its leading principal directions.
    """
    channels = latents.shape[1]
    tokens = latents.double().transpose(0, 1).flatten(1)  # [C, n * h * w]
    covariance = torch.eye(channels, dtype=torch.float64) + tokens.cov(correction=0)
    return float(torch.linalg.eigvalsh(covariance)[: max(channels - width, 0)].sum() / channels)


def flow_matching_loss(predicted: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error per sample, float32 [B]."""
    return (predicted.float() - velocity_target(x, noise).float()).square().flatten(1).mean(dim=1)
