"""A runtime that runs nothing: the first compiled step that is called is traced, and what it would compile is kept.

Tensors are shapes, so a model of any size is traced in little memory, for as many devices as a slice has chips. These
are there in name only: PyTorch's autograd counts devices in eight bits, and 128 virtual ones are too many for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.runtime as xr
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from rae_xla.precision import Precision
from rae_xla.runtime import TracedArgument, TracedProgram, Tree
from rae_xla.sharding import MeshConfig, Partition
from rae_xla.xla.products import exact_products
from rae_xla.xla.runtime import XLARuntime
from rae_xla.xla.source_lines import source_lines


class TracingRuntime(XLARuntime):
    """`XLARuntime` with shapes for tensors: ``compile`` gives steps that raise a `TracedProgram`."""

    def __init__(self, mesh: MeshConfig, precision: Precision, grid: Sequence[int]) -> None:
        # Meshes ask torch_xla, and this process has the one device of a CPU.
        xr.global_runtime_device_count = lambda: math.prod(grid)  # type: ignore[assignment]
        super().__init__(mesh, precision, grid)
        self.partitions: Any = WeakTensorKeyDictionary()

    def compile(
        self, function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], name: str, *, exact: bool = False
    ) -> Any:
        """See `Runtime`."""
        return TracingStep(function, name, self, exact=exact)

    def marked_as(self, tensor: Tensor, partition: Partition) -> None:
        """Have an output lie so."""
        torch_xla._XLAC._xla_mark_sharding(tensor, self._mesh.devices.get_op_sharding(partition))

    def _put(self, tensor: Tensor, partition: Partition, *, per_process: bool = False) -> Tensor:
        placeholder: Tensor = xb.create_placeholder_tensor(tensor.shape, tensor.dtype)
        self.partitions[placeholder] = partition
        return placeholder


class TracingStep:
    """Traces ``function(state, frozen, batch) -> (state, outputs)`` as `CompiledStep` does."""

    def __init__(
        self,
        function: Callable[[Any, Any, Any], tuple[Any, Any]],
        name: str,
        runtime: TracingRuntime,
        *,
        exact: bool = False,
    ) -> None:
        self.name = name
        self._exact = exact
        self.compile_seconds: float | None = None
        self.wait_seconds = 0.0
        self._function = function
        self._runtime = runtime

    def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        """Raises a `TracedProgram`."""
        inputs, spec = tree_flatten_with_path({"state": state, "frozen": frozen, "batch": batch})
        given = tree_unflatten([tensor for _, tensor in inputs], spec)
        with source_lines():
            new_state, outputs = self._function(given["state"], given["frozen"], given["batch"])
        num_state = len(tree_leaves(new_state))
        results = tree_leaves((new_state, outputs))
        partitions, sharding = self._runtime.partitions, self._runtime.sharding
        for (_, old), new in zip(inputs[:num_state], results, strict=False):
            self._runtime.marked_as(new, partitions[old])
        context = torch_xla._XLAC.lowering.LoweringContext(self.name)
        with exact_products(self._exact):
            context.build(results)

        def argument(name: str, tensor: Tensor, replaced_by: int | None = None) -> TracedArgument:
            partition = partitions.get(tensor, ())
            parts = sharding.parts(partition)
            return TracedArgument(
                name=name,
                shape=list(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                sharding=sharding.as_hlo(partition),
                parts=parts,
                bytes=tensor.numel() * tensor.element_size() // parts,
                replaced_by=replaced_by,
            )

        # Numbers in the code become arguments too.
        parameters = dict(context.device_parameter_id_tensor_mapping())
        arguments = {number: argument("a number in the code", tensor) for number, tensor in parameters.items()}
        path: Any
        for index, (path, tensor) in enumerate(inputs):
            number = context.tensor_parameter_id(tensor)
            if number >= 0:
                name = f"{path[0].key}{keystr(path[1:])}"
                arguments[number] = argument(name, tensor, index if index < num_state else None)
        in_order = [arguments[number] for number in sorted(arguments)]
        mesh = np.array(sharding.devices).reshape(sharding.shape).tolist()
        raise TracedProgram(self.name, tree_leaves(batch)[0].shape[0], mesh, context.hlo(), in_order)
