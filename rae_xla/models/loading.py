"""Modules with their weights: made from a seed, or read from a safetensors file and checked key by key."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from rae_xla import storage
from rae_xla.errors import UserError

M = TypeVar("M", bound=nn.Module)


def initialised(make: Callable[[], M], seed: int) -> M:
    """``make()`` and its ``init_weights`` under this seed, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        init_weights = getattr(module, "init_weights", None)
        if init_weights is not None:
            init_weights()
    return module.requires_grad_(True)


def load_weights(module: nn.Module, path: str, key: str, prefix: str = "") -> None:
    """Fill ``module`` from a safetensors file. ``prefix``: take only the file's keys that start with it.

    Raises:
        UserError: unreadable, or keys or shapes differ; names ``key``, the file and the difference.
    """
    found = storage.read_tensors(path, key)
    found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    wanted = module.state_dict()
    problems = _differences(found, wanted)
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(f"{key}: {path} does not fit this model: {shown}")
    module.load_state_dict(found)


def _differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(set(wanted) - set(found))]
    unexpected = [f"{name} is not expected" for name in sorted(set(found) - set(wanted))]
    shapes = [
        f"{name} is {list(found[name].shape)}, should be {list(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    return missing + unexpected + shapes
