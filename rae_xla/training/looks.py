"""What a run is looked at by while it trains, besides its loss: scores and pictures of its averaged weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from rae_xla.config import Config
from rae_xla.evaluation.features import FeaturesConfig


class PreviewConfig(Config):
    """Pictures of samples, every so many epochs and at the end."""

    every_epochs: float = Field(gt=0)
    num_images: int = Field(default=40, gt=0)


class ScoringConfig(Config):
    """Scores of samples, every so many epochs and at the end; their names say of how many.

    ``features``: the space they are compared in; a classifier also says whether it recognises them. ``reference``: as
    ``--reference`` of ``tools/evaluate.py``; ``null`` takes the held-out images of a set in memory.
    """

    every_epochs: float = Field(gt=0)
    num_images: int = Field(default=10_000, ge=4)
    features: FeaturesConfig
    reference: str | None = None


@dataclass(frozen=True)
class Seen:
    """``values``: by their names in ``metrics.jsonl``. ``pictures``: sheets, uint8 [H, W, 3], by name."""

    values: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def counted(number: int) -> str:
    """A number of images, as the names of scores of so many end: 10k, 500."""
    return f"{number // 1000}k" if number % 1000 == 0 else str(number)


class Look(Protocol):
    """A program of its own beside the training step's, on the tensors that are on the devices for that."""

    title: str
    """What is looked at, for the log."""

    def is_due(self, step: int) -> bool:
        """Whether to look after this step."""

    def prepare(self, state: Any, frozen: Any) -> None:
        """Compile, and do what is needed once."""

    def __call__(self, step: int, state: Any, frozen: Any, leaves: Callable[[], bool]) -> Seen | None:
        """What the state's averaged weights do. Waits for it; nothing if it ``leaves`` before the end.

        Raises:
            SourceError: images cannot be read.
        """
