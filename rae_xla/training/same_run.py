"""What makes a continued run the same run: its recipe, and the content of the files it reads weights from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.recipe import TrainingRecipe, save_recipe

INPUTS_FILE = "inputs.json"
Inputs = Mapping[str, Mapping[str, str]]
# How long a run is, where and how it is computed and logged, and what only sampling reads.
_COMPUTED = ("root", "runtime", "mesh", "compute", "log", "profile", "checkpoint")
# How images are fetched; not which, or in which order.
_FETCHING = ("num_workers", "timeout_seconds", "give_up_seconds", "max_unreadable")
MAY_CHANGE = (*_COMPUTED, *(f"data.stream.{key}" for key in _FETCHING), "sampler", "guidance", "train.num_epochs")


def described(files: Mapping[str, str]) -> Inputs:
    """Path and content hash of the files that a run reads, by recipe key."""
    return {key: {"path": path, "sha256": storage.content_hash(path)} for key, path in files.items()}


def begin_run(recipe: TrainingRecipe, inputs: Inputs, run_dir: str) -> None:
    """Write ``recipe.yaml`` and ``inputs.json``."""
    save_recipe(recipe, run_dir)
    storage.write_json(storage.join(run_dir, INPUTS_FILE), inputs)


def check_same_run(recipe: TrainingRecipe, inputs: Inputs, run_dir: str) -> None:
    """Compare with what `begin_run` wrote.

    Raises:
        UserError: a key of the recipe or the content of an input is another, and names the first; or it wrote nothing.
    """
    if not storage.exists(storage.join(run_dir, INPUTS_FILE)):
        raise UserError(f"{run_dir} was begun by a version that did not record its inputs; give another run_dir")
    before = dict(_flat(yaml.safe_load(storage.read_bytes(storage.join(run_dir, "recipe.yaml")))))
    for key, now in _flat(recipe.model_dump(mode="json")):
        allowed = any(key == name or key.startswith(name + ".") for name in MAY_CHANGE)
        if not allowed and key in before and before[key] != now:
            raise UserError(
                f"{key}: {run_dir} was begun with {before[key]!r}, the recipe now says {now!r}; "
                "give the run another run_dir, or the old value"
            )
    old = storage.read_json(storage.join(run_dir, INPUTS_FILE))
    for key, now in inputs.items():
        if key in old and old[key]["sha256"] != now["sha256"]:
            raise UserError(
                f"{key}: {now['path']} is not what {run_dir} was begun with; "
                "give the run another run_dir, or remove the old one to train it again"
            )


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict):
        yield prefix, content
        return
    for key, value in content.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
