"""The seam between what is computed and what computes it.

`training` and `evaluation` see the `Runtime` protocol only. `create` is the one place that imports an implementation:
``xla`` (TPU, or CPU for development) or ``eager`` (plain PyTorch on CPU or CUDA, for parity checks and debugging).

A tree is a nested dict, list or tuple of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.precision import Precision
from rae_xla.sharding import MeshConfig, Sharding

Tree = Any


@dataclass(frozen=True)
class Parts:
    """A tensor of ``shape``, of which a process has some parts on its host, by the offsets at which they begin."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: dict[tuple[int, ...], Tensor]


ScanBody = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
"""(carry, row, invariants) -> (carry, output)"""


class CompiledStep(Protocol):
    """``(state, frozen, batch) -> (state, outputs)``; the state passed in is consumed."""

    name: str
    compile_seconds: float | None
    wait_seconds: float
    """What its calls have spent waiting for earlier steps so far."""

    def prepare(self, state: Tree, frozen: Tree, batch: Tree) -> None:
        """Trace and compile, and run nothing: the state stays. A first call does so by itself.

        Raises:
            RuntimeError: the program does not fit the devices.
        """

    def __call__(self, state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """One step on the device."""


class Runtime(Protocol):
    """Devices, where tensors live on them, and how functions run there."""

    name: str
    num_devices: int
    process_index: int
    num_processes: int
    compute_dtype: torch.dtype
    sharding: Sharding

    def describe(self) -> dict[str, Any]:
        """Devices, mesh, precision in effect and versions, for logs and manifests."""

    def place_state(self, state: Tree) -> Tree:
        """A training state from the host onto the devices, split as `Sharding.of_state` says.

        Raises:
            UserError: a sharding rule does not fit its parameters.
        """

    def copied(self, state: Tree) -> Tree:
        """A placed state, copied on the devices: the same values when the next step has consumed ``state``.

        It is made in turn with the steps, and not waited for.
        """

    def parts_of(self, state: Tree) -> Tree:
        """A placed training state as `Parts` on the host, each part on one process. Waits for them.

        A thread may do so while another starts steps that do not consume ``state``.
        """

    def parts_wanted(self, state: Tree) -> Tree:
        """Empty `Parts`, all that this process's devices have of a placed state, for `with_parts`."""

    def with_parts(self, state: Tree, parts: Tree) -> Tree:
        """The placed state with these values. ``state`` is consumed."""

    def place_frozen(self, tree: Tree) -> Tree:
        """Nested dicts of tensors that no step changes onto the devices, split by the automatic rule."""

    def place_batch(self, tree: Tree) -> Tree:
        """This process's part of a batch onto its devices, split over the mesh along the first dimension."""

    def compile(
        self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str, *, exact: bool = False
    ) -> CompiledStep:
        """A step that is traced at its first call and replayed from then on.

        ``exact``: float32 is multiplied as such in it, as under ``fp32_highest``, whatever the runtime's precision.
        """

    def scan(
        self, body: ScanBody, carry: Tree, rows: Tree, invariants: Tree, *, reverse: bool = False
    ) -> tuple[Tree, Tree]:
        """``carry, output = body(carry, row, invariants)`` for each row, from the last to the first if ``reverse``.

        ``rows``: tensors [S, ...]. Returns the last carry and the outputs, stacked in the order of the rows. The body
        keeps shapes and types of the carry, makes no booleans, and reads no other tensors than it is handed. On the
        device, inside a compiled step; no gradient goes through it.
        """

    def barrier(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same values, which the compiler does not know to be the same, and has only when it has all of them."""

    def split_batch(self, tensor: Tensor) -> Tensor:
        """The same values, and word to the compiler that the first dimension lies like a batch's; with gradients."""

    def as_used(self, name: str, tensor: Tensor) -> Tensor:
        """A state's parameter of all blocks, cast, in the larger parts in which it lies in a step: over ``fsdp``."""

    def whole(self, tensor: Tensor) -> Tensor:
        """The same values, and word to the compiler that each device needs all of them: a parameter, where it is used.

        Left to itself it splits products along a parameter's parts, and moves activations in place of parameters.
        """

    def multiplied(self, x: Tensor, weights: Tensor) -> Tensor | None:
        """x [B, D], a batch, by each of a state's parameters [S, E, D] -> [S, B, E]; nothing if E does not divide.

        Where few rows meet large parameters: each device multiplies its part of the state by all rows, and devices
        exchange what comes of it, where else each would gather all weights and sum all of their gradients.
        """

    def to_host(self, tree: Tree) -> Tree:
        """Values on the host; waits for them."""

    def start_trace(self, directory: str) -> None:
        """Record what host and devices do, until `stop_trace`."""

    def stop_trace(self) -> None:
        """Wait for the steps that were started and write the trace into the directory, on this machine."""


@dataclass(frozen=True)
class TracedArgument:
    """An argument of a traced program: which tensor it is, how it is split, and the output that takes its place."""

    name: str
    shape: list[int]
    dtype: str
    sharding: str
    parts: int
    bytes: int
    """Of one part, without padding."""
    replaced_by: int | None


class TracedProgram(BaseException):
    """Raised by a step of the ``tracing`` runtime in place of running: nothing that catches errors is to catch it.

    ``num_images``: rows of the batch, on all devices together. ``mesh``: device numbers by data and fsdp.
    ``arguments``: in the order of the program's.
    """

    def __init__(
        self, name: str, num_images: int, mesh: list[list[int]], hlo: bytes, arguments: list[TracedArgument]
    ) -> None:
        super().__init__(name)
        self.name = name
        self.num_images = num_images
        self.mesh = mesh
        self.hlo = hlo
        self.arguments = arguments


class CountedProgram(BaseException):
    """Raised by a step of the ``counting`` runtime: floating-point operations of its products for ``num_images``."""

    def __init__(self, num_images: int, flops: float) -> None:
        super().__init__()
        self.num_images = num_images
        self.flops = flops


def create(
    name: Literal["xla", "eager", "tracing", "counting"],
    mesh: MeshConfig,
    precision: Precision,
    grid: Sequence[int] | None = None,
) -> Runtime:
    """The runtime of this name, on all devices of this machine or slice.

    Two run nothing: ``tracing`` has the programs of ``xla``, see `TracedProgram`, ``counting`` those of ``eager``, see
    `CountedProgram`. ``grid``: chips along each axis of the slice that ``tracing`` traces for.

    Raises:
        UserError: the mesh does not fit the devices, or torch_xla is not installed.
    """
    if name in ("eager", "counting"):
        from rae_xla.eager import CountingRuntime, EagerRuntime

        return (EagerRuntime if name == "eager" else CountingRuntime)(mesh, precision)
    from rae_xla.xla.start import choose_device

    choose_device()
    try:
        from rae_xla.xla.runtime import XLARuntime
        from rae_xla.xla.tracing import TracingRuntime
    except ImportError as error:
        raise UserError(f"runtime: xla needs torch_xla ({error}); install it or say runtime=eager") from error
    if name == "tracing":
        assert grid is not None
        return TracingRuntime(mesh, precision, grid)
    return XLARuntime(mesh, precision)


def check_batch_size(batch_size: int, runtime: Runtime, key: str) -> None:
    """Raises a `UserError` that names ``key`` if the batch does not divide over the devices."""
    if batch_size % runtime.num_devices:
        lower = batch_size - batch_size % runtime.num_devices
        remedy = f"use {lower} or {lower + runtime.num_devices}" if lower else f"use {runtime.num_devices}"
        raise UserError(f"{key}: {batch_size} does not divide over the {runtime.num_devices} devices; {remedy}")
