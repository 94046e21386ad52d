"""Euler's method on an explicit grid of times. The state stays float32 whatever the model computes in.

The scan is handed in, so that a runtime can make it one program on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rae_xla.config import Config
from rae_xla.flow.guidance import Velocity

Scan = Callable[..., tuple[Any, Any]]
"""See `Runtime.scan`."""


class SamplerConfig(Config):
    """``num_grid_points`` times, so one evaluation fewer; the released grid stops short of t = 0."""

    method: Literal["euler"] = "euler"
    num_grid_points: int = Field(default=50, ge=2)
    end_at_zero: bool = False
    batch_size: int = Field(gt=0)


def euler(
    velocity_of: Callable[[Any], Velocity], weights: Any, noise: Tensor, labels: Tensor, times: Tensor, scan: Scan
) -> Tensor:
    """Latents [B, C, h, w] at the last time, from ``noise`` at the first; ``times`` float32 [S], falling.

    ``velocity_of(weights)`` is the velocity. It is called inside the scan, with the weights that the scan hands in.
    """
    intervals = torch.stack([times[:-1], times[1:]], dim=1)  # [S - 1, 2]

    def step(x: Tensor, interval: Tensor, given: Any) -> tuple[Tensor, tuple[()]]:
        weights, labels = given
        now, then = interval[0], interval[1]
        return x + (then - now) * velocity_of(weights)(x, now.expand(x.shape[0]), labels).float(), ()

    return scan(step, noise.float(), intervals, (weights, labels))[0]
