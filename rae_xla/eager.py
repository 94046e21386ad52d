"""The eager runtime: plain PyTorch on one CPU or CUDA device, for parity checks and debugging."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from rae_xla.precision import Precision, compute_dtype, effective_precision
from rae_xla.runtime import CountedProgram, Parts, ScanBody, Tree
from rae_xla.sharding import MeshConfig, Sharding


def _whole(tensor: Tensor) -> Parts:
    return Parts(tuple(tensor.shape), tensor.dtype, {(0,) * tensor.ndim: tensor})


class EagerRuntime:
    """One device, nothing compiled. CUDA if there is one."""

    name = "eager"
    num_devices = 1
    process_index = 0
    num_processes = 1

    def __init__(self, mesh: MeshConfig, precision: Precision) -> None:
        self.sharding = Sharding(mesh.shape_for(self.num_devices), mesh.rules)
        self.precision = precision
        self.compute_dtype = compute_dtype(precision)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A GPU's convolutions would round float32 to 10 bits, and its products are asked not to.
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    def describe(self) -> dict[str, Any]:
        """See `Runtime`."""
        return {
            "runtime": self.name,
            "device": self._device.type,
            "num_devices": 1,
            **effective_precision(self.precision, self._device.type),
            "torch": torch.__version__,
        }

    def place_state(self, state: Tree) -> Tree:
        """See `Runtime`. Copies, so that the host's tensors stay as they are."""
        self.sharding.check_rules(state.get("parameters", {}))
        return self.place_frozen(state)

    def copied(self, state: Tree) -> Tree:
        """See `Runtime`. No step changes a tensor in place."""
        return state

    def parts_of(self, state: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda tensor: _whole(tensor.detach().cpu()), state)

    def parts_wanted(self, state: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda tensor: _whole(torch.empty_like(tensor, device="cpu")), state)

    def with_parts(self, state: Tree, parts: Tree) -> Tree:
        """See `Runtime`."""
        values = tree_map_only(Parts, lambda tensor: tensor.parts[(0,) * len(tensor.shape)], parts)
        return tree_map(lambda _, value: value.to(self._device), state, values)

    def place_frozen(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda tensor: tensor.detach().clone().to(self._device), tree)

    def place_batch(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return self.place_frozen(tree)

    def compile(
        self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str, *, exact: bool = False
    ) -> EagerStep:
        """See `Runtime`. Products of float32 are never rounded here."""
        return EagerStep(function, name)

    def scan(
        self, body: ScanBody, carry: Tree, rows: Tree, invariants: Tree, *, reverse: bool = False
    ) -> tuple[Tree, Tree]:
        """See `Runtime`."""
        order = range(len(tree_leaves(rows)[0]))
        outputs = []
        for index in reversed(order) if reverse else order:
            carry, output = body(carry, tree_map_only(Tensor, itemgetter(index), rows), invariants)
            outputs.append(output)
        in_order = outputs[::-1] if reverse else outputs
        return carry, tree_map(lambda *parts: torch.stack(parts), *in_order)

    def barrier(self, tensors: list[Tensor]) -> list[Tensor]:
        """See `Runtime`. Nothing is taken from elsewhere here."""
        return tensors

    def split_batch(self, tensor: Tensor) -> Tensor:
        """See `Runtime`. There is one device."""
        return tensor

    def as_used(self, name: str, tensor: Tensor) -> Tensor:
        """See `Runtime`."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Runtime`. It is."""
        return tensor

    def multiplied(self, x: Tensor, weights: Tensor) -> Tensor:
        """See `Runtime`."""
        return x @ weights.transpose(1, 2)

    def to_host(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), tree)

    def start_trace(self, directory: str) -> None:
        """See `Runtime`."""
        self._trace = torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(directory))
        self._trace.start()

    def stop_trace(self) -> None:
        """See `Runtime`."""
        self._trace.stop()


class CountingRuntime(EagerRuntime):
    """`EagerRuntime` on the meta device: its steps raise a `CountedProgram`."""

    def __init__(self, mesh: MeshConfig, precision: Precision) -> None:
        super().__init__(mesh, precision)
        self._device = torch.device("meta")
        self._counter = FlopCounterMode(display=False)
        self._in_loops = 0.0

    def compile(
        self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str, *, exact: bool = False
    ) -> EagerStep:
        """See `Runtime`."""

        def counted(state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
            with self._counter:
                function(state, frozen, batch)
            flops = self._counter.get_total_flops() + self._in_loops
            raise CountedProgram(tree_leaves(batch)[0].shape[0], flops)

        return EagerStep(counted, name)

    def scan(
        self, body: ScanBody, carry: Tree, rows: Tree, invariants: Tree, *, reverse: bool = False
    ) -> tuple[Tree, Tree]:
        """See `Runtime`. The body is run once, and counted for each row."""
        before = self._counter.get_total_flops() + self._in_loops
        first = tree_map_only(Tensor, itemgetter(slice(1)), rows)
        carry, outputs = super().scan(body, carry, first, invariants)
        once = self._counter.get_total_flops() + self._in_loops - before
        num_rows = len(tree_leaves(rows)[0])
        self._in_loops += (num_rows - 1) * once
        return carry, tree_map_only(Tensor, lambda made: made.expand(num_rows, *made.shape[1:]), outputs)


class EagerStep:
    """A function called as it is."""

    def __init__(self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str) -> None:
        self.name = name
        self.compile_seconds: float | None = None
        self.wait_seconds = 0.0
        self._function = function

    def prepare(self, state: Tree, frozen: Tree, batch: Tree) -> None:
        """Nothing is compiled."""

    def __call__(self, state: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        """One step. The functions differentiate explicitly, so nothing outside them needs gradients."""
        return self._function(state, frozen, batch)
