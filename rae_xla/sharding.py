"""Which part of a tensor lies on which device, worked out from names and shapes alone: no device is needed to know it.

The mesh has two axes. A batch is split over both, and so is a training's state: nobody needs it whole to change it
(arXiv 2004.13336). At the beginning of a step, or of each microbatch, the parameters of blocks are cast and gathered
along ``data``; in it they are split over ``fsdp`` alone.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rae_xla.config import Config
from rae_xla.errors import UserError

Axis = Literal["data", "fsdp"]
AXES: tuple[Axis, Axis] = ("data", "fsdp")
Partition = tuple[Axis | tuple[Axis, ...] | None, ...]
"""For each dimension the axis or axes that it is split over."""

# Splitting a small tensor costs a gather a step and saves nothing. In numbers, of one block.
SMALLEST_SPLIT = 2**14

ShardingRule = Annotated[tuple[str, Annotated[tuple[Axis | None, ...], Field(strict=False)]], Field(strict=False)]


class MeshConfig(Config):
    """How the devices are arranged: a grid of ``data`` x ``fsdp``; ``data: -1`` takes all that ``fsdp`` leaves.

    ``slices``: that many slices share ``data``, so that only gradients and new parameters cross the slower network
    between them.
    ``rules``: [pattern, dims] in order, the first that matches a parameter's name decides: for each dimension ``fsdp``,
    ``data`` or null. Blocks are ``*`` in names (``blocks.*.attention.qkv.weight``) and have no dimension here. What no
    rule matches is split by the automatic rule: the largest dimension that divides, over ``fsdp``.
    """

    data: int = -1
    fsdp: int = Field(default=1, ge=1)
    slices: int = Field(default=1, ge=1)
    rules: tuple[ShardingRule, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _fits(self) -> MeshConfig:
        if self.data != -1 and self.data < 1:
            raise ValueError(f"data is a number of devices or -1 for all that are left, got {self.data}")
        for pattern, dims in self.rules:
            named = [axis for axis in dims if axis is not None]
            if len(named) != len(set(named)):
                raise ValueError(f"rules: {pattern}: an axis splits one dimension, got {list(dims)}")
        return self

    def shape_for(self, num_devices: int) -> tuple[int, int]:
        """(data, fsdp) on this many devices.

        Raises:
            UserError: the axes do not multiply to the number of devices, or slices do not share ``data`` evenly.
        """
        data = num_devices // self.fsdp if self.data == -1 else self.data
        if data * self.fsdp != num_devices:
            wanted = f"data: {self.data}, fsdp: {self.fsdp}"
            raise UserError(f"mesh: {wanted} does not fit {num_devices} devices; data * fsdp must equal {num_devices}")
        if data % self.slices:
            raise UserError(
                f"mesh.slices: {self.slices} do not share data: {data} evenly; use an fsdp within one slice"
            )
        return data, self.fsdp


def devices_in_groups(grid: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """Device numbers [data, fsdp], counted along a slice's ``grid`` of chips, its first axis fastest.

    Those of an ``fsdp`` group lie as close as the grid admits: a block of chips gathers over the links of several axes
    at once, a row of as many over those of one. A host's chips, 2x2 of them, stay in the order of their numbers, in
    which it hands them their rows of a batch: a block is as wide along the first axis as it may be.
    """
    count, size = math.prod(grid), shape[1]
    sides = [[side for side in range(1, length + 1) if length % side == 0] for length in grid]
    blocks = [block for block in itertools.product(*sides) if math.prod(block) == size]
    if not blocks:
        return np.arange(count).reshape(shape)
    block = min(blocks, key=lambda block: (max(block), [-side for side in block]))
    split = [part for length, side in zip(grid[::-1], block[::-1], strict=True) for part in (length // side, side)]
    axes = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return np.arange(count).reshape(split).transpose(axes).reshape(shape)


@dataclass(frozen=True)
class Sharding:
    """The partitions that a mesh of this (data, fsdp) shape and these rules give.

    ``devices``: which ones, row by row of the mesh; as they are counted if nothing is said.
    """

    shape: tuple[int, int]
    rules: Sequence[tuple[str, tuple[Axis | None, ...]]] = ()
    devices: tuple[int, ...] | None = None

    def batch(self, num_dims: int) -> Partition:
        """Of a batch: its first dimension over all devices."""
        return (AXES, *[None] * (num_dims - 1))

    def parameter(self, name: str, shape: Sequence[int]) -> Partition:
        """Of a parameter as a step uses it, stacked if its name says so.

        Raises:
            UserError: the rule for it has another number of dimensions, or does not divide; names both.
        """
        for pattern, dims in self.rules:
            if fnmatch.fnmatchcase(name, pattern):
                return self._by_rule(pattern, dims, name, shape)
        return self.automatic(name, shape, "fsdp")

    def of_state(self, path: Sequence[str], shape: Sequence[int]) -> Partition:
        """Of a leaf of a training state: (..., part of the state, name of a parameter that it belongs to)."""
        return self.of_model(path[:-2]).between_steps(path[-1], shape)

    def of_model(self, path: Sequence[str]) -> Sharding:
        """For the model whose state is at ``path`` in a training's: rules are about the one at its top."""
        return replace(self, rules=()) if path else self

    def between_steps(self, name: str, shape: Sequence[int]) -> Partition:
        """Of a parameter, its moments and its average in the state: split on over the axes that it is whole along."""
        partition = self.parameter(name, shape)
        if self.parts(partition) == 1:
            return self.automatic(name, shape, *AXES)
        if self.size("data") == 1 or "fsdp" not in partition or "data" in partition:
            return partition
        # Each part in parts of its own, so that no device needs another's.
        dim = partition.index("fsdp")
        split = list(partition)
        if shape[dim] % math.prod(self.shape) == 0:
            split[dim] = ("fsdp", "data")
            return tuple(split)
        own = range(1 if is_stacked(name) else 0, len(shape))
        divisible = [other for other in own if other != dim and shape[other] % self.size("data") == 0]
        if divisible:
            split[max(divisible, key=lambda other: shape[other])] = "data"
        return tuple(split)

    def automatic(self, name: str, shape: Sequence[int], *axes: Axis) -> Partition:
        """The largest dimension that divides is split over ``axes``; vectors and small tensors stay whole.

        DiT^DH-XL's width is 9 * 128: over more than 128 devices, a fifth of it stays whole.
        """
        parts = math.prod(self.size(axis) for axis in axes)
        first = 1 if is_stacked(name) else 0
        divisible = [dim for dim in range(first, len(shape)) if shape[dim] % parts == 0]
        partition: list[Axis | tuple[Axis, ...] | None] = [None] * len(shape)
        if parts > 1 and divisible and len(shape) > first + 1 and math.prod(shape[first:]) >= SMALLEST_SPLIT:
            largest = max(divisible, key=lambda dim: shape[dim])
            partition[largest] = axes[0] if len(axes) == 1 else axes
        return tuple(partition)

    def size(self, axis: Axis) -> int:
        """Devices along this axis."""
        return self.shape[AXES.index(axis)]

    def parts(self, partition: Partition) -> int:
        """How many different parts a tensor with this partition has."""
        return math.prod(self.size(axis) for entry in partition for axis in _axes(entry))

    def as_hlo(self, partition: Partition) -> str:
        """The partition as the compiler's programs write it."""
        if self.parts(partition) == 1:
            return "{replicated}"
        split = [AXES.index(axis) for entry in partition for axis in _axes(entry)]
        whole = [axis for axis in range(len(AXES)) if axis not in split]
        copies = math.prod(self.shape[axis] for axis in whole)
        tiles = [self.parts((entry,)) for entry in partition] + ([copies] if copies > 1 else [])
        numbers = range(math.prod(self.shape)) if self.devices is None else self.devices
        devices = np.array(numbers).reshape(self.shape).transpose(split + whole).flatten()
        dims, order = ",".join(map(str, tiles)), ",".join(map(str, devices))
        return f"{{devices=[{dims}]{order}{' last_tile_dim_replicate' if copies > 1 else ''}}}"

    def check_rules(self, parameters: Mapping[str, Any]) -> None:
        """Raises a `UserError` that names the first rule that matches none of these parameters, or does not fit one."""
        for pattern, _ in self.rules:
            if not fnmatch.filter(parameters, pattern):
                shown = ", ".join(list(parameters)[:3])
                raise UserError(f"mesh.rules: {pattern!r} matches no parameter; names are such as {shown}")
        for name, tensor in parameters.items():
            self.parameter(name, tensor.shape)

    def _by_rule(self, pattern: str, dims: tuple[Axis | None, ...], name: str, shape: Sequence[int]) -> Partition:
        stacked = is_stacked(name)
        own = list(shape[1:] if stacked else shape)
        if len(dims) != len(own):
            raise UserError(f"mesh.rules: {pattern!r} has {len(dims)} dims, {name} has {len(own)}: {own}")
        for axis, size in zip(dims, own, strict=True):
            if axis is not None and size % self.size(axis):
                raise UserError(f"mesh.rules: {pattern!r}: {size} of {name} {own} does not divide by {axis}")
        return (None, *dims) if stacked else dims


