"""Batches of images in shards: worker processes read, decode and crop, each for some streams of every batch."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rae_xla.data.loader import LoadedBatch
from rae_xla.data.order import SampleOrder
from rae_xla.data.remote import RemoteFiles
from rae_xla.data.shards import Sample, ShardReader
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig
from rae_xla.data.transforms import centre_crop, decoded_fast, mirrored, random_crop
from rae_xla.errors import SourceError
from rae_xla.random import Purpose, uniform

logger = logging.getLogger(__name__)

# Of each worker: windows are read while images are decoded.
READING_THREADS = 8
# Parts of batches that a worker makes ahead.
PARTS_AHEAD = 2


@dataclass
class _Part:
    """Some neighbouring streams' rows of a batch, made by one worker."""

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    counts: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)


class StreamedBatches:
    """See `rae_xla.data.loader.TrainingBatches`."""

    def __init__(
        self, images: ShardedImages, config: DataConfig, seed: int, process_index: int, num_processes: int
    ) -> None:
        blocks = images.manifest.block_sizes
        self._order = SampleOrder(blocks, config.batch_size, config.stream.shuffle_images, seed)
        self._images = images
        self._config = config
        self._seed = seed
        self._streams = self._order.streams_of(process_index, num_processes)
        logger.info(
            "input: host %d of %d reads streams %d to %d of %d, %d images of each batch; %d blocks, %d images shuffled",
            process_index + 1, num_processes, self._streams.start, self._streams.stop - 1, self._order.num_streams,
            len(self._streams) * self._order.images_per_step, len(blocks), config.stream.shuffle_images,
        )  # fmt: skip

    def from_step(self, step: int) -> Iterator[LoadedBatch]:
        """See `rae_xla.data.loader.TrainingBatches`.

        Raises:
            SourceError: see `StreamConfig`.
        """
        config = self._config.stream
        num_workers = min(_num_workers(config), len(self._streams))
        parts = _Parts(self._images, self._config, self._seed, self._order, self._streams, step)
        arriving = iter(_loader(parts, num_workers))
        num_unreadable = 0
        while True:
            found = [next(arriving) for _ in range(max(num_workers, 1))]
            counts: Counter[str] = sum((part.counts for part in found), Counter())
            for name in (name for part in found for name in part.unreadable):
                logger.warning("input: cannot decode %s; another image takes its place", name)
                num_unreadable += 1
                counts["unreadable"] += 1
                if num_unreadable > config.max_unreadable:
                    raise SourceError(
                        f"{num_unreadable} images cannot be decoded, the last {name}; mend the shards, or allow more "
                        "by data.stream.max_unreadable"
                    )
            yield LoadedBatch(
                {
                    name: torch.cat([getattr(part, name) for part in found])
                    for name in ("images", "labels", "positions")
                },
                dict(counts),
            )


def once(images: ShardedImages, config: DataConfig) -> Iterator[np.ndarray]:
    """Every image once, block by block, uint8 [b, S, S, 3]; without random crops or flips.

    Raises:
        SourceError: an image cannot be read or decoded.
    """
    loader: DataLoader[np.ndarray] = _loader(_Blocks(images, config), _num_workers(config.stream))
    yield from loader


def _loader(parts: IterableDataset[Any], num_workers: int) -> DataLoader[Any]:
    """It takes an item of each worker in turn."""
    return DataLoader(
        parts,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # A fork would copy the threads of the device's runtime, and locks that they hold.
        multiprocessing_context="spawn" if num_workers else None,
        prefetch_factor=PARTS_AHEAD if num_workers else None,
    )


def _num_workers(config: StreamConfig) -> int:
    return min(config.num_workers, len(os.sched_getaffinity(0)))


def _as_it_is(part: Any) -> Any:
    return part


