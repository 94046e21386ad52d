"""The order of samples of a set in shards: a pure function of (seed, position in the run), whoever reads them.

A run counts its samples from zero. Position p lies in epoch p // n of a set of n images, and the positions of an epoch
are its n images, each once. A batch is a row of *streams* of equal length, whose number depends on the recipe alone;
a process takes some neighbouring streams. So the order is the same for any number of processes, a run can go on with
another number of them from nothing but its step, and no process reads what others train on.

In an epoch all *blocks* (neighbouring images of a shard that are read together) are shuffled, and the streams share the
row of them out. A stream reads a few blocks at a time, its *window*, and shuffles the images in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from rae_xla.errors import UserError

MOST_STREAMS = 256


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows ``first`` up to ``end`` of a block."""

    block: int
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a stream reads together. Image i of it is row ``rows[i]`` of all rows of the pieces, one after the other.

    ``position``: of image 0 among the stream's own samples of the run; the others follow.
    """

    pieces: tuple[Piece, ...]
    rows: np.ndarray
    position: int


class SampleOrder:
    """``block_sizes``: images of each block. ``shuffle_images``: held at a time by all processes together."""

    def __init__(self, block_sizes: Sequence[int], batch_size: int, shuffle_images: int, seed: int) -> None:
        self._block_sizes = np.asarray(block_sizes, dtype=np.int64)
        self._seed = seed
        self.batch_size = batch_size
        self.num_images = int(self._block_sizes.sum())
        # A stream holds a block at least.
        most = max(1, shuffle_images // int(self._block_sizes.max()))
        self.num_streams = _num_streams(batch_size, min(MOST_STREAMS, most))
        self.images_per_step = batch_size // self.num_streams
        self.window_images = -(-shuffle_images // self.num_streams)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def streams_of(self, process_index: int, num_processes: int) -> range:
        """The streams of a process.

        Raises:
            UserError: they do not divide over the processes.
        """
        if self.num_streams % num_processes:
            raise UserError(
                f"data.stream.shuffle_images: a batch of {self.batch_size} is read as {self.num_streams} streams, "
                f"which do not divide over {num_processes} hosts; use another batch_size, or shuffle more images or in "
                f"smaller blocks (the largest has {self._block_sizes.max()})"
            )
        each = self.num_streams // num_processes
        return range(process_index * each, (process_index + 1) * each)

    def positions(self, stream: int, first: int, end: int) -> np.ndarray:
        """The positions in the run, int64, of a stream's own samples ``first`` up to ``end``."""
        step, place = np.divmod(np.arange(first, end), self.images_per_step)
        return step * self.batch_size + stream * self.images_per_step + place

    def windows(self, stream: int, step: int) -> Iterator[Window]:
        """What a stream reads from this step (counted from zero) on, without end.

        The first window may begin before the step: its own sample ``step * images_per_step`` is in it.
        """
        wanted = step * self.images_per_step
        for epoch in count(step * self.batch_size // self.num_images):
            for window in self.epoch(stream, epoch):
                if window.position + len(window.rows) > wanted:
                    yield window

    def epoch(self, stream: int, epoch: int) -> list[Window]:
        """What a stream reads in an epoch."""
        before = [self._own(s, epoch * self.num_images) for s in range(stream + 1)]
        after = [self._own(s, (epoch + 1) * self.num_images) for s in range(stream + 1)]
        # The streams before this one take the front of the row of blocks.
        first = sum(after[:stream]) - sum(before[:stream])
        end = first + after[stream] - before[stream]
        position, windows = before[stream], []
        for number, pieces in enumerate(self._grouped(self._pieces(epoch, first, end))):
            size = sum(piece.end - piece.first for piece in pieces)
            rows = _shuffled(size, self._seed, epoch, stream, number)
            windows.append(Window(pieces=pieces, rows=rows, position=position))
            position += size
        return windows

    def _own(self, stream: int, position: int) -> int:
        """How many of the samples before a position in the run are a stream's own."""
        steps, rest = divmod(position, self.batch_size)
        in_part = min(max(rest - stream * self.images_per_step, 0), self.images_per_step)
        return steps * self.images_per_step + in_part

    def _pieces(self, epoch: int, first: int, end: int) -> Iterator[Piece]:
        """The part from ``first`` to ``end`` of the images of an epoch's shuffled blocks."""
        if first == end:
            return
        blocks, ends = self._blocks_of(epoch)
        for index in range(int(np.searchsorted(ends, first, side="right")), len(blocks)):
            block = int(blocks[index])
            start = int(ends[index]) - int(self._block_sizes[block])
            if start >= end:
                return
            yield Piece(block=block, first=max(first - start, 0), end=min(end, int(ends[index])) - start)

    def _blocks_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's blocks in their order, and where each ends in the row of all their images."""
        if self._epoch is None or self._epoch[0] != epoch:
            blocks = _shuffled(len(self._block_sizes), self._seed, epoch)
            self._epoch = epoch, blocks, np.cumsum(self._block_sizes[blocks])
        return self._epoch[1:]

    def _grouped(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, ...]]:
        group: list[Piece] = []
        size = 0
        for piece in pieces:
            group.append(piece)
            size += piece.end - piece.first
            if size >= self.window_images:
                yield tuple(group)
                group, size = [], 0
        if group:
            yield tuple(group)


def _num_streams(batch_size: int, most: int) -> int:
    """A divisor of the batch size up to ``most``, with as many factors of two as there are: hosts come in those."""
    divisors = [number for number in range(1, min(most, batch_size) + 1) if batch_size % number == 0]
    return max(divisors, key=lambda number: (number & -number, number))


def _shuffled(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. size - 1 that depends on the key only; of raw bits, which no version of NumPy changes."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")
