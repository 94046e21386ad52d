"""Batches made and put on the devices by a thread of their own, while the devices work on those before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rae_xla.data.loader import Batch, LoadedBatch

# On the devices, besides the one that a step works on.
BATCHES_AHEAD = 2
LONGEST_JOIN_SECONDS = 10.0


class Prefetched(Iterator[tuple[Any, dict[str, int]]]):
    """Placed batches and their counts, in order; a context that ends the thread and what it reads from.

    What the thread meets with is raised where the batch would have come.
    """

    def __init__(self, batches: Iterator[LoadedBatch], place: Callable[[Batch], Any]) -> None:
        self._ready: queue.Queue[tuple[Any, dict[str, int]] | BaseException] = queue.Queue(BATCHES_AHEAD)
        self._ended: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches, place), name="input", daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[Any, dict[str, int]]:
        found = self._ready.get() if self._ended is None else self._ended
        if isinstance(found, BaseException):
            self._ended = found
            raise found
        return found

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        # A source that does not answer is not waited for: the thread and its workers end with the process.
        self._thread.join(LONGEST_JOIN_SECONDS)

    def _run(self, batches: Iterator[LoadedBatch], place: Callable[[Batch], Any]) -> None:
        try:
            for batch in batches:
                self._offer((place(batch.tensors), batch.counts))
                if self._stopping.is_set():
                    return
            self._offer(StopIteration())
        except BaseException as error:
            self._offer(error)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def _offer(self, item: tuple[Any, dict[str, int]] | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
