"""Modules as pure functions: the module gives the architecture, a dict of tensors gives the values.

Inputs and outputs of the models here are float32; a model computes in the dtype of its parameters, and its norms and
softmaxes in float32.

What a host spends on starting a step grows with the number of tensors, not with their size, and DiT^DH-XL has 376
parameters. So values are packed: ``blocks.0.output.weight`` ... ``blocks.27.output.weight`` [E, D] are stacked to one
``blocks.*.output.weight`` [28, E, D], and all that has one dimension in a block, biases and norms, is joined to one
``blocks.*.vectors`` [28, sum], outside of blocks to ``vectors`` [sum]. That leaves 21.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rae_xla.models.blocks import Blocks, RunBlocks
from rae_xla.models.layers import RMSNorm, TokenNorm

Tensors = dict[str, Tensor]

_BLOCK_NUMBER = re.compile(r"(^|\.)(\d+)\.")
NORMS = (RMSNorm, TokenNorm, nn.LayerNorm)
VECTORS = "vectors"


def parameters_of(module: nn.Module) -> Tensors:
    """The parameters, detached and packed."""
    return packed({name: parameter.detach() for name, parameter in module.named_parameters()})


def buffers_of(module: nn.Module) -> Tensors:
    """The buffers by name, their blocks stacked: tables, frequencies and statistics that no optimizer touches."""
    return _stack_blocks({name: buffer.detach() for name, buffer in module.named_buffers()})


def tensors_of(module: nn.Module) -> Tensors:
    """Parameters, packed, and buffers."""
    return {**parameters_of(module), **buffers_of(module)}


def packed(tensors: Mapping[str, Tensor]) -> Tensors:
    """Values by their names in a module, packed."""
    return _join_vectors(_stack_blocks(tensors))


def by_module_names(module: nn.Module, values: Mapping[str, Tensor]) -> Tensors:
    """Packed values by their names in the module."""
    return _unstack_blocks(_split_vectors(module, values))


def _stack_blocks(tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors of blocks that are alike, tensor for tensor, and counted from zero, as one; others as they are."""
    groups: dict[str, dict[int, Tensors]] = defaultdict(lambda: defaultdict(dict))
    stacked: Tensors = {}
    for name, tensor in tensors.items():
        number = _BLOCK_NUMBER.search(name)
        if number is None:
            stacked[name] = tensor
        else:
            groups[name[: number.start(2)]][int(number[2])][name[number.end() :]] = tensor
    for before, blocks in groups.items():
        kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in block.items()} for block in blocks.values()]
        if sorted(blocks) == list(range(len(blocks))) and all(kind == kinds[0] for kind in kinds):
            for name in blocks[0]:
                stacked[f"{before}*.{name}"] = torch.stack([blocks[index][name] for index in range(len(blocks))])
        else:
            stacked.update({f"{before}{index}.{n}": t for index, block in blocks.items() for n, t in block.items()})
    return stacked


def _unstack_blocks(tensors: Mapping[str, Tensor]) -> Tensors:
    """What `_stack_blocks` was given."""
    unstacked: Tensors = {}
    for name, value in tensors.items():
        if "*" in name:
            unstacked.update({name.replace("*", str(index)): part for index, part in enumerate(value.unbind(0))})
        else:
            unstacked[name] = value
    return unstacked


def _join_vectors(stacked: Mapping[str, Tensor]) -> Tensors:
    groups = _vectors(stacked)
    joined = {name for names in groups.values() for name in names}
    vectors = {prefix + VECTORS: torch.cat([stacked[n] for n in names], dim=-1) for prefix, names in groups.items()}
    others = {name: tensor for name, tensor in stacked.items() if name not in joined}
    assert not others.keys() & vectors.keys(), f"a parameter may not be called {VECTORS}"
    return {**others, **vectors}


def _split_vectors(module: nn.Module, values: Mapping[str, Tensor]) -> Tensors:
    """What `_join_vectors` was given for this module."""
    shapes = _stack_blocks({name: parameter.detach().to("meta") for name, parameter in module.named_parameters()})
    tensors = dict(values)
    for prefix, names in _vectors(shapes).items():
        parts = tensors.pop(prefix + VECTORS).split([shapes[name].shape[-1] for name in names], dim=-1)
        tensors.update(zip(names, parts, strict=True))
    return tensors


def _vectors(stacked: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of tensors with one dimension, that of the blocks apart, by the part of the name up to the ``*``."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, tensor in stacked.items():
        before, star, _ = name.rpartition("*.")
        if tensor.ndim == (2 if star else 1):
            groups[before + star].append(name)
    return groups


class Preparation(Protocol):
    """What is done to values before a module uses them; a `rae_xla.runtime.Runtime` is one."""

    compute_dtype: torch.dtype

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a value that may lie in parts."""


@dataclass
class InFloat32:
    """A `Preparation` for scores, which are computed in float32 whatever the precision of a training or a sampler."""

    whole: Callable[[Tensor], Tensor]
    compute_dtype: torch.dtype = torch.float32


def call(
    module: nn.Module, tensors: Tensors, prepare: Preparation, *arguments: Any, run_blocks: RunBlocks | None = None
) -> Tensor:
    """``module(*arguments)`` with these packed values.

    Parameters are cast to the ``compute_dtype``, but for those of norms; buffers stay float32. ``run_blocks`` runs the
    `Blocks` inside, whose parameters it gets cast, but not made whole; by default they run one after the other.
    """
    computed = _names_in_dtype(module)
    split = _split_vectors(module, tensors)
    values = {name: value.to(prepare.compute_dtype) if name in computed else value for name, value in split.items()}
    running = {}
    if run_blocks is not None:
        for path, blocks in [(path, part) for path, part in module.named_modules() if isinstance(part, Blocks)]:
            prefix = f"{path}.*."
            own = {name.removeprefix(prefix): values.pop(name) for name in list(values) if name.startswith(prefix)}
            if not own:
                raise ValueError(f"{path}: its blocks are not alike, so they run by themselves only")
            running[blocks] = partial(_run, run_blocks, blocks, prefix, own)
    whole = {name: prepare.whole(value) for name, value in _unstack_blocks(values).items()}
    with _run_by(running):
        return functional_call(module, whole, arguments)


def _run(run_blocks: RunBlocks, blocks: Blocks, prefix: str, values: Tensors, x: Tensor, *shared: Tensor) -> Tensor:
    return run_blocks(blocks, prefix, values, x, shared)


@contextmanager
def _run_by(running: Mapping[Blocks, Any]) -> Iterator[None]:
    try:
        for blocks, run in running.items():
            blocks.run = run
        yield
    finally:
        for blocks in running:
            blocks.run = None


def _names_in_dtype(module: nn.Module) -> set[str]:
    names = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if not isinstance(part, NORMS)
        for name, _ in part.named_parameters(recurse=False)
    }
    return names | {_stacked_name(name) for name in names}


def _stacked_name(name: str) -> str:
    return _BLOCK_NUMBER.sub(r"\1*.", name, count=1)
