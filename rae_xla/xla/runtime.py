"""The XLA runtime: SPMD over a mesh of all devices, one process a host. TPU, or CPU with ``PJRT_DEVICE=CPU``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rae_xla.errors import UserError
from rae_xla.runtime import MeshConfig, Precision, Tree, compute_dtype
from rae_xla.xla.mesh import Mesh
from rae_xla.xla.scan import device_scan
from rae_xla.xla.step import CompiledStep


class XLARuntime:
    """All devices of the slice as one mesh. Making one starts torch_xla, once per process."""

    name = "xla"

    def __init__(self, mesh: MeshConfig, precision: Precision) -> None:
        xr.use_spmd()
        self.num_devices = xr.global_runtime_device_count()
        self.process_index = xr.process_index()
        self.num_processes = xr.process_count()
        if self.num_processes > 1:
            raise UserError(
                f"mesh: this slice has {self.num_processes} hosts; checkpoints and samples are not gathered across "
                "hosts yet, so take a slice of one host (v6e-8 or smaller)"
            )
        self.precision = precision
        self.compute_dtype = compute_dtype(precision)
        self.scan = device_scan
        self._mesh = Mesh(mesh.shape_for(self.num_devices))
        self._device = torch_xla.device()
        # A TPU multiplies float32 in bfloat16 unless told otherwise; global to the process.
        products: Literal["highest", "default"] = "highest" if precision == "fp32_highest" else "default"
        if torch_xla.backends.get_mat_mul_precision() != products:
            torch_xla.backends.set_mat_mul_precision(products)

    def describe(self) -> dict[str, Any]:
        """See `Runtime`."""
        return {
            "runtime": self.name,
            "device": xr.device_type(),
            "num_devices": self.num_devices,
            "mesh": dict(zip(("data", "fsdp"), self._mesh.shape, strict=True)),
            "precision": self.precision,
            "torch": torch.__version__,
            "torch_xla": torch_xla.__version__,
        }

    def place_state(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda t: self._put(t, self._mesh.state_partition(t), per_process=False), tree)

    def place_batch(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(
            Tensor, lambda t: self._put(t, self._mesh.batch_partition(t), per_process=self.num_processes > 1), tree
        )

    def compile(self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str) -> CompiledStep:
        """See `Runtime`."""
        return CompiledStep(function, name, self.keep_sharding)

    def barrier(self, tensors: list[Tensor]) -> list[Tensor]:
        """See `Runtime`."""
        # In place: on copies, or the step's inputs would count as changed.
        copies = [tensor.clone() for tensor in tensors]
        xm.optimization_barrier_(copies)
        return copies

    def split_batch(self, tensor: Tensor) -> Tensor:
        """See `Runtime`."""
        return self._mesh.marked(tensor, self._mesh.batch_partition(tensor))

    def to_host(self, tree: Tree) -> Tree:
        """See `Runtime`."""
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), tree)

    def _put(self, tensor: Tensor, partition: Any, *, per_process: bool) -> Tensor:
        return self._mesh.put(tensor.detach(), partition, self._device, per_process=per_process)

    def keep_sharding(self, old: Tensor, new: Tensor) -> None:
        """Lay a result of a step out as what it replaces."""
        assert old.shape == new.shape and old.dtype == new.dtype, f"a step changed {old.shape} to {new.shape}"
        self._mesh.mark(new, self._mesh.state_partition(new))
