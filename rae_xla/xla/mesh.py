"""The mesh of all devices, axes ``data`` and ``fsdp``, and how a tensor is laid out on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.runtime import Parts
from rae_xla.sharding import AXES, MeshConfig, Partition, Sharding, devices_in_groups


class Mesh:
    """Devices in a (data, fsdp) grid."""

    def __init__(self, config: MeshConfig, grid: Sequence[int] | None = None) -> None:
        shape = config.shape_for(xr.global_runtime_device_count())
        self.devices = _arranged(shape, config.slices, grid)
        self.sharding = Sharding(shape, config.rules, tuple(np.ravel(self.devices.device_ids).tolist()))

    def put(self, tensor: Tensor, partition: Partition, device: torch.device, *, per_process: bool) -> Tensor:
        """``tensor`` on the devices. ``per_process``: it is this process's part of a larger one."""
        spec = xs.ShardingSpec(self.devices, partition, minibatch=per_process)
        placed: Any = xm.send_cpu_data_to_device([tensor.contiguous()], device, input_sharding=spec)
        return placed[0]

    def parts_of(self, tensor: Tensor, process_index: int) -> Parts:
        """The parts on this process's devices, but for those that another device has too and gives."""
        places = _places(tensor)
        if places is None:
            whole = {(0,) * tensor.ndim: tensor.cpu()} if process_index == 0 else {}
            return Parts(tuple(tensor.shape), tensor.dtype, whole)
        values = torch_xla._XLAC._get_local_shards([tensor])[0]
        first = {
            place.offsets: value for place, (value, _) in zip(places, values, strict=True) if place.number_of_copy == 0
        }
        return Parts(tuple(tensor.shape), tensor.dtype, first)

    def parts_wanted(self, tensor: Tensor) -> Parts:
        """Empty parts, each once, that this process's devices have."""
        places = _places(tensor) or [_Place((0,) * tensor.ndim, tuple(tensor.shape), 0)]
        empty = {place.offsets: torch.empty(place.shape, dtype=tensor.dtype) for place in places}
        return Parts(tuple(tensor.shape), tensor.dtype, empty)

    def with_parts(self, tensor: Tensor, parts: Parts, device: torch.device) -> Tensor:
        """A tensor that lies as ``tensor`` does, which it may be, with these values."""
        places = _places(tensor)
        if places is None:
            return self.put(parts.parts[(0,) * tensor.ndim], (None,) * tensor.ndim, device, per_process=False)
        torch_xla._XLAC._load_local_shards(tensor, [parts.parts[place.offsets] for place in places], self._local_names)
        return tensor

    @cached_property
    def _local_names(self) -> list[str]:
        """This process's devices in the order of places."""
        count = self.devices.size()
        probe = self.put(torch.zeros(count), (AXES,), torch_xla.device(), per_process=False)
        return [name for _, name in torch_xla._XLAC._get_local_shards([probe])[0]]

    def marked(self, tensor: Tensor, partition: Partition) -> Tensor:
        """The same values, and word to the compiler where they and their gradient are to lie."""
        marked: Tensor = _Marked.apply(tensor, self.devices, partition)
        return marked

    def gathered(self, tensor: Tensor, partition: Partition) -> Tensor:
        """The same values, and word to the compiler that they are to lie so; nothing about the gradient."""
        gathered: Tensor = _Gathered.apply(tensor, self.devices, partition)
        return gathered


@dataclass(frozen=True)
class _Place:
    """A device's part of a tensor; equal parts are counted."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    number_of_copy: int


def _places(tensor: Tensor) -> list[_Place] | None:
    """For each of this process's devices; ``None`` if all have all of it. A part is never padded, see `Sharding`."""
    found = torch_xla._XLAC._get_local_shard_replica_and_indices([tensor])[0]
    if any(indices is Ellipsis for _, indices in found):
        return None
    return [
        _Place(tuple(s.start for s in indices), tuple(s.stop - s.start for s in indices), copy)
        for copy, indices in found
    ]


def copied(tensor: Tensor) -> Tensor:
    """The same values, which lie alike."""
    copy = tensor.clone()
    keep_sharding(tensor, copy)
    return copy


def keep_sharding(old: Tensor, new: Tensor) -> None:
    """Have a result of a step lie as what it replaces."""
    assert old.shape == new.shape and old.dtype == new.dtype, f"a step changed {old.shape} to {new.shape}"
    sharding = torch_xla._XLAC._get_xla_op_sharding(old)
    assert sharding is not None, "state is put on the devices by Runtime.place_state"
    torch_xla._XLAC._xla_mark_sharding(new, sharding)


def _arranged(shape: tuple[int, int], slices: int, grid: Sequence[int] | None) -> xs.Mesh:
    """Neighbours on ``fsdp`` are neighbours on the chips' own network; slices share ``data``.

    Virtual devices have no network, unless a ``grid`` is given, and lie as they are counted.
    """
    if xr.device_type() != "TPU":
        return xs.Mesh(devices_in_groups(grid or (shape[0] * shape[1],), shape).flatten(), shape, AXES)
    attributes = xr.global_runtime_device_attributes()
    found = len({device.get("slice_index", 0) for device in attributes})
    if found != slices:
        raise UserError(f"mesh.slices: this job has {found} slices, the recipe says {slices}; say slices: {found}")
    if slices == 1:
        by_number = sorted(attributes, key=lambda device: int(str(device["name"]).rpartition(":")[2]))
        places = np.array([device["coords"] for device in by_number])
        numbers = devices_in_groups(places.max(axis=0) + 1, shape)
        # Wherever chips are counted otherwise than x first, y then.
        in_order = np.lexsort(places.T)
        return xs.Mesh(in_order[numbers.flatten()], shape, AXES)
    within = (shape[0] // slices, shape[1])
    return xs.HybridMesh(ici_mesh_shape=within, dcn_mesh_shape=(slices, 1), axis_names=AXES)


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, devices: xs.Mesh, partition: Partition) -> Tensor:
        ctx.where = devices, partition
        return _copy_at(tensor, devices, partition)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _copy_at(gradient, *ctx.where), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, devices: xs.Mesh, partition: Partition) -> Tensor:
        return _copy_at(tensor, devices, partition)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Summed over the batch's parts and split as the parameter is, whichever way the compiler finds best.
        return gradient, None, None


def _copy_at(tensor: Tensor, devices: xs.Mesh, partition: Partition) -> Tensor:
    # A mark is put on a tensor in place, and the caller's own may be an input of the step.
    copy = tensor * 1
    xs.mark_sharding(copy, devices, partition)
    return copy
