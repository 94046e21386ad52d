"""Programs whose ideal time is known, to say how far the compiler's estimates are from it.

Ideal: all FLOPs at the chip's peak, or all bytes at HBM's bandwidth, whichever takes longer. A real chip reaches
neither; an estimate below the ideal would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rae_xla.preflight.programs import raised
from rae_xla.runtime import Runtime, TracedProgram, create
from rae_xla.sharding import MeshConfig
from rae_xla.topologies import Chip

SMALLEST_SLICE = 8
"""One host of every generation has a slice of this number."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A function of a batch and of what is the same for all, and what it takes of one chip at least."""

    function: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
    batch: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Of one chip."""
    frozen: dict[str, tuple[tuple[int, ...], torch.dtype]]
    flops: float
    bytes: float

    def ideal_seconds(self, chip: Chip) -> float:
        """On one chip."""
        return max(self.flops / chip.peak_flops, self.bytes / chip.hbm_bandwidth)


def _attention(_: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    scores = (batch["q"] @ batch["k"].transpose(-1, -2)).float() * 128**-0.5
    return scores.softmax(dim=-1).to(torch.bfloat16) @ batch["v"]


_SIDE, _ROWS, _HEADS = 8192, (8192, 32768), (16, 16, 1024, 128)
CALIBRATIONS = {
    "matmul 8192": Calibration(
        function=lambda frozen, batch: batch["x"] @ frozen["w"],
        batch={"x": ((_SIDE, _SIDE), torch.bfloat16)},
        frozen={"w": ((_SIDE, _SIDE), torch.bfloat16)},
        flops=2.0 * _SIDE**3,
        bytes=3 * 2.0 * _SIDE**2,
    ),
    "copy 1 GiB": Calibration(
        function=lambda _, batch: batch["x"] + 1,
        batch={"x": (_ROWS, torch.float32)},
        frozen={},
        flops=0.0,
        bytes=2 * 4.0 * _ROWS[0] * _ROWS[1],
    ),
    "attention 1024x128": Calibration(
        function=_attention,
        batch={name: (_HEADS, torch.bfloat16) for name in "qkv"},
        frozen={},
        flops=2 * 2.0 * _HEADS[0] * _HEADS[1] * _HEADS[2] ** 2 * _HEADS[3],
        bytes=4 * 2.0 * _HEADS[0] * _HEADS[1] * _HEADS[2] * _HEADS[3],
    ),
}


def traced_calibration(name: str, grid: Sequence[int]) -> TracedProgram:
    """The program for so many chips along each axis of a slice, each with the batch of one."""
    calibration = CALIBRATIONS[name]
    runtime = create("tracing", MeshConfig(), "bf16", grid)
    return raised(TracedProgram, lambda: _start(calibration, runtime))


def _start(calibration: Calibration, runtime: Runtime) -> None:
    def step(state: Any, frozen: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
        # Where the result lies is said, or the compiler may gather it.
        return state, runtime.split_batch(calibration.function(frozen, batch))

    def empty(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], copies: int) -> dict[str, Tensor]:
        return {
            name: torch.empty((shape[0] * copies, *shape[1:]), dtype=dtype, device="meta")
            for name, (shape, dtype) in shapes.items()
        }

    frozen, batch = empty(calibration.frozen, 1), empty(calibration.batch, runtime.num_devices)
    runtime.compile(step, "calibration")({}, runtime.place_frozen(frozen), runtime.place_batch(batch))
