"""The training loop, the same for every task: resume, step, log, checkpoint, export."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rae_xla import __version__, storage
from rae_xla.data.loader import training_batches
from rae_xla.data.prefetch import Prefetched
from rae_xla.data.sources import ImageSet, ShardedImages
from rae_xla.errors import SourceError, StoppedError, first_line
from rae_xla.models.functional import Tensors, by_module_names
from rae_xla.recipe import TrainingRecipe
from rae_xla.runtime import Runtime
from rae_xla.training import checkpoint
from rae_xla.training.metrics import MetricsLog
from rae_xla.training.profile import StepProfiler
from rae_xla.training.same_run import begin_run, check_same_run, described
from rae_xla.training.update import packed_state, state_by_names

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"


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
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    export: Callable[[Tensors], Tensors]
    """From the averaged weights by their names in the module, on the host, to what the file of weights holds."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Files that decide the result besides the recipe: recipe key to path."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the exported weights' file says of the model, besides task and step."""


def run_training(task: TrainingTask, recipe: TrainingRecipe, runtime: Runtime) -> dict[str, Any]:
    """Train to the end, from the newest complete checkpoint if there is one. Returns the report of the run."""
    started = time.perf_counter()
    run_dir = recipe.path(recipe.run_dir)
    directory = storage.join(run_dir, "checkpoints")
    done = checkpoint.complete_steps(directory)
    sources = {"data.source": task.images.path} if isinstance(task.images, ShardedImages) else {}
    start, state, inputs = 0, task.state, described({**task.inputs, **sources})
    if done:
        check_same_run(recipe, inputs, run_dir)
        start = done[-1]
        state = packed_state(checkpoint.load(directory, start, state_by_names(task.module, task.state)))
        if start >= task.num_steps and storage.exists(storage.join(run_dir, REPORT_FILE)):
            logger.info("%s: already trained to step %d in %s", task.name, start, run_dir)
            return storage.read_json(storage.join(run_dir, REPORT_FILE))
        logger.info("%s: resuming from step %d", task.name, start)
    # Before anything is written: a sharding rule may not fit.
    state, frozen = runtime.place_state(state), runtime.place_frozen(task.frozen)
    logger.info("%s: %s", task.name, ", ".join(f"{key} {value}" for key, value in runtime.describe().items()))
    if runtime.process_index == 0:
        begin_run(recipe, inputs, run_dir)
    update = runtime.compile(task.update, task.name)
    batches = training_batches(task.images, recipe.data, recipe.seed, runtime.process_index, runtime.num_processes)
    log = MetricsLog(
        storage.join(run_dir, "metrics.jsonl"),
        runtime,
        name=task.name,
        start=start,
        num_steps=task.num_steps,
        batch_size=recipe.data.batch_size,
        every_steps=recipe.log.every_steps,
    )
    profiler = StepProfiler(recipe.profile, run_dir, runtime)

    saved = start

    def save(step: int) -> None:
        nonlocal saved
        log.flush()
        with log.timed("checkpoint"):
            on_host = state_by_names(task.module, runtime.to_host(state))
            if runtime.process_index == 0:
                checkpoint.save(directory, step, on_host, recipe.checkpoint.keep)
        saved = step

    def stopped(error: SourceError, step: int) -> StoppedError:
        try:
            if step > saved:
                save(step)
        # The bucket that images come from may be the one that checkpoints go to.
        except Exception as failure:
            return StoppedError(f"{error}; step {step} could not be saved ({first_line(failure)}), step {saved} is")
        where = f"saved at step {saved}" if saved else "nothing was trained yet"
        return StoppedError(f"{error}; {where}, the same command goes on from there")

    with Prefetched(batches.from_step(start), runtime.place_batch) as arriving:
        for step in range(start + 1, task.num_steps + 1):
            profiler.before(step)
            try:
                with log.timed("input"):
                    batch, counts = next(arriving)
            except SourceError as error:
                raise stopped(error, step - 1) from error
            with log.timed("host"):
                state, metrics = update(state, frozen, batch)
            log.count(counts)
            log.add(step, metrics, update.wait_seconds)
            profiler.after(step)
            if step % recipe.checkpoint.every_steps == 0 or step == task.num_steps:
                save(step)
    profiler.close(task.num_steps)
    log.close()

    weights = task.export(by_module_names(task.module, runtime.to_host(state["ema"])))
    report = {
        "task": recipe.task,
        "name": task.name,
        "steps": task.num_steps,
        "images": task.num_steps * recipe.data.batch_size,
        "last": log.last,
        "parameters": sum(value.numel() for value in state["parameters"].values()),
        "compile_seconds": update.compile_seconds,
        "resumed_from_step": start,
        "seconds": round(time.perf_counter() - started, 2),
        "runtime": runtime.describe(),
    }
    if runtime.process_index == 0:
        about = {"task": task.name, "step": task.num_steps, "kind": "ema", "version": __version__, **task.about}
        storage.write_tensors(recipe.path(recipe.weights_file), weights, about)
        storage.write_json(storage.join(run_dir, REPORT_FILE), report)
    return report
