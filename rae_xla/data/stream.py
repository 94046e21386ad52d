"""Batches of images in shards: worker processes read, decode and crop, each for some streams of every batch."""

from __future__ import annotations

import logging
import os
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rae_xla.data.loader import Batch, LoadedBatch
from rae_xla.data.manifest import StoredLatents
from rae_xla.data.order import SampleOrder
from rae_xla.data.remote import RemoteFiles
from rae_xla.data.shards import Sample, ShardReader
from rae_xla.data.sources import DataConfig, ShardedImages, StreamConfig
from rae_xla.data.transforms import centre_crop, decoded_fast, mirrored, random_crop
from rae_xla.errors import SourceError, first_line
from rae_xla.random import Purpose, uniform

logger = logging.getLogger(__name__)

# Of each worker: windows are read while images are decoded.
READING_THREADS = 8
# Parts of batches that a worker makes ahead.
PARTS_AHEAD = 2
HANDING_OVER_SECONDS = 0.3

Rows = dict[str, np.ndarray]
Block = tuple[Rows, list[str]]
"""Its images that can be decoded, and the names of those that cannot."""


@dataclass
class _Part:
    """Some neighbouring streams' rows of a batch, made by one worker."""

    tensors: Batch
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
        arriving = _from_workers(parts, num_workers)
        unreadable = _Unreadable(config)
        while True:
            found = [next(arriving) for _ in range(max(num_workers, 1))]
            counts: Counter[str] = sum((part.counts for part in found), Counter())
            counts["unreadable"] = unreadable.add([name for part in found for name in part.unreadable])
            tensors = {name: torch.cat([part.tensors[name] for part in found]) for name in found[0].tensors}
            yield LoadedBatch(tensors, dict(+counts))


def once(images: ShardedImages, config: DataConfig, begin: int = 0) -> Iterator[Rows]:
    """Every image once, from number ``begin`` on, block by block; blocks before that are not read.

    ``images`` uint8 [b, S, S, 3], cropped in the centre, ``labels`` int32 [b], and ``positions`` int32 [b]: their
    numbers in the manifest. Those that cannot be decoded are told and left out.

    Raises:
        SourceError: see `StreamConfig`.
    """
    unreadable = _Unreadable(config.stream)
    for rows, names in _from_workers(_Blocks(images, config, begin), _num_workers(config.stream)):
        unreadable.add(names)
        yield rows


class _Unreadable:
    """The images that could not be decoded so far."""

    def __init__(self, config: StreamConfig) -> None:
        self._most = config.max_unreadable
        self._names: set[str] = set()

    def add(self, names: list[str]) -> int:
        """How many are new; each is told once.

        Raises:
            SourceError: they are more than the recipe allows.
        """
        new = sorted(set(names) - self._names)
        for name in new:
            logger.warning("input: cannot decode %s", name)
        self._names.update(new)
        if len(self._names) > self._most:
            raise SourceError(
                f"{len(self._names)} images cannot be decoded, the last {new[-1]}; mend the shards, or allow more by "
                "data.stream.max_unreadable"
            )
        return len(new)


@dataclass
class _Failure:
    """What stopped a worker. An exception would come out of `DataLoader` as a page of text."""

    message: str


def _from_workers(parts: IterableDataset[Any], num_workers: int) -> Iterator[Any]:
    """An item of each worker in turn.

    Raises:
        SourceError: a worker met with one.
    """
    loader: DataLoader[Any] = DataLoader(
        parts,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        # A fork would copy the threads of the device's runtime, and locks that they hold.
        multiprocessing_context="spawn" if num_workers else None,
        prefetch_factor=PARTS_AHEAD if num_workers else None,
    )
    # Ctrl-C goes to all processes of a terminal; workers end with the one that reads from them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        arriving = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while True:
        try:
            item = next(arriving, None)
        except RuntimeError as error:
            # A worker that was killed, for its memory as a rule.
            raise SourceError(f"input: {first_line(error)}") from error
        if item is None:
            return
        if isinstance(item, _Failure):
            raise SourceError(item.message)
        yield item


def _num_workers(config: StreamConfig) -> int:
    return min(config.num_workers, len(os.sched_getaffinity(0)))


def _as_it_is(part: Any) -> Any:
    return part


class _Worker(IterableDataset[Any], ABC):
    """What a worker process does: it opens its own connections."""

    def __init__(self, images: ShardedImages, config: DataConfig) -> None:
        super().__init__()
        self._images, self._config = images, config

    def __iter__(self) -> Iterator[Any]:
        stream = self._config.stream
        files = RemoteFiles(stream.timeout_seconds, stream.give_up_seconds)
        worker = get_worker_info()
        index, number = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            yield from self._items(ShardReader(self._images.manifest, self._images.path, files), files, index, number)
        except SourceError as error:
            yield _Failure(str(error))
        finally:
            files.stop()
            if worker is not None:
                # The thread that hands parts over is not joined; if the process ends under it, it is aborted, loudly.
                time.sleep(HANDING_OVER_SECONDS)

    @abstractmethod
    def _items(self, reader: ShardReader, files: RemoteFiles, index: int, number: int) -> Iterator[Any]:
        """What worker ``index`` of ``number`` gives."""


