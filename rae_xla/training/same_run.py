"""What makes a continued run the same run: its recipe, and the content of the files it reads weights from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.recipe import TrainingRecipe

logger = logging.getLogger(__name__)


Inputs = Mapping[str, Mapping[str, str]]
# How long a run is, where and how it is computed and logged, and what only sampling reads.
COMPUTED = ("root", "runtime", "mesh", "compute", "log", "profile", "checkpoint", "recovery", "resume")
# How images are fetched; not which, or in which order.
_FETCHING = ("num_workers", "timeout_seconds", "give_up_seconds", "max_unreadable")
MAY_CHANGE = (*COMPUTED, *(f"data.stream.{key}" for key in _FETCHING), "sampler", "guidance", "train.num_epochs")


class ResumeConfig(Config):
    """Where a run that has no checkpoint yet begins, and what may differ from the run that a checkpoint is of.

    ``from``: a run directory, or one of its checkpoints. ``allow``: keys of the recipe, or of sections of it.
    """

    from_: str | None = Field(default=None, alias="from")
    allow: tuple[str, ...] = Field(default=(), strict=False)


def described(files: Mapping[str, str]) -> Inputs:
    """Path and content hash of the files that a run reads, by recipe key."""
    return {key: {"path": path, "sha256": storage.content_hash(path)} for key, path in files.items()}


def check_same_run(recipe: TrainingRecipe, inputs: Inputs, before: Mapping[str, Any], where: str) -> None:
    """Compare with the recipe and the inputs that a checkpoint was made with; harmless differences are logged.

    Raises:
        UserError: a key of the recipe or the content of an input is another, and names them all.
    """
    allowed = (*MAY_CHANGE, *recipe.resume.allow)
    old = dict(_flat(before["recipe"]))
    changed = [(key, old[key], now) for key, now in _flat(recipe.model_dump(mode="json")) if old.get(key, now) != now]
    told = [f"{key}: {before!r}, the recipe now says {now!r}" for key, before, now in changed if not _in(key, allowed)]
    if told:
        raise UserError(
            f"{where} was made with {'; '.join(told)}; give the run another run_dir, or the old values, or name the "
            "keys in resume.allow"
        )
    for key, value, now in changed:
        logger.info("%s: was %r, is %r from now on", key, value, now)
    for key, file in inputs.items():
        made_with = before["inputs"].get(key, file)
        if made_with["sha256"] != file["sha256"] and not _in(key, allowed):
            raise UserError(
                f"{key}: {file['path']} is not what {where} was made with; give the run another run_dir, or remove the "
                "old one to train it again, or name the key in resume.allow"
            )


def _in(key: str, sections: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in sections)


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict):
        yield prefix, content
        return
    for key, value in content.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
