"""Times: the dimension-dependent shift, the training distribution and the sampling grid.

t = 0 is data, t = 1 is noise. Source: arXiv 2510.11690, section 4.2 and equation 3 (shift), with the base dimension of
4,096 from SD3.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rae_xla.config import Config
from rae_xla.random import Purpose, normal, uniform

BASE_DIMENSION = 4096
LARGEST_TIME = 0.999


class TimeConfig(Config):
    """``shift``: ``auto`` takes it from the latent's size, for training and sampling."""

    shift: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"

    def shift_for(self, latent_shape: tuple[int, int, int]) -> float:
        """The shift in effect for latents of this [C, h, w]."""
        return dimension_shift(latent_shape) if self.shift == "auto" else self.shift


class FlowConfig(TimeConfig):
    """How training draws its times, and the share of samples that it hides the label of."""

    time_distribution: Literal["uniform", "logit_normal"]
    label_dropout: float = Field(default=0.1, ge=0, le=1)


def dimension_shift(latent_shape: tuple[int, int, int]) -> float:
    """sqrt(values in a latent / 4096): 6.928 for 768 channels on a 16 x 16 grid."""
    return math.sqrt(math.prod(latent_shape) / BASE_DIMENSION)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """a t / (1 + (a - 1) t): moves times towards noise for a > 1, keeps 0 and 1."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def training_times(config: FlowConfig, shift: float, seed: int, rows: Tensor) -> Tensor:
    """Float32 [B] shifted times; ``rows`` int32 [B] are the samples' positions in the run."""
    if config.time_distribution == "logit_normal":
        unshifted = normal(seed, Purpose.FLOW_TIME, rows).sigmoid()
    else:
        unshifted = uniform(seed, Purpose.FLOW_TIME, rows)
    return shift_time(LARGEST_TIME * unshifted, shift)


def sampling_times(num_grid_points: int, shift: float, *, end_at_zero: bool) -> Tensor:
    """Float32 [num_grid_points], falling from 1; a solver evaluates the model at all but the last.

    The released grid stops at 1 - 0.999 before the shift; ``end_at_zero`` goes all the way.
    """
    last = 1.0 if end_at_zero else LARGEST_TIME
    return shift_time(1.0 - torch.linspace(0.0, last, num_grid_points), shift)
