"""Theorem 1: a model narrower than the tokens stays above the bound, one as wide gets below it, at equal steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae_xla.benchmarks.width import loss_by_width
from rae_xla.flow.objective import narrow_width_bound

STEPS = 240


def test_overfitting_one_image(one_device_run: Path) -> None:
    short = ["runtime=eager", f"train.num_epochs={STEPS * 32}"]
    narrow, wide = loss_by_width(str(one_device_run), (64, 96), short)
    assert narrow["steps"] == wide["steps"] == STEPS
    # Of one image, 16 tokens, all but 15 eigenvalues are those of the noise alone.
    assert wide["bound"] == 0 and narrow["bound"] == pytest.approx((96 - 64) / 96, abs=1e-9)
    assert narrow["loss"] > narrow["bound"]
    assert wide["loss"] < narrow["bound"]


def test_the_bound_is_what_the_best_projection_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 6, 8, 8, generator=generator) * torch.arange(1, 7).view(6, 1, 1)
    targets = (torch.randn(latents.shape, generator=generator) - latents).transpose(0, 1).flatten(1)  # [6, n]
    centred = targets - targets.mean(dim=1, keepdim=True)
    directions = torch.linalg.svd(centred, full_matrices=False).U
    for width in range(7):
        kept = directions[:, :width]
        left = (centred - kept @ (kept.T @ centred)).square().mean().item()
        assert narrow_width_bound(latents, width) == pytest.approx(left, rel=0.05, abs=1e-6)
