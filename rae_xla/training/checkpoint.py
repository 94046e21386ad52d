"""A run's checkpoints: ``RUN/checkpoints/step_00001000/``, see `rae_xla.training.stored_parts` for what is in one.

A checkpoint holds the state by the names that it has on the devices, the same for blocks one by one and scanned, and
in its index all that a run needs to go on: how far it is, its recipe, hashes of its inputs. Random numbers and the
order of images are functions of seed and position, so there is no more to them than the step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field
from torch.utils._pytree import tree_flatten_with_path

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.errors import StoppedError, UserError, first_line
from rae_xla.models.functional import Tensors
from rae_xla.runtime import Parts, Runtime, Tree
from rae_xla.training.stored_index import MARKER_FILE, DamagedError, StoredIndex
from rae_xla.training.stored_parts import read_parts, remove_step, write_parts

logger = logging.getLogger(__name__)

# In a run's directory.
CHECKPOINTS = "checkpoints"
# What belongs to the model and is not trained; stored for the export.
CONSTANTS = "constants"


class CheckpointConfig(Config):
    """Save every so many steps and at the end; the newest ``keep`` stay, and steps that ``keep_every_steps`` divides.

    ``asynchronous``: training goes on while the state is written, as soon as it is copied: on the ``devices``, which
    takes no time but needs room for it there until it has come to the host; or to the ``host``, which takes longer.
    """

    every_steps: int = Field(gt=0)
    keep: int = Field(default=2, gt=0)
    keep_every_steps: int | None = Field(default=None, gt=0)
    asynchronous: bool = True
    copy_on: Literal["devices", "host"] = "devices"


@dataclass(frozen=True)
class Progress:
    """How far a run is. Step ``s`` takes batch ``s + batches_passed_over``."""

    step: int
    batches_passed_over: int = 0
    rollbacks: int = 0


class Checkpoints:
    """Those of one run. ``about``: what else an index is to hold; ``constants``: see `CONSTANTS`."""

    def __init__(
        self, directory: str, config: CheckpointConfig, runtime: Runtime, about: Mapping[str, Any], constants: Tensors
    ) -> None:
        self._directory = directory
        self._config = config
        self._runtime = runtime
        self._about = about
        self._constants = constants
        self._group = dist.new_group(backend="gloo") if runtime.num_processes > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.newest: int | None = None
        """The last step that was saved or restored, in the folder ``newest_directory``."""
        self.newest_directory: str | None = None

    def restore(self, found: StoredIndex, state: Tree) -> tuple[Tree, Progress]:
        """The state of a checkpoint, laid out as the placed ``state``, which is consumed.

        Raises:
            UserError: it is of another model.
            DamagedError: it is not as it was written. ``state`` is as it was.
            StoppedError: other hosts have found another one.
        """
        if self._group is not None:
            seen: list[Any] = [None] * self._runtime.num_processes
            dist.all_gather_object(seen, found.directory, self._group)
            if len(set(seen)) > 1:
                raise StoppedError(f"hosts see different checkpoints ({', '.join(sorted(set(seen)))}); try again")
        wanted = self._runtime.parts_wanted(state)
        by_name = _by_name(wanted)
        stored = {name for name in found.shapes if not name.startswith(f"{CONSTANTS}/")}
        different = sorted(stored ^ by_name.keys()) or [
            n for n, t in by_name.items() if (found.shapes[n], found.dtypes[n]) != (t.shape, t.dtype)
        ]
        if different:
            shown = f"{different[0]} and {len(different) - 1} more" if len(different) > 1 else different[0]
            raise UserError(f"{found.directory} is of another model ({shown} differ); give the run another run_dir")
        read_parts(found, by_name, self._group)
        progress = Progress(**found.about["progress"])
        self.newest, self.newest_directory = progress.step, found.directory
        return self._runtime.with_parts(state, wanted), progress

    def save(self, progress: Progress, state: Tree) -> None:
        """Copy the placed state and write the copy, after the one before is written.

        Raises:
            StoppedError: that could not be.
        """
        self.wait()
        if self._config.asynchronous and self._config.copy_on == "devices":
            copy = [self._runtime.copied(state)]
            # Taken out of the list there, so that the chips have their room back before all is written.
            self._writing = self._thread.submit(self._write, progress, lambda: self._runtime.parts_of(copy.pop()))
        else:
            parts = self._runtime.parts_of(state)
            self._writing = self._thread.submit(self._write, progress, lambda: parts)
        if not self._config.asynchronous:
            self.wait()

    @property
    def is_writing(self) -> bool:
        """Whether the last save is still under way."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Until what is being written is there. Raises as `save` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, progress: Progress, parts_of_state: Callable[[], Tree]) -> None:
        directory = step_directory(self._directory, progress.step)
        try:
            parts = _by_name(parts_of_state())
            if self._runtime.process_index == 0:
                whole = {n: Parts(tuple(t.shape), t.dtype, {(0,) * t.ndim: t}) for n, t in self._constants.items()}
                parts |= _by_name({CONSTANTS: whole})
            about = {**self._about, "progress": asdict(progress)}
            write_parts(directory, parts, about, self._group)
        # A disk, a bucket and the libraries between may raise anything.
        except Exception as error:
            kept = "nothing is saved" if self.newest is None else f"step {self.newest} is"
            raise StoppedError(
                f"step {progress.step} could not be saved ({first_line(error)}), {kept}; the same command goes on from "
                "there"
            ) from error
        self.newest, self.newest_directory = progress.step, directory
        if self._runtime.process_index == 0:
            try:
                self._remove_old(progress.step)
            # It is tried again after the next one.
            except Exception as error:
                logger.warning("checkpoint: an old step could not be removed (%s)", first_line(error))

    def _remove_old(self, newest: int) -> None:
        """Later steps, which are damaged or this would not be the newest, do not take the place of good ones."""
        always = self._config.keep_every_steps
        for step in [step for step in complete_steps(self._directory) if step <= newest][: -self._config.keep]:
            if always is None or step % always:
                remove_step(step_directory(self._directory, step))


