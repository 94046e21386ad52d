"""The training loop, the same for every task: resume, step, log, checkpoint, export."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from rae_xla import __version__, storage
from rae_xla.data.loader import training_batches
from rae_xla.data.prefetch import Prefetched
from rae_xla.data.sources import ImageSet, ShardedImages
from rae_xla.errors import PreemptedError, SourceError, StoppedError, UserError, first_line
from rae_xla.evaluation.files import write_png
from rae_xla.recipe import TrainingRecipe, save_recipe
from rae_xla.runtime import Runtime
from rae_xla.training import checkpoint
from rae_xla.training.checkpoint import CHECKPOINTS, Checkpoints, Progress
from rae_xla.training.diagnosis import first_not_finite
from rae_xla.training.export import described_weights, export_weights
from rae_xla.training.looks import Look
from rae_xla.training.metrics import MetricsLog
from rae_xla.training.phases import Phase, Programs
from rae_xla.training.profile import StepProfiler
from rae_xla.training.recovery import Agreement, BadSteps, Interruption, Watchdog
from rae_xla.training.same_run import check_same_run, described
from rae_xla.training.stored_index import DamagedError, StoredIndex
from rae_xla.training.trackers import Trackers, chosen_trackers

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES = "samples"


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What a task gives the loop; tensors are on the host."""

    name: str
    images: ImageSet | ShardedImages
    num_steps: int
    module: nn.Module
    """The architecture of what is trained."""
    state: dict[str, Any]
    frozen: dict[str, Any]
    phases: tuple[Phase, ...]
    """In order; the first begins with the run."""
    looks: tuple[Look, ...] = ()
    """What the run is looked at by while it trains."""
    export: Callable[[Any], dict[str, Any]]
    """From averaged weights by their names in the module to what the file of weights holds; it reads no values."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Files that decide the result besides the recipe: recipe key to path."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the exported weights' file says of the model, besides task and step."""


def run_training(task: TrainingTask, recipe: TrainingRecipe, runtime: Runtime) -> dict[str, Any]:
    """Train to the end, from the newest complete checkpoint if there is one. Returns the report of the run.

    Raises:
        UserError: a checkpoint is of another run; nothing was written.
        StoppedError: images do not come, checkpoints cannot be written, or updates are not finite whatever is tried;
            what could be saved is.
        PreemptedError: the machine goes away, and all is saved.
    """
    started = time.perf_counter()
    run = _Run(task, recipe, runtime)
    report_path = storage.join(run.directory, REPORT_FILE)
    finished = run.finished_checkpoint()
    if finished is not None and storage.exists(report_path):
        step = finished.about["progress"]["step"]
        logger.info("%s: already trained to step %d in %s", task.name, step, run.directory)
        weights = recipe.path(recipe.weights_file)
        if runtime.process_index == 0 and not storage.exists(weights):
            export_weights(finished, "ema", weights)
            logger.info("%s: averaged weights of step %d are in %s again", task.name, step, weights)
        return dict(storage.read_json(report_path))
    begun_at = run.train()
    report = {
        "task": recipe.task,
        "name": task.name,
        "steps": task.num_steps,
        "images": task.num_steps * recipe.data.batch_size,
        "last": run.last_metrics,
        "parameters": sum(value.numel() for value in task.state["parameters"].values()),
        "compile_seconds": run.programs.compile_seconds,
        "resumed_from_step": begun_at,
        "rollbacks": run.progress.rollbacks,
        "seconds": round(time.perf_counter() - started, 2),
        "runtime": runtime.describe(),
    }
    if runtime.process_index == 0:
        path = recipe.path(recipe.weights_file)
        export_weights(run.newest_checkpoint(), "ema", path)
        storage.write_json(report_path, report)
        logger.info("%s: averaged weights of step %d are in %s", task.name, task.num_steps, path)
    return report


