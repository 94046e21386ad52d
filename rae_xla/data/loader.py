"""Batches of a training: the same for any number of processes, from any step, with nothing to remember but the step.

Epochs follow each other without a gap: a batch may hold the end of one and the start of the next, and every image
appears exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rae_xla.data.sources import DataConfig, ImageSet, ShardedImages
from rae_xla.data.transforms import shift_randomly

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LoadedBatch:
    """``tensors``: ``images`` uint8 [b, S, S, 3], ``labels`` int32 [b], ``positions`` int32 [b].

    ``positions`` count samples from the start of the run; random numbers on the device are drawn by them. ``counts``:
    what went wrong since the batch before and was mended, for the metrics.
    """

    tensors: Batch
    counts: dict[str, int] = field(default_factory=dict)


class TrainingBatches(Protocol):
    """This process's part of every batch."""

    def from_step(self, step: int) -> Iterator[LoadedBatch]:
        """Batches ``step``, ``step + 1``, ... without end; counted from zero. Closing it ends what it has started."""


def training_batches(
    images: ImageSet | ShardedImages, config: DataConfig, seed: int, process_index: int, num_processes: int
) -> TrainingBatches:
    """Batches of a source.

    Raises:
        UserError: they do not divide over the processes.
    """
    if isinstance(images, ImageSet):
        return BatchesInMemory(images, config, seed, process_index, num_processes)
    # Preflight and sets in memory do without what reads shards.
    from rae_xla.data.stream import StreamedBatches

    return StreamedBatches(images, config, seed, process_index, num_processes)


def images_in_order(
    images: ImageSet | ShardedImages, config: DataConfig, begin: int = 0
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """Every image of a source once, from number ``begin`` on, for `rae_xla.evaluation.batches.run_batches`.

    ``images`` uint8 [up to n, S, S, 3], ``labels`` int32, and ``positions`` int32: their numbers in the source.
    """

    def parts(size: int) -> Iterator[dict[str, np.ndarray]]:
        if isinstance(images, ImageSet):
            positions = np.arange(len(images), dtype=np.int32)
            for start in range(begin, len(images), size):
                rows = slice(start, start + size)
                labels = images.labels[rows].astype(np.int32)
                yield {"images": images.images[rows], "labels": labels, "positions": positions[rows]}
            return
        from rae_xla.data.stream import once

        held: dict[str, np.ndarray] = {}
        for block in once(images, config, begin):
            held = {name: np.concatenate([held[name], block[name]]) if held else block[name] for name in block}
            while len(held["labels"]) >= size:
                yield {name: values[:size] for name, values in held.items()}
                held = {name: values[size:] for name, values in held.items()}
        if held and len(held["labels"]):
            yield held

    return parts


def blank_batch(images: ImageSet | ShardedImages, config: DataConfig) -> Batch:
    """Zeros in the shapes of a global batch."""
    latents = images.latents
    if latents is None:
        size = config.image_size
        content = {"images": torch.zeros(config.batch_size, size, size, 3, dtype=torch.uint8)}
    else:
        dtype = getattr(torch, latents.dtype)
        content = {"latents": torch.zeros(config.batch_size, *latents.shape, dtype=dtype)}
    return {
        **content,
        "labels": torch.zeros(config.batch_size, dtype=torch.int32),
        "positions": torch.zeros(config.batch_size, dtype=torch.int32),
    }


class BatchesInMemory:
    """Of a set in memory, each epoch in an order of its own."""

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, process_index: int, num_processes: int) -> None:
        self._images = images
        self._config = config
        self._seed = seed
        per_process = config.batch_size // num_processes
        self._mine = slice(process_index * per_process, (process_index + 1) * per_process)
        self._order: tuple[int, np.ndarray] | None = None

    def from_step(self, step: int) -> Iterator[LoadedBatch]:
        """See `TrainingBatches`."""
        while True:
            yield LoadedBatch(self.batch(step))
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