def step_directory(directory: str, step: int) -> str:
    """Of this step's checkpoint."""
    return storage.join(directory, f"step_{step:08d}")


def complete_steps(directory: str) -> list[int]:
    """Steps with a marker, oldest first."""
    return [step for step, complete in _steps(directory).items() if complete]


def remove_incomplete(directory: str) -> None:
    """Remove what writes that did not come to their end have left."""
    for step, complete in _steps(directory).items():
        if not complete:
            logger.info("checkpoint: step %d was not written to its end and is removed", step)
            storage.remove(step_directory(directory, step))


def remove_after(directory: str, step: int) -> None:
    """Remove later steps: of a course that a run has left."""
    for later in complete_steps(directory):
        if later > step:
            remove_step(step_directory(directory, later))


def checkpoints_at(path: str, before: int | None = None) -> Iterator[StoredIndex]:
    """The checkpoints of a directory of them, newest first, or the one that ``path`` is. Damaged ones are told.

    ``before``: only of steps before this one.

    Raises:
        UserError: there are some, and none of them can be read.
    """
    steps = [step for step in complete_steps(path) if before is None or step < before]
    places = [step_directory(path, step) for step in reversed(steps)]
    if not steps and storage.exists(storage.join(path, MARKER_FILE)):
        places = [path]
    for place in places:
        try:
            yield StoredIndex(place)
        except DamagedError as error:
            tell_damaged(error)
    if places:
        raise UserError(f"{path}: none of its checkpoints can be read; restore one, or remove them to begin anew")


def tell_damaged(error: DamagedError) -> None:
    """A line in the log."""
    logger.warning("checkpoint: %s; trying the one before", error)


def _steps(directory: str) -> dict[int, bool]:
    """Whether each step is complete, oldest first."""
    steps = [int(match[1]) for name in storage.list_names(directory) if (match := re.fullmatch(r"step_(\d+)", name))]
    return {step: MARKER_FILE in storage.list_names(step_directory(directory, step)) for step in sorted(steps)}


def _by_name(tree: Tree) -> dict[str, Parts]:
    """Leaves of nested dicts by their path."""
    return {_name(path): parts for path, parts in tree_flatten_with_path(tree)[0]}


def _name(path: Any) -> str:
    return "/".join(str(entry.key) for entry in path)