class _Parts(IterableDataset[_Part]):
    """In each worker, its part of every batch from a step on."""

    def __init__(
        self,
        images: ShardedImages,
        config: DataConfig,
        seed: int,
        order: SampleOrder,
        streams: range,
        step: int,
    ) -> None:
        super().__init__()
        self._images, self._config, self._seed = images, config, seed
        self._order, self._streams, self._step = order, streams, step

    def __iter__(self) -> Iterator[_Part]:
        index, number = _worker()
        bounds = [len(self._streams) * i // number for i in (index, index + 1)]
        stream = self._config.stream
        files = RemoteFiles(stream.timeout_seconds, stream.give_up_seconds)
        reader = ShardReader(self._images.manifest, self._images.path, files)
        preparation = _Preparation(self._config, self._seed)
        with ThreadPoolExecutor(READING_THREADS) as threads:
            samples = [
                _samples(self._order, stream, self._step, reader, threads)
                for stream in self._streams[bounds[0] : bounds[1]]
            ]
            while True:
                taken = [next(of_stream) for of_stream in samples for _ in range(self._order.images_per_step)]
                yield self._part(taken, preparation, files)

    def _part(self, taken: list[_Taken], preparation: _Preparation, files: RemoteFiles) -> _Part:
        positions = np.array([sample.position for sample in taken], dtype=np.int64).astype(np.int32)
        unreadable: list[str] = []
        images, labels = preparation.prepared(taken, positions, unreadable)
        counts, files.counts = files.counts, Counter()
        return _Part(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            Counter({f"retries_{kind}": number for kind, number in counts.items()}),
            unreadable,
        )


class _Blocks(IterableDataset[np.ndarray]):
    """In each worker, the images of every so many-th block."""

    def __init__(self, images: ShardedImages, config: DataConfig) -> None:
        super().__init__()
        self._images, self._config = images, config

    def __iter__(self) -> Iterator[np.ndarray]:
        stream, size = self._config.stream, self._config.image_size
        files = RemoteFiles(stream.timeout_seconds, stream.give_up_seconds)
        reader = ShardReader(self._images.manifest, self._images.path, files)
        index, number = _worker()
        for block in range(index, reader.num_blocks, number):
            found = []
            for sample in reader.read(block):
                try:
                    found.append(centre_crop(decoded_fast(sample.image), size, self._config.resampling))
                except (OSError, ValueError) as error:
                    raise SourceError(f"{sample.name} cannot be decoded ({error}); mend the shard") from error
            yield np.stack(found)


def _worker() -> tuple[int, int]:
    """Which worker this process is, of how many."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


@dataclass(frozen=True)
class _Taken:
    """Sample ``index`` of a window."""

    window: list[Sample]
    index: int
    position: int


def _samples(
    order: SampleOrder, stream: int, step: int, reader: ShardReader, threads: ThreadPoolExecutor
) -> Iterator[_Taken]:
    """A stream's samples from a step on. While one window is used the next is read."""
    windows = order.windows(stream, step)
    reading = threads.submit(reader.read_window, window := next(windows))
    first = step * order.images_per_step
    while True:
        samples, begins = reading.result(), window.position
        reading = threads.submit(reader.read_window, window := next(windows))
        positions = order.positions(stream, begins, begins + len(samples))
        for index in range(max(first - begins, 0), len(samples)):
            yield _Taken(samples, index, int(positions[index]))


class _Preparation:
    """Encoded samples to uint8 images of one size, the same for the same positions in the run."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def prepared(
        self, taken: list[_Taken], positions: np.ndarray, unreadable: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images and int32 labels. An image that cannot be decoded is replaced by the next of its window that can.

        Its name is added to ``unreadable``.
        """
        rows = torch.from_numpy(positions)
        flips = uniform(self._seed, Purpose.IMAGE_FLIP, rows).numpy() < 0.5 if self._config.flip else None
        places = uniform(self._seed, Purpose.IMAGE_CROP, rows, (2,)).tolist() if self._config.short_side else None
        size = self._config.image_size
        images = np.empty((len(taken), size, size, 3), dtype=np.uint8)
        labels = np.empty(len(taken), dtype=np.int32)
        for number, sample in enumerate(taken):
            image, labels[number] = self._first_readable(sample, places and places[number], unreadable)
            images[number] = mirrored(image) if flips is not None and flips[number] else image
        return images, labels

    def _first_readable(self, taken: _Taken, place: Any, unreadable: list[str]) -> tuple[np.ndarray, int]:
        window = taken.window
        for sample in [*window[taken.index :], *window[: taken.index]]:
            try:
                image = decoded_fast(sample.image)
            except (OSError, ValueError) as error:
                unreadable.append(f"{sample.name} ({error})")
                continue
            config = self._config
            if config.short_side is None:
                return centre_crop(image, config.image_size, config.resampling), sample.label
            return random_crop(image, config.short_side, config.image_size, place, config.resampling), sample.label
        raise SourceError(f"none of {len(window)} neighbouring images can be decoded; the first is {window[0].name}")
