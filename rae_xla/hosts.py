"""What hosts of a slice say to each other beside the programs on their chips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rae_xla.errors import StoppedError, UserError
from rae_xla.runtime import Runtime

T = TypeVar("T")


class Hosts:
    """All hosts of a runtime; with one of them nothing is sent. Every host calls the same methods in the same order."""

    def __init__(self, runtime: Runtime) -> None:
        self._is_first = runtime.process_index == 0
        self._number = runtime.num_processes
        self._group = dist.new_group(backend="gloo") if self._number > 1 else None

    def told_by_first(self, find: Callable[[], T]) -> T:
        """What the first host finds, on all of them.

        Raises:
            UserError, StoppedError: the first host did, on all of them.
        """
        if self._group is None:
            return find()
        said: list[Any] = [None, None]
        if self._is_first:
            try:
                said[0] = find()
            except (UserError, StoppedError) as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, group=self._group)
        if said[1] is not None:
            raise said[1]
        found: T = said[0]
        return found

    def all_told(self, value: T) -> list[T]:
        """What each host says, in their order, when all have said it."""
        if self._group is None:
            return [value]
        said: list[Any] = [None] * self._number
        dist.all_gather_object(said, value, self._group)
        return said