def _axes(entry: Axis | tuple[Axis, ...] | None) -> tuple[Axis, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def is_stacked(name: str) -> bool:
    """Whether a tensor of this name holds those of all blocks, see `rae_xla.models.functional`."""
    return "*" in name


def explained(sharding: Sharding, state: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """A row for each parameter and each frozen tensor: shape, how it is split, and GiB a chip; then the sums.

    A parameter's row counts its average and moments too, which lie as it does between steps. In a step those of blocks
    lie otherwise until each block gathers its own, but for the modulation that is computed ahead.
    """
    rows = _rows_of_state(sharding, state, ())
    for part, tensors in frozen.items():
        for name, tensor in tensors.items():
            own = sharding.automatic(name, tensor.shape, "fsdp")
            rows.append((f"{part}: {name}", tensor, own, "", _gib(tensor) / sharding.parts(own)))
    header = ("name", "shape", "split", "in a step", "GiB a chip")
    cells = [
        (name, "x".join(map(str, t.shape)) or "scalar", _described(between), within, f"{gib:.6f}")
        for name, t, between, within, gib in rows
    ]
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *cells]]
    axes = ", ".join(f"{axis} {sharding.size(axis)}" for axis in AXES)
    return "\n".join([f"mesh: {axes}", *map(str.rstrip, lines), f"in all {sum(row[4] for row in rows):.4f} GiB a chip"])


def _rows_of_state(
    sharding: Sharding, state: Mapping[str, Any], path: tuple[str, ...]
) -> list[tuple[str, Any, Partition, str, float]]:
    rows: list[tuple[str, Any, Partition, str, float]] = []
    belonging = [tensors for tensors in state.values() if isinstance(tensors, Mapping) and "parameters" not in tensors]
    for name, tensor in state["parameters"].items():
        between = sharding.of_state((*path, "parameters", name), tensor.shape)
        gib = sum(_gib(tensors[name]) for tensors in belonging if name in tensors) / sharding.parts(between)
        within = _described(sharding.of_model(path).parameter(name, tensor.shape)) if is_stacked(name) else ""
        rows.append((": ".join((*path, name)), tensor, between, within, gib))
    for part, within in state.items():
        if isinstance(within, Mapping) and "parameters" in within:
            rows += _rows_of_state(sharding, within, (*path, part))
    return rows


def _gib(tensor: Any) -> float:
    return tensor.numel() * tensor.element_size() / 2**30


def _described(partition: Partition) -> str:
    split = [f"dim {dim} over {' x '.join(_axes(entry))}" for dim, entry in enumerate(partition) if entry]
    return ", ".join(split) or "whole"