class _Parts(_Worker):
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
        super().__init__(images, config)
        self._seed = seed
        self._order, self._streams, self._step = order, streams, step

    def _items(self, reader: ShardReader, files: RemoteFiles, index: int, number: int) -> Iterator[_Part]:
        bounds = [len(self._streams) * i // number for i in (index, index + 1)]
        stored = self._images.latents
        given = self._config, self._seed
        preparation = _Pixels(*given) if stored is None else _Latents(*given, stored)
        threads = ThreadPoolExecutor(READING_THREADS)
        # All their first windows are being read before the first is waited for.
        samples = [
            _Samples(self._order, stream, self._step, reader, threads)
            for stream in self._streams[bounds[0] : bounds[1]]
        ]
        try:
            while True:
                taken = [of_stream.take() for of_stream in samples for _ in range(self._order.images_per_step)]
                yield self._part(taken, preparation, files)
        finally:
            # Not to wait for a source that stays away.
            threads.shutdown(wait=False, cancel_futures=True)

    def _part(self, taken: list[_Taken], preparation: _Pixels | _Latents, files: RemoteFiles) -> _Part:
        positions = np.array([sample.position for sample in taken], dtype=np.int64).astype(np.int32)
        unreadable: list[str] = []
        values, labels = preparation.prepared(taken, positions, unreadable)
        arrays = {preparation.name: values, "labels": labels, "positions": positions}
        counts = Counter({f"retries_{kind}": number for kind, number in files.take_counts().items()})
        return _Part({name: torch.from_numpy(array) for name, array in arrays.items()}, counts, unreadable)


class _Blocks(_Worker):
    """In each worker, the images of every so many-th block, from one image on."""

    def __init__(self, images: ShardedImages, config: DataConfig, begin: int) -> None:
        super().__init__(images, config)
        self._begin = begin

    def _items(
        self, reader: ShardReader, files: RemoteFiles, index: int, number: int
    ) -> Iterator[tuple[Rows, list[str]]]:
        size = self._config.image_size
        begins = np.cumsum([0, *self._images.manifest.block_sizes])
        first = int(np.searchsorted(begins, self._begin, side="right")) - 1
        for block in range(first + index, reader.num_blocks, number):
            images, unreadable = [np.empty((0, size, size, 3), dtype=np.uint8)], list[str]()
            found: dict[str, list[int]] = {"labels": [], "positions": []}
            for position, sample in enumerate(reader.read(block), int(begins[block])):
                if position < self._begin:
                    continue
                try:
                    image = decoded_fast(sample.image)
                except ValueError as error:
                    unreadable.append(f"{sample.name} ({error})")
                    continue
                images.append(centre_crop(image, size, self._config.resampling)[None])
                found["labels"].append(sample.label)
                found["positions"].append(position)
            numbers = {name: np.array(values, dtype=np.int32) for name, values in found.items()}
            yield {"images": np.concatenate(images), **numbers}, unreadable


@dataclass(frozen=True)
class _Taken:
    """Sample ``index`` of a window."""

    window: list[Sample]
    index: int
    position: int


class _Samples:
    """A stream's samples from a step on. While one window is used the next is read."""

    def __init__(
        self, order: SampleOrder, stream: int, step: int, reader: ShardReader, threads: ThreadPoolExecutor
    ) -> None:
        self._order, self._stream, self._reader, self._threads = order, stream, reader, threads
        self._windows = order.windows(stream, step)
        self._next = step * order.images_per_step
        self._window: list[Sample] = []
        self._begins = self._next
        self._read_on()

    def take(self) -> _Taken:
        """The next sample."""
        if self._next == self._begins + len(self._window):
            self._window, self._begins = self._reading.result(), self._reading_begins
            self._read_on()
        index, own = self._next - self._begins, self._next
        self._next += 1
        return _Taken(self._window, index, int(self._order.positions(self._stream, own, own + 1)[0]))

    def _read_on(self) -> None:
        window = next(self._windows)
        self._reading, self._reading_begins = self._threads.submit(self._reader.read_window, window), window.position


class _Latents:
    """Stored latents to arrays, plain or of the mirrored image."""

    name = "latents"

    def __init__(self, config: DataConfig, seed: int, stored: StoredLatents) -> None:
        self._stored, self._config, self._seed = stored, config, seed

    def prepared(self, taken: list[_Taken], positions: np.ndarray, _: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Latents, as they are stored, and int32 labels."""
        samples = [sample.window[sample.index] for sample in taken]
        arrays = np.stack([self._stored.parsed(sample.image) for sample in samples])
        mirrored = _flips(self._seed, positions) if self._config.flip else np.zeros(len(taken), dtype=bool)
        labels = np.array([sample.label for sample in samples], dtype=np.int32)
        return arrays[np.arange(len(taken)), mirrored.astype(int)], labels


def _flips(seed: int, positions: np.ndarray) -> np.ndarray:
    return uniform(seed, Purpose.IMAGE_FLIP, torch.from_numpy(positions)).numpy() < 0.5


class _Pixels:
    """Encoded images to uint8 images of one size, the same for the same positions in the run."""

    name = "images"

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
        flips = _flips(self._seed, positions) if self._config.flip else None
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
            except ValueError as error:
                unreadable.append(f"{sample.name} ({error})")
                continue
            config = self._config
            if config.short_side is None:
                return centre_crop(image, config.image_size, config.resampling), sample.label
            return random_crop(image, config.short_side, config.image_size, place, config.resampling), sample.label
        raise SourceError(f"none of {len(window)} neighbouring images can be decoded; the first is {window[0].name}")
