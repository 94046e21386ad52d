"""What makes a continued run the same run: its recipe, and the content of the files it reads weights from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from rae_xla import storage
from rae_xla.config import Config, flattened
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.recipe import TrainingRecipe


Inputs = Mapping[str, Mapping[str, str]]
# Where and how a run is computed, logged and kept; not what it computes.
COMPUTED = (
    *("root", "run_dir", "runtime", "mesh", "cloud"),
    *("compute", "log", "profile", "checkpoint", "recovery", "resume"),
)
# How images are fetched; not which, or in which order.
_FETCHING = ("num_workers", "timeout_seconds", "give_up_seconds", "max_unreadable")
# How long it is, too, and what only sampling and scoring read.
_READ_LATER = ("sampler", "guidance", "preview", "scoring", "heldout", "heldout_source")
MAY_CHANGE = (*COMPUTED, *(f"data.stream.{key}" for key in _FETCHING), *_READ_LATER, "train.num_epochs")


class ResumeConfig(Config):
    """Where a run that has no checkpoint yet begins, and what may differ from the run that a checkpoint is of.

    ``from``: a run directory, or one of its checkpoints. ``allow``: keys of the recipe, or of sections of it.
    """

    from_: str | None = Field(default=None, alias="from")
    allow: tuple[str, ...] = Field(default=(), strict=False)


def described(files: Mapping[str, str]) -> Inputs:
    """Path and content hash of the files that a run reads, by recipe key."""
    return {key: {"path": path, "sha256": storage.content_hash(path)} for key, path in files.items()}


def check_same_run(
    recipe: TrainingRecipe, inputs: Inputs, before: Mapping[str, Any], where: str
) -> list[tuple[str, Any, Any]]:
    """Compare with the recipe and the inputs that a checkpoint was made with: harmless differences, (key, was, is).

    Raises:
        UserError: a key of the recipe or the content of an input is another, and names them all.
    """
    allowed = (*MAY_CHANGE, *recipe.resume.allow)
    known = dict(flattened(recipe.model_dump(mode="json")))
    for key in recipe.resume.allow:
        if key not in inputs and not any(_in(name, (key,)) for name in known):
            close = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"resume.allow: no key {key} here{f'; did you mean {close[0]}?' if close else ''}")
    try:
        # With what this version takes for granted.
        made_with = type(recipe).model_validate(before["recipe"])
    except ValidationError as error:
        raise UserError(f"{where} was made by a version with other recipes; give the run another run_dir") from error
    old, new = [dict(flattened(one.model_dump(mode="json"))) for one in (made_with, recipe)]
    keys = [*new, *(key for key in old if key not in new)]
    changed = [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
    told = [f"{key}: {was!r}, the recipe now says {now!r}" for key, was, now in changed if not _in(key, allowed)]
    if told:
        raise UserError(
            f"{where} was made with {'; '.join(told)}; give the run another run_dir, or the old values, or name the "
            "keys in resume.allow"
        )
    for key, file in inputs.items():
        if before["inputs"].get(key, file)["sha256"] != file["sha256"] and not _in(key, allowed):
            raise UserError(
                f"{key}: {file['path']} is not what {where} was made with; give the run another run_dir, or remove the "
                "old one to train it again, or name the key in resume.allow"
            )
    return changed


def _in(key: str, sections: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in sections)
