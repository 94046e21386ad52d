"""Trackers of a run: TensorBoard's event files in ``RUN/tensorboard``, and Weights & Biases where its key is set.

They are shown the lines of ``metrics.jsonl``, which stays the first truth, pictures, and once the recipe. What fails in
a tracker is told once, and training goes on. The classes are accelerate's, without its ``Accelerator`` and the state
that it keeps: that would take torch_xla's devices, or start a process group.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rae_xla import storage
from rae_xla.config import flattened
from rae_xla.errors import UserError, first_line

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "wandb"]
EVENTS = "tensorboard"
WANDB_FILE = "wandb.json"
# Of an event file in a bucket, which is written whole each time: pictures of weeks are not to be sent again and again.
_LARGEST_OBJECT_BYTES = 4 * 2**20
# As W&B reads WANDB_MODE: nobody has to be known.
_MODES_WITHOUT_KEY = ("offline", "disabled")


def chosen_trackers(named: Sequence[TrackerName]) -> tuple[TrackerName, ...]:
    """The trackers that a recipe names; and W&B, if it names any and ``WANDB_API_KEY`` is set and it is installed.

    Raises:
        UserError: one that it names is not installed, or is W&B and would ask who it is for.
    """
    for name in named:
        if not _is_installed(name):
            raise UserError(
                f"log.trackers: {name} is not installed; pip install {name}, or leave it out (log.trackers=[] for none)"
            )
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    if "wandb" in named and not has_key and os.environ.get("WANDB_MODE") not in _MODES_WITHOUT_KEY:
        raise UserError("log.trackers: wandb has no key; set WANDB_API_KEY, or WANDB_MODE=offline, or leave it out")
    adds_wandb = named and "wandb" not in named and has_key and _is_installed("wandb")
    return (*named, "wandb") if adds_wandb else tuple(named)


def _is_installed(package: str) -> bool:
    # Not whether it can be found: W&B leaves folders of its name, and a folder can be imported.
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


class Trackers:
    """Trackers of a run that goes on after step ``start``; none on other hosts than the first.

    ``directory``: the run's. ``recipe``: with every default spelled out.
    """

    def __init__(self, names: Sequence[TrackerName], directory: str, recipe: Mapping[str, Any], start: int) -> None:
        self._told: set[TrackerName] = set()
        self._trackers: dict[TrackerName, _Tracker] = {}
        for name in names:
            with self._going_on(name):
                self._trackers[name] = _KINDS[name](directory, recipe, start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step. W&B ignores a step before the last it was shown, so `MetricsLog.flush` comes first."""
        for name, tracker in self._trackers.items():
            with self._going_on(name):
                tracker.log(step, values)

    def log_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Pictures by name, uint8 [n, H, W, 3] or one [H, W, 3]; steps as for `log`."""
        batches = {name: _as_batch(value) for name, value in images.items()}
        for name, tracker in self._trackers.items():
            with self._going_on(name):
                tracker.log_images(step, batches)

    def write(self) -> None:
        """See that what was logged is where the run is."""
        for name, tracker in self._trackers.items():
            with self._going_on(name):
                tracker.write()

    def close(self) -> None:
        """Write, and end."""
        for name, tracker in self._trackers.items():
            with self._going_on(name):
                tracker.close()
        self._trackers = {}

    @contextmanager
    def _going_on(self, name: TrackerName) -> Iterator[None]:
        try:
            yield
        # What trackers and the networks below them raise has no common base, and training is worth more.
        except Exception as error:
            if name not in self._told:
                self._told.add(name)
                logger.warning("%s does not get all that it should (%s); training goes on", name, first_line(error))


class _Tracker:
    """One of accelerate's trackers."""

    image_options: ClassVar[dict[str, Any]] = {}
    _tracker: Any

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Trackers`."""
        self._tracker.log(dict(values), step=step)

    def log_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures [n, H, W, 3]."""
        self._tracker.log_images(dict(images), step=step, **self.image_options)

    def write(self) -> None:
        """See `Trackers`."""

    def close(self) -> None:
        """See `Trackers`."""
        self._tracker.finish()


class _TensorBoard(_Tracker):
    """A new event file for each start of a run; TensorBoard leaves out what those before it have of later steps."""

    image_options: ClassVar[dict[str, Any]] = {"dataformats": "NHWC"}

    def __init__(self, directory: str, recipe: Mapping[str, Any], start: int) -> None:
        self._target = storage.join(directory, EVENTS)
        is_first = not storage.list_names(self._target)
        # TensorBoard appends to its files, which an object store cannot.
        self._local = tempfile.TemporaryDirectory() if "://" in directory else None
        self._num_uploaded = 0
        parent = directory if self._local is None else self._local.name
        self._tracker = _accelerate_tracking().TensorBoardTracker(EVENTS, parent, purge_step=start + 1)
        # That only one process writes is settled, and asking accelerate would make its state.
        self._tracker.main_process_only = False
        self._tracker.start()
        if is_first:
            self._log_recipe(recipe)

    def _log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """As hyperparameters of the run; accelerate would make two runs more of them, named by the time."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(_as_hyperparameters(recipe), {}):
            self._tracker.tracker.file_writer.add_summary(summary)

    def write(self) -> None:
        """See `Trackers`; replaces the object in a bucket."""
        self._tracker.tracker.flush()
        if self._local is not None:
            self._upload(Path(self._local.name) / EVENTS)

    def _upload(self, folder: Path) -> None:
        for file in folder.iterdir():
            content = file.read_bytes()
            if len(content) != self._num_uploaded:
                storage.write_bytes(storage.join(self._target, file.name), content)
                self._num_uploaded = len(content)
            if len(content) > _LARGEST_OBJECT_BYTES:
                # The next event begins another.
                self._tracker.tracker.close()
                file.unlink()
                self._num_uploaded = 0

    def close(self) -> None:
        """See `Trackers`."""
        self.write()
        super().close()
        if self._local is not None:
            self._local.cleanup()


class _WeightsAndBiases(_Tracker):
    """A run of W&B, by an id that is kept in the run directory, so that a run that goes on is the same one there.

    Steps that it was shown before an interruption stay as they were: it ignores them when they come again.
    """

    def __init__(self, directory: str, recipe: Mapping[str, Any], start: int) -> None:
        path = storage.join(directory, WANDB_FILE)
        # A run that begins anew has nothing in common with what was there.
        if not start or not storage.exists(path):
            storage.write_json(path, {"id": uuid.uuid4().hex})
        self._tracker = _accelerate_tracking().WandBTracker(
            os.environ.get("WANDB_PROJECT", "rae_xla"),
            id=storage.read_json(path)["id"],
            name=posixpath.basename(directory.rstrip("/")),
            resume="allow",
            dir=None if "://" in directory else directory,
        )
        self._tracker.start()
        self._tracker.store_init_configuration(_as_hyperparameters(recipe))


_KINDS: dict[TrackerName, type[_TensorBoard] | type[_WeightsAndBiases]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


def _as_batch(images: Any) -> np.ndarray:
    batch = np.asarray(images)
    batch = batch[None] if batch.ndim == 3 else batch
    assert batch.dtype == np.uint8 and batch.ndim == 4 and batch.shape[-1] == 3, (batch.dtype, batch.shape)
    return batch


def _as_hyperparameters(recipe: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Keys with dots, as on the command line; what is no number, text or truth value is JSON."""
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in flattened(recipe)
    }


def _accelerate_tracking() -> Any:
    """accelerate's module of trackers, not asking for torch_xla.

    At its import accelerate imports torch_xla, which takes seconds and names a device, unless it is told not to.
    """
    switch = "USE_TORCH_XLA"
    before = os.environ.get(switch)
    os.environ[switch] = "0"
    try:
        from accelerate import tracking
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
    # Its own refuses to log before accelerate's state is made.
    tracking.logger = logging.getLogger(tracking.__name__)
    return tracking
