"""The order of samples: a pure function of (seed, position in the run), so that a resume needs nothing but the step.

Epochs follow each other without a gap: a batch may hold the end of one and the start of the next, and every image
appears exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rae_xla.data.sources import DataConfig, ImageSet
from rae_xla.data.transforms import shift_randomly

Batch = dict[str, Tensor]


class TrainingBatches:
    """This process's part of every batch: ``images`` uint8 [b, S, S, 3], ``labels`` int32 [b], ``positions`` int32 [b].

    ``positions`` count samples from the start of the run; random numbers on the device are drawn by them.
    """

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, process_index: int, num_processes: int) -> None:
        self._images = images
        self._config = config
        self._seed = seed
        per_process = config.batch_size // num_processes
        self._mine = slice(process_index * per_process, (process_index + 1) * per_process)
        self._order: tuple[int, np.ndarray] | None = None

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches ``step``, ``step + 1``, ... without end."""
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> Batch:
        """The batch of this step."""
        everyone = np.arange(step * self._config.batch_size, (step + 1) * self._config.batch_size)
        positions = everyone[self._mine]
        indices = np.array(
            [self._permutation(position // len(self._images))[position % len(self._images)] for position in positions]
        )
        wrapped = positions.astype(np.int64).astype(np.int32)
        images = shift_randomly(self._images.images[indices], self._config.random_shift_pixels, self._seed, wrapped)
        return {
            "images": torch.from_numpy(images),
            "labels": torch.from_numpy(self._images.labels[indices].astype(np.int32)),
            "positions": torch.from_numpy(wrapped),
        }

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._images))
        return self._order[1]
