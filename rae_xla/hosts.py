"""What hosts of a slice say to each other beside the programs on their chips."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from rae_xla import storage
from rae_xla.errors import StoppedError, UserError, first_line
from rae_xla.runtime import Runtime

T = TypeVar("T")

# The first host may have gigabytes to move while the others wait for its word.
LONGEST_WAIT = timedelta(hours=6)


class Hosts:
    """All hosts of a runtime; with one of them nothing is sent. Every host calls the same methods in the same order."""

    def __init__(self, runtime: Runtime) -> None:
        self._is_first = runtime.process_index == 0
        self._number = runtime.num_processes
        self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if self._number > 1 else None

    def from_first(self, find: Callable[[], T]) -> T:
        """What the first host finds, on all of them.

        Raises:
            UserError, StoppedError: the first host could not, on all of them.
        """
        if self._group is None:
            return find()
        said: list[Any] = [None, None]
        if self._is_first:
            try:
                said[0] = find()
            except (UserError, StoppedError) as error:
                said[1] = error
            # Or the others would wait for ever.
            except Exception as error:
                said[1] = StoppedError(f"the first host failed ({type(error).__name__}: {first_line(error)})")
        dist.broadcast_object_list(said, src=0, group=self._group)
        if said[1] is not None:
            raise said[1]
        found: T = said[0]
        return found

    def of_all(self, value: T) -> list[T]:
        """What each host has, in their order, on all of them."""
        if self._group is None:
            return [value]
        said: list[Any] = [None] * self._number
        dist.all_gather_object(said, value, self._group)
        return said


def check_seen_by_all(path: str, key: str, hosts: Hosts) -> None:
    """Raises a `UserError` on all hosts if one of them does not see a file or folder, which ``key`` names."""
    seen = hosts.of_all(storage.exists(path))
    if not all(seen):
        where = f"host {seen.index(False)} does not see {path}; on several hosts give a gs:// path"
        raise UserError(
            f"{key}: {where if len(seen) > 1 else f'{path} is not there; make it first, or correct the path'}"
        )
