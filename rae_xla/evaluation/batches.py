"""Apply a frozen function to many rows in batches of one compiled shape; the last batch is padded and cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rae_xla.errors import UserError
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

Rows = Callable[[int], Iterator[dict[str, np.ndarray]]]
"""From a number of rows to columns, so many rows at a time, the last time fewer."""


def batch_size_for(wanted: int, runtime: Runtime) -> int:
    """``wanted`` rounded up to a multiple of the devices: padding is cut, so any size is right."""
    return -(-wanted // runtime.num_devices) * runtime.num_devices


def map_batches(
    function: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]],
    frozen: Any,
    columns: dict[str, np.ndarray],
    batch_size: int,
    runtime: Runtime,
    name: str,
) -> Iterator[dict[str, np.ndarray]]:
    """`map_rows` over the rows of ``columns``."""
    num_rows = len(next(iter(columns.values())))

    def rows(size: int) -> Iterator[dict[str, np.ndarray]]:
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
) -> Iterator[dict[str, np.ndarray]]:
    """``function(frozen, batch)`` over all rows, batch by batch, results cut to real rows.

    ``function`` runs as one compiled step and returns tensors with one row for each row of the batch. ``frozen`` is on
    the host.

    Raises:
        UserError: there are several hosts, and each would have a part of the results.
    """
    if runtime.num_processes > 1:
        raise UserError(
            f"mesh: this slice has {runtime.num_processes} hosts, and {name} is not gathered across hosts yet; take a "
            "slice of one host (v6e-8 or smaller)"
        )

    def step(state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            return state, function(frozen, batch)

    compiled = runtime.compile(step, name)
    placed = runtime.place_frozen(frozen)
    logger.info("%s: %d images in batches of %d", name, num_rows, batch_size)
    size = batch_size_for(batch_size, runtime)
    with tqdm(total=num_rows, desc=name, unit="image", disable=None if runtime.process_index == 0 else True) as bar:
        for part in rows(size):
            real = len(next(iter(part.values())))
            padded = np.minimum(np.arange(size), real - 1)
            batch = {key: torch.from_numpy(values[padded]) for key, values in part.items()}
            _, outputs = compiled({}, placed, runtime.place_batch(batch))
            yield {key: value.numpy()[:real] for key, value in runtime.to_host(outputs).items()}
            bar.update(real)
