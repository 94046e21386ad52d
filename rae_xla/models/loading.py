"""Modules with their weights: made from a seed, or read from a file and checked key by key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.models.convert.files import read_weights
from rae_xla.models.convert.released import Layout, layout_of
from rae_xla.models.decoder import Decoder
from rae_xla.models.dit import DiT
from rae_xla.models.dit_dh import DiTDH

M = TypeVar("M", bound=nn.Module)

_without_values: ContextVar[bool] = ContextVar("without_values", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that are made or loaded inside have shapes only, on the meta device; no file is looked for."""
    token = _without_values.set(True)
    try:
        yield
    finally:
        _without_values.reset(token)


def values_wanted() -> bool:
    """False inside `without_values`."""
    return not _without_values.get()


def initialised(make: Callable[[], M], seed: int) -> M:
    """``make()`` and its ``init_weights`` under this seed, leaving the global random state as it was."""
    if not values_wanted():
        return on_meta(make).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        init_weights = getattr(module, "init_weights", None)
        if init_weights is not None:
            init_weights()
    return module.requires_grad_(True)


def on_meta(make: Callable[[], M]) -> M:
    """``make()`` without storage for its parameters, to be filled by `load_weights`."""
    with torch.device("meta"):
        return make()


def required_path(weights: str | None, root: str, key: str) -> str:
    """The path of weights that a recipe may leave open but that are needed here.

    Raises:
        UserError: they are not named.
    """
    if not values_wanted():
        return ""
    if weights is None:
        raise UserError(f"{key}: required here; give a safetensors file, or a released .pt")
    return storage.resolve(root, weights)


def load_weights(module: nn.Module, path: str, key: str, backbone_depth: int | None = None) -> None:
    """Fill ``module`` from a file, ours or released; ``backbone_depth`` as in `from_released`.

    Raises:
        UserError: unreadable, or keys, shapes, grid or heads differ; names ``key``, the file and the difference.
    """
    if not values_wanted():
        return
    file = read_weights(path, key, backbone_depth)
    assign_weights(module, file.tensors, path, key)
    # Grid and heads show in no weight: another grid's would load, and make noise.
    if file.layout is not None and isinstance(module, Decoder | DiT | DiTDH):
        ours = layout_of(module)
        if file.layout != ours:
            raise UserError(
                f"{key}: {path} was made for {_described(file.layout)}, this model has {_described(ours)}; "
                "check input_size of the encoder and num_heads of the model"
            )


def _described(layout: Layout) -> str:
    heads = f" and heads {' and '.join(map(str, layout.head_widths))} wide" if layout.head_widths else ""
    return f"{layout.grid}x{layout.grid} tokens{heads}"


def assign_weights(module: nn.Module, found: Mapping[str, Tensor], path: str, key: str) -> None:
    """Make these tensors, which come from ``path``, the module's own, as float32.

    Raises:
        UserError: keys or shapes differ; names ``key``, the file and the difference.
    """
    differences = describe_differences(found, module.state_dict())
    if differences:
        raise UserError(f"{key}: {path} does not fit this model: {differences}")
    module.load_state_dict({name: value.float() for name, value in found.items()}, assign=True)


def describe_differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], num_shown: int = 4) -> str:
    """Keys that are missing, unexpected or of another shape, in one line; empty if there are none."""
    missing = [f"{name} is missing" for name in sorted(set(wanted) - set(found))]
    unexpected = [f"{name} is not expected" for name in sorted(set(found) - set(wanted))]
    shapes = [
        f"{name} is {list(found[name].shape)}, should be {list(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    problems = shapes + missing + unexpected
    more = [f"and {len(problems) - num_shown} more"] if len(problems) > num_shown else []
    return "; ".join(problems[:num_shown] + more)
