"""The XLA runtime: SPMD over a mesh of all devices, one process a host. TPU, or CPU with ``PJRT_DEVICE=CPU``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.profiler as profiler
import torch_xla.runtime as xr
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only, tree_map_with_path

from rae_xla.precision import Precision, compute_dtype, effective_precision
from rae_xla.runtime import Tree
from rae_xla.sharding import AXES, MeshConfig, Partition
from rae_xla.xla.mesh import Mesh, copied
from rae_xla.xla.products import multiply_float32
from rae_xla.xla.scan import device_scan
from rae_xla.xla.start import set_compiler
from rae_xla.xla.step import CompiledStep


class XLARuntime:
    """All devices of the slice as one mesh. Making one starts torch_xla, once per process."""

    name = "xla"

    def __init__(self, mesh: MeshConfig, precision: Precision, grid: Sequence[int] | None = None) -> None:
        set_compiler()
        xr.use_spmd()
        self.num_devices = xr.global_runtime_device_count()
        self.process_index = xr.process_index()
        self.num_processes = xr.process_count()
        if self.num_processes > 1 and not dist.is_initialized():
            # For what hosts say to each other beside the programs on their chips: who writes what, who goes away.
            importlib.import_module("torch_xla.distributed.xla_backend")
            dist.init_process_group("gloo", init_method="xla://")
        self.precision = precision
        self.compute_dtype = compute_dtype(precision)
        self.scan = device_scan
        self._mesh = Mesh(mesh, grid)
        self._num_slices = mesh.slices
        self.sharding = self._mesh.sharding
        self._device = torch_xla.device()
        # Global to the process.
        multiply_float32(exact=precision == "fp32_highest")

    def describe(self) -> dict[str, Any]:
        """See `Runtime`."""
        return {
            "runtime": self.name,
            "device": xr.device_type(),
            "num_devices": self.num_devices,
            "mesh": dict(zip(AXES, self.sharding.shape, strict=True)),
            **effective_precision(self.precision, str(xr.device_type())),
            "torch": torch.__version__,
            "torch_xla": torch_xla.__version__,
        }

    def place_state(self, state: Tree) -> Tree:
        """See `Runtime`."""
        self.sharding.check_rules(state.get("parameters", {}))

        def put(path: Any, tensor: Tensor) -> Tensor:
            return self._put(tensor, self.sharding.of_state([entry.key for entry in path], tensor.shape))

        return tree_map_with_path(put, state)

    def copied(self, state: Tree) -> Tree:
        """See `Runtime`."""
        copies = tree_map(copied, state)
        torch_xla.sync()
        return copies

    def parts_of(self, state: Tree) -> Tree:
        """See `Runtime`."""
        # A tensor that a step is still to make has no parts that could be asked for.
        xm.wait_device_ops()
        return tree_map(lambda tensor: self._mesh.parts_of(tensor, self.process_index), state)

    def parts_wanted(self, state: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map(self._mesh.parts_wanted, state)

    def with_parts(self, state: Tree, parts: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map(lambda tensor, of_tensor: self._mesh.with_parts(tensor, of_tensor, self._device), state, parts)

    def place_frozen(self, tree: Tree) -> Tree:
        """See `Runtime`."""

        def put(path: Any, tensor: Tensor) -> Tensor:
            return self._put(tensor, self.sharding.automatic(path[-1].key, tensor.shape, "fsdp"))

        return tree_map_with_path(put, tree)

    def place_batch(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        several = self.num_processes > 1
        return tree_map(lambda tensor: self._put(tensor, self.sharding.batch(tensor.ndim), per_process=several), tree)

    def compile(
        self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str, *, exact: bool = False
    ) -> CompiledStep:
        """See `Runtime`."""
        return CompiledStep(function, name, exact=exact)

    def barrier(self, tensors: list[Tensor]) -> list[Tensor]:
        """See `Runtime`."""
        # In place: on copies, or the step's inputs would count as changed.
        copies = [tensor.clone() for tensor in tensors]
        xm.optimization_barrier_(copies)
        return copies

    def split_batch(self, tensor: Tensor) -> Tensor:
        """See `Runtime`."""
        return self._mesh.marked(tensor, self.sharding.batch(tensor.ndim))

    def as_used(self, name: str, tensor: Tensor) -> Tensor:
        """See `Runtime`. Vectors are never split."""
        if self.num_devices == 1 or tensor.ndim < 3:
            return tensor
        return self._mesh.gathered(tensor, self.sharding.parameter(name, tensor.shape))

    def whole(self, tensor: Tensor) -> Tensor:
        """See `Runtime`. Vectors are never split."""
        if self.num_devices == 1 or tensor.ndim < 2:
            return tensor
        return self._mesh.gathered(tensor, (None,) * tensor.ndim)

    def multiplied(self, x: Tensor, weights: Tensor) -> Tensor | None:
        """See `Runtime`."""
        count, width, _ = weights.shape
        if self.num_devices == 1:
            return x @ weights.transpose(1, 2)
        # Over the network between slices an exchange in each pass would take longer than it saves.
        if self._num_slices > 1 or width % self.num_devices:
            return None
        # The split dimension first, so that it stays one when the others are joined to it.
        split: Partition = (("fsdp", "data"), None)
        joined = self._mesh.marked(weights.transpose(0, 1).flatten(0, 1), split)
        product = self._mesh.marked(joined @ self._mesh.marked(x, (None, None)).t(), split)
        return self._mesh.marked(product.unflatten(0, (width, count)).permute(1, 2, 0), (None, AXES, None))

    def to_host(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), tree)

    def start_trace(self, directory: str) -> None:
        """See `Runtime`."""
        # Steps that were started before are not to be in it.
        xm.wait_device_ops()
        profiler.start_trace(directory)

    def stop_trace(self) -> None:
        """See `Runtime`."""
        xm.wait_device_ops()
        profiler.stop_trace()

    def _put(self, tensor: Tensor, partition: Partition, *, per_process: bool = False) -> Tensor:
        return self._mesh.put(tensor.detach(), partition, self._device, per_process=per_process)
