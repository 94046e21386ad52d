"""Training state in ``RUN/checkpoints/step_00001000/``: ``state.safetensors``, then ``complete.json`` written last.

A step without ``complete.json`` does not exist. The whole state passes through process 0's memory.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from pydantic import Field
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.errors import UserError

STATE_FILE = "state.safetensors"
MARKER_FILE = "complete.json"


class CheckpointConfig(Config):
    """Save every so many steps and at the end; the newest ``keep`` stay."""

    every_steps: int = Field(gt=0)
    keep: int = Field(default=2, gt=0)


def save(directory: str, step: int, state: Any, keep: int) -> None:
    """Write ``state`` (on the host) as this step, then drop what is older than the newest ``keep``."""
    target = storage.join(directory, f"step_{step:08d}")
    leaves, _ = tree_flatten_with_path(state)
    storage.write_tensors(storage.join(target, STATE_FILE), {_name(path): leaf for path, leaf in leaves})
    storage.write_json(storage.join(target, MARKER_FILE), {"step": step})
    for old in complete_steps(directory)[:-keep]:
        storage.remove(storage.join(directory, f"step_{old:08d}"))


def load(directory: str, step: int, like: Any) -> Any:
    """The state of this step, shaped like ``like``.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape: the checkpoint is of another model.
    """
    path = storage.join(directory, f"step_{step:08d}", STATE_FILE)
    found = storage.read_tensors(path, "checkpoint")
    leaves, spec = tree_flatten_with_path(like)
    wanted: dict[str, torch.Tensor] = {_name(path): leaf for path, leaf in leaves}
    different = sorted(set(wanted) ^ set(found)) or [n for n, t in wanted.items() if found[n].shape != t.shape]
    if different:
        shown = f"{different[0]} and {len(different) - 1} more" if len(different) > 1 else different[0]
        raise UserError(f"{path} is of another model ({shown} differ); give the run another run_dir")
    return tree_unflatten([found[name] for name in wanted], spec)


def complete_steps(directory: str) -> list[int]:
    """Steps with a marker, oldest first."""
    steps = [int(match[1]) for name in storage.list_names(directory) if (match := re.fullmatch(r"step_(\d+)", name))]
    return sorted(s for s in steps if storage.exists(storage.join(directory, f"step_{s:08d}", MARKER_FILE)))


def _name(path: Any) -> str:
    return "/".join(str(entry.key) for entry in path)
