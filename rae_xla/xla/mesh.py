"""The mesh of all devices, axes ``data`` and ``fsdp``, and where on it a tensor lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from torch import Tensor

AXES = ("data", "fsdp")
# Splitting a small tensor costs a gather a step and saves nothing.
SMALLEST_SPLIT = 2**14

Partition = tuple[str | tuple[str, ...] | None, ...]


class Mesh:
    """Devices in a (data, fsdp) grid."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.devices = xs.Mesh(np.arange(shape[0] * shape[1]), shape, AXES)

    def batch_partition(self, tensor: Tensor) -> Partition:
        """First dimension over all devices."""
        return (AXES, *[None] * (tensor.ndim - 1))

    def state_partition(self, tensor: Tensor) -> Partition:
        """The largest dimension that divides by the ``fsdp`` axis is split over it; small tensors stay whole."""
        partition: list[str | None] = [None] * tensor.ndim
        fsdp = self.shape[1]
        divisible = [dim for dim in range(tensor.ndim) if tensor.shape[dim] % fsdp == 0]
        if fsdp > 1 and divisible and tensor.numel() >= SMALLEST_SPLIT:
            partition[max(divisible, key=lambda dim: tensor.shape[dim])] = "fsdp"
        return tuple(partition)

    def put(self, tensor: Tensor, partition: Partition, device: torch.device, *, per_process: bool) -> Tensor:
        """``tensor`` on the devices. ``per_process``: it is this process's part of a larger one."""
        spec = xs.ShardingSpec(self.devices, partition, minibatch=per_process)
        placed: Any = xm.send_cpu_data_to_device([tensor.contiguous()], device, input_sharding=spec)
        return placed[0]

    def mark(self, tensor: Tensor, partition: Partition) -> None:
        """Tell the compiler where an intermediate or a result is to lie."""
        xs.mark_sharding(tensor, self.devices, partition)

    def marked(self, tensor: Tensor, partition: Partition) -> Tensor:
        """The same values where `mark` says, and their gradient too."""
        marked: Tensor = _Marked.apply(tensor, self, partition)
        return marked


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, partition: Partition) -> Tensor:
        ctx.where = mesh, partition
        return _copy_at(tensor, mesh, partition)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _copy_at(gradient, *ctx.where), None, None


def _copy_at(tensor: Tensor, mesh: Mesh, partition: Partition) -> Tensor:
    # A mark is put on a tensor in place, and the caller's own may be an input of the step.
    copy = tensor * 1
    mesh.mark(copy, partition)
    return copy