class _Run:
    """A training under way: its state on the devices, and how far it is."""

    def __init__(self, task: TrainingTask, recipe: TrainingRecipe, runtime: Runtime) -> None:
        self._task, self._recipe, self._runtime = task, recipe, runtime
        self.directory = recipe.path(recipe.run_dir)
        self._trackers = chosen_trackers(recipe.log.trackers)
        self._checkpoints_directory = storage.join(self.directory, CHECKPOINTS)
        sources = {"data.source": task.images.path} if isinstance(task.images, ShardedImages) else {}
        self._inputs = described({**task.inputs, **sources})
        self.programs = Programs(task.phases, task.name, runtime)
        self._agreement = Agreement(runtime)
        self._changes: list[tuple[str, Any, Any]] = []
        self._is_prepared = False
        self.progress = Progress(0)
        self.last_metrics: dict[str, float] = {}

    def finished_checkpoint(self) -> StoredIndex | None:
        """The newest checkpoint, if it is of the last step or later. Raises a `UserError` if it is of another run."""
        newest = next(self._found(), None)
        is_last = newest is not None and newest.about["progress"]["step"] >= self._task.num_steps
        return newest if is_last else None

    def newest_checkpoint(self) -> StoredIndex:
        """What was saved or restored last."""
        assert self._checkpoints.newest_directory is not None
        return StoredIndex(self._checkpoints.newest_directory)

    def _begin(self) -> None:
        """Put the state on the devices, as a checkpoint has it if there is one."""
        task, runtime = self._task, self._runtime
        # Before anything is written: a sharding rule may not fit.
        self._state, self._frozen = runtime.place_state(task.state), runtime.place_frozen(task.frozen)
        weights, constants = described_weights(task.module, task.state["parameters"], task.export)
        about = {
            "recipe": self._recipe.model_dump(mode="json"),
            "inputs": self._inputs,
            "model": {"task": task.name, "version": __version__, **task.about},
            "weights": weights,
        }
        self._checkpoints = Checkpoints(self._checkpoints_directory, self._recipe.checkpoint, runtime, about, constants)
        self._restore(self._found())
        if self.progress.step:
            logger.info("%s: resuming from step %d", task.name, self.progress.step)
            for key, before, now in self._changes:
                logger.info("%s: was %r, is %r from now on", key, before, now)
        logger.info("%s: %s", task.name, ", ".join(f"{key} {value}" for key, value in runtime.describe().items()))
        begins = ", ".join(f"{phase.name} from step {phase.begins_after + 1}" for phase in task.phases if phase.name)
        logger.info("%s: %d steps%s", task.name, task.num_steps, f": {begins}" if begins else "")
        if runtime.process_index == 0:
            checkpoint.remove_incomplete(self._checkpoints_directory)
            save_recipe(self._recipe, self.directory)

    def train(self) -> int:
        """Step to the end, from further back if it must be. Returns the step that it began at."""
        task, recipe, runtime = self._task, self._recipe, self._runtime
        batches = training_batches(task.images, recipe.data, recipe.seed, runtime.process_index, runtime.num_processes)
        profiler = StepProfiler(recipe.profile, self.directory, runtime)
        watchdog = Watchdog(recipe.recovery.hung_minutes)
        with ExitStack() as until_the_end:
            until_the_end.callback(lambda: profiler.close(self.progress.step))
            until_the_end.enter_context(watchdog)
            interruption = until_the_end.enter_context(Interruption())
            self._begin()
            begun_at = self.progress.step
            while True:
                first_batch = self.progress.step + self.progress.batches_passed_over
                with closing(self._metrics_log()) as log:
                    with Prefetched(batches.from_step(first_batch), runtime.place_batch) as arriving:
                        bad = self._steps(arriving, log, profiler, watchdog, interruption)
                    if bad is None:
                        self._checkpoints.wait()
                        break
                self._roll_back(*bad)
        self.last_metrics = log.last
        return begun_at

    def _steps(
        self,
        arriving: Prefetched,
        log: MetricsLog,
        profiler: StepProfiler,
        watchdog: Watchdog,
        interruption: Interruption,
    ) -> tuple[int, Any] | None:
        """Step until the last, or until too many updates in a row were not finite: where they began, and a batch."""
        recipe, num_steps = self._recipe, self._task.num_steps
        bad_steps = BadSteps(recipe.recovery.max_bad_steps, num_steps, self._runtime)
        is_due = False
        for step in range(self.progress.step + 1, num_steps + 1):
            profiler.before(step)
            try:
                with log.timed("input"):
                    batch, counts = next(arriving)
            except SourceError as error:
                stopped = self._stopped(error, log)
                # A signal to all of a job's processes ends those that read first.
                raise (stopped if interruption.reason is None else PreemptedError(str(stopped))) from error
            with log.timed("host"):
                if not self._is_prepared:
                    self._prepare(step, batch, watchdog)
                self._state, metrics = self.programs(step, self._state, self._frozen, batch)
            self.progress = replace(self.progress, step=step)
            log.count(counts)
            log.add(step, metrics, self.programs.wait_seconds)
            profiler.after(step)
            watchdog.step()
            began = bad_steps.row_began(step, metrics)
            if began is not None:
                return began, batch
            is_due |= step % recipe.checkpoint.every_steps == 0
            leaves = self._agreement.on(interruption.reason is not None)
            if is_due or leaves or step == num_steps:
                is_due = not self._save(log)
            for look in self._task.looks:
                if look.is_due(step) and not leaves:
                    self._look(look, log, interruption)
                    watchdog.step()
            if leaves and step < num_steps:
                self._checkpoints.wait()
                reason = interruption.reason or "another host goes away"
                raise PreemptedError(f"{reason}: {self._where_saved()}, the same command goes on from there")
        return None

    def _prepare(self, step: int, batch: Any, watchdog: Watchdog) -> None:
        """Compile all that is still to come, so that nothing fails for the first time after days."""
        self.programs.prepare(step, self._state, self._frozen, batch, watchdog.step)
        for look in self._task.looks:
            look.prepare(self._state, self._frozen)
            watchdog.step()
        self._is_prepared = True

    def _look(self, look: Look, log: MetricsLog, interruption: Interruption) -> None:
        alone, step = self._runtime.num_processes == 1, self.progress.step
        try:
            with log.timed("looks"):
                # Several hosts look together: none can leave the others to it.
                seen = look(step, self._state, self._frozen, lambda: alone and interruption.reason is not None)
        except SourceError as error:
            if not alone:
                raise self._stopped(error, log) from error
            logger.warning("%s: no scores of %s at step %d (%s)", self._task.name, look.title, step, error)
            return
        if seen is None:
            return
        if seen.values:
            log.add_seen(step, look.title, seen.values)
        if seen.pictures and self._runtime.process_index == 0:
            log.trackers.log_images(step, seen.pictures)
            for name, sheet in seen.pictures.items():
                path = storage.join(self.directory, SAMPLES, f"{name}_{step:08d}.png")
                try:
                    write_png(path, sheet)
                # As with metrics: training is worth more than its pictures.
                except Exception as error:
                    logger.warning("%s: %s is not written (%s)", self._task.name, path, first_line(error))

    def _save(self, log: MetricsLog) -> bool:
        """Save this step, unless it is one of bad ones, which a run may have to go back behind; not so the last."""
        with log.timed("checkpoint"):
            is_last = self.progress.step == self._task.num_steps
            if not is_last and int(self._runtime.to_host(self._state["skipped_in_row"])):
                return False
            self._checkpoints.save(self.progress, self._state)
        log.flush()
        return True

    def _restore(self, found: Iterator[StoredIndex]) -> bool:
        """Whether there was one."""
        for index in found:
            try:
                self._state, self.progress = self._checkpoints.restore(index, self._state)
            except DamagedError as error:
                checkpoint.tell_damaged(error)
            else:
                return True
        return False

    def _roll_back(self, began: int, batch: Any) -> None:
        reached, directory = self.progress, self._checkpoints_directory
        self._checkpoints.wait()
        if reached.rollbacks >= self._recipe.recovery.max_rollbacks or not self._restore(
            checkpoint.checkpoints_at(directory, before=began)
        ):
            raise self._not_finite(batch)
        if self._runtime.process_index == 0:
            checkpoint.remove_after(directory, self.progress.step)
        passed_over = reached.step + reached.batches_passed_over - self.progress.step
        self.progress = replace(self.progress, batches_passed_over=passed_over, rollbacks=reached.rollbacks + 1)
        logger.warning(
            "%s: updates from step %d on were not finite; from step %d back to step %d, and on with the batches after",
            self._task.name, began, reached.step, self.progress.step,
        )  # fmt: skip

    def _not_finite(self, batch: Any) -> StoppedError:
        phase = self.programs.at(self.progress.step)
        diagnosis = self._runtime.compile(phase.diagnosis, f"{self._task.name}_diagnosis")
        frozen = {**self._frozen, **phase.diagnosed(self._state)}
        first = first_not_finite(self._runtime.to_host(diagnosis({}, frozen, batch)[1]))
        found = (
            "all tensors of the last batch are finite" if first is None else f"the first tensor that is not: {first}"
        )
        return StoppedError(
            f"{self._recipe.recovery.max_bad_steps} updates or more in a row were not finite by step "
            f"{self.progress.step}, after {self.progress.rollbacks} rollbacks; {found}; {self._where_saved()}"
        )

    def _stopped(self, error: SourceError, log: MetricsLog) -> StoppedError:
        try:
            # Several hosts save together or not at all, and the others have their images.
            if self.progress.step > (self._checkpoints.newest or 0) and self._runtime.num_processes == 1:
                self._save(log)
            self._checkpoints.wait()
        # The bucket that images come from may be the one that checkpoints go to.
        except Exception as failure:
            return StoppedError(f"{error}; {first_line(failure)}")
        return StoppedError(f"{error}; {self._where_saved()}, the same command goes on from there")

    def _where_saved(self) -> str:
        newest = self._checkpoints.newest
        return "nothing was saved yet" if newest is None else f"saved at step {newest}"

    def _found(self) -> Iterator[StoredIndex]:
        """Checkpoints to go on from, newest first, of the run that the recipe describes."""
        found = checkpoint.checkpoints_at(self._checkpoints_directory)
        first, resume = next(found, None), self._recipe.resume
        if first is None and resume.from_ is not None:
            path = self._recipe.path(resume.from_)
            inside = storage.join(path, CHECKPOINTS)
            found = checkpoint.checkpoints_at(inside if storage.exists(inside) else path)
            first = next(found, None)
            if first is None:
                raise UserError(
                    f"resume.from: {path} has no complete checkpoint; give a run directory or one of its steps"
                )
        for index in () if first is None else chain((first,), found):
            self._changes = check_same_run(self._recipe, self._inputs, index.about, index.directory)
            yield index

    def _metrics_log(self) -> MetricsLog:
        names = self._trackers if self._runtime.process_index == 0 else ()
        return MetricsLog(
            storage.join(self.directory, METRICS_FILE),
            self._runtime,
            Trackers(names, self.directory, self._recipe.model_dump(mode="json"), self.progress.step),
            name=self._task.name,
            start=self.progress.step,
            num_steps=self._task.num_steps,
            batch_size=self._recipe.data.batch_size,
            every_steps=self._recipe.log.every_steps,
        )
