"""Apply a frozen function to many rows in batches of one compiled shape; the last batch is padded."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rae_xla.errors import UserError
from rae_xla.hosts import Hosts
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

# Before the results of one are waited for, the next is started: the devices work on it while the host sees to both.
BATCHES_AHEAD = 1

Columns = dict[str, np.ndarray]
Rows = Callable[[int], Iterator[Columns]]
"""From a number of rows to columns, so many rows at a time, the last time fewer."""


def batch_size_for(wanted: int, runtime: Runtime) -> int:
    """``wanted`` rounded up to a multiple of the devices: padding does not count, so any size is right."""
    return -(-wanted // runtime.num_devices) * runtime.num_devices


def map_batches(
    function: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    frozen: Any,
    columns: Columns,
    batch_size: int,
    runtime: Runtime,
    name: str,
) -> Iterator[Columns]:
    """`map_rows` over the rows of ``columns``.

    Raises:
        UserError: see `check_one_host`.
    """
    check_one_host(runtime, name)
    num_rows = num_rows_of(columns)

    def rows(size: int) -> Iterator[Columns]:
        for start in range(0, num_rows, size):
            yield {key: values[start : start + size] for key, values in columns.items()}

    return map_rows(function, frozen, rows, num_rows, batch_size, runtime, name)


def map_rows(
    function: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    frozen: Any,
    rows: Rows,
    num_rows: int,
    batch_size: int,
    runtime: Runtime,
    name: str,
    *,
    exact: bool = False,
) -> Iterator[Columns]:
    """`run_batches` of a function that returns a row for each row of the batch: its results, cut to real rows."""
    for part, found in run_batches(function, frozen, rows, num_rows, batch_size, runtime, name, exact=exact):
        yield {key: values[: num_rows_of(part)] for key, values in found.items()}


def as_step(
    function: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Any, Any, dict[str, Tensor]], tuple[Any, dict[str, Tensor]]]:
    """A frozen function as `rae_xla.runtime.Runtime.compile` takes it, without gradients."""

    def step(state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            return state, function(frozen, batch)

    return step


def run_batches(
    function: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    frozen: Any,
    rows: Rows,
    num_rows: int,
    batch_size: int,
    runtime: Runtime,
    name: str,
    *,
    exact: bool = False,
) -> Iterator[tuple[Columns, Columns]]:
    """``function(frozen, batch)`` of all rows, batch by batch: the rows that went in, and what came out, as it is.

    ``function`` runs as one compiled step. The last batch is filled up with its last row; ``batch["is_real"]``, bool
    [b], is false for what fills it. ``frozen`` is on the host. ``num_rows``: to show how far it is. Of several hosts
    each has rows of its own and gets what comes of them, row by row; all have equally many batches. ``exact``: see
    `rae_xla.runtime.Runtime.compile`.
    """
    compiled = runtime.compile(as_step(function), name, exact=exact)
    placed = runtime.place_frozen(frozen)
    logger.info("%s: %d images in batches of %d", name, num_rows, batch_size)
    size = batch_size_for(batch_size, runtime) // runtime.num_processes
    with tqdm(total=num_rows, desc=name, unit="image", disable=None if runtime.process_index == 0 else True) as bar:

        def finished(part: Columns, outputs: dict[str, Tensor]) -> tuple[Columns, Columns]:
            found = own_rows(outputs, runtime)
            bar.update(num_rows_of(part))
            return part, found

        started: deque[tuple[Columns, dict[str, Tensor]]] = deque()
        for part in rows(size):
            _, outputs = compiled({}, placed, runtime.place_batch(padded(part, size)))
            started.append((part, outputs))
            if len(started) > BATCHES_AHEAD:
                yield finished(*started.popleft())
        while started:
            yield finished(*started.popleft())


@dataclass(frozen=True)
class Share:
    """What of some rows a host has, in batches of which all hosts have equally many: all devices are in every one.

    ``indices``: its rows, which follow each other. ``batch_size``: of all hosts together.
    """

    indices: np.ndarray
    num_batches: int
    batch_size: int
    of_host: int

    @staticmethod
    def of(rows: np.ndarray, batch_size: int, runtime: Runtime) -> Share:
        """This host's, of an even sharing of these rows' numbers."""
        shares = np.array_split(rows, runtime.num_processes)
        size = batch_size_for(batch_size, runtime)
        of_host = size // runtime.num_processes
        return Share(shares[runtime.process_index], -(-max(map(len, shares)) // of_host), size, of_host)

    @property
    def batches(self) -> list[np.ndarray]:
        """The rows of each batch; towards the end there may be fewer than the batch has, or none."""
        return [self.indices[n * self.of_host : (n + 1) * self.of_host] for n in range(self.num_batches)]

    @property
    def given(self) -> list[np.ndarray]:
        """What to put into each batch: a host that has no row left takes part with the first of all."""
        return [rows if len(rows) else np.zeros(1, int) for rows in self.batches]


def own_rows(outputs: dict[str, Tensor], runtime: Runtime) -> Columns:
    """On the host: all of it if there is one host, else this host's rows of what is split like a batch, in order."""
    if runtime.num_processes == 1:
        return {key: value.numpy() for key, value in runtime.to_host(outputs).items()}
    found = {}
    for key, value in runtime.parts_of(outputs).items():
        found[key] = np.concatenate([value.parts[offsets].numpy() for offsets in sorted(value.parts)])
    return found


def gathered(rows: list[tuple[np.ndarray, Columns]], num_rows: int, hosts: Hosts) -> Columns:
    """Rows that hosts have found, with their indices, on all of them and in order.

    ``rows``: indices int [n], and columns that begin with as many rows.

    Raises:
        RuntimeError: they are not exactly rows 0 to ``num_rows`` - 1.
    """
    own = [(indices, {name: values[: len(indices)] for name, values in columns.items()}) for indices, columns in rows]
    everywhere = [part for of_host in hosts.of_all(own) for part in of_host if len(part[0])]
    indices = np.concatenate([indices for indices, _ in everywhere])
    order = np.argsort(indices)
    if not np.array_equal(indices[order], np.arange(num_rows)):
        raise RuntimeError(f"{len(indices)} rows came together where there are {num_rows}")
    return {name: np.concatenate([columns[name] for _, columns in everywhere])[order] for name in everywhere[0][1]}


def check_one_host(runtime: Runtime, name: str) -> None:
    """Raises a `UserError` if there are several hosts, each of which would have a part of the results of ``name``."""
    if runtime.num_processes > 1:
        raise UserError(
            f"mesh: this slice has {runtime.num_processes} hosts, and {name} is not gathered across hosts yet; take a "
            "slice of one host (v6e-8 or smaller)"
        )


def num_rows_of(columns: Columns) -> int:
    """How many rows these columns have."""
    return len(next(iter(columns.values())))


def padded(part: Columns, size: int) -> dict[str, Tensor]:
    """``size`` rows, the last as often as it takes; and ``is_real``, bool [size], false for what fills up."""
    rows = np.arange(size)
    filled = np.minimum(rows, num_rows_of(part) - 1)
    batch = {key: torch.from_numpy(values[filled]) for key, values in part.items()}
    return {**batch, "is_real": torch.from_numpy(rows < num_rows_of(part))}
