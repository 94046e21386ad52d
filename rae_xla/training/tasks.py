"""From a recipe to a finished run: the one place that knows which task trains what."""

from __future__ import annotations

from typing import Any

from rae_xla.models.loading import without_values
from rae_xla.recipe import (
    AutoencoderRecipe,
    ClassifierRecipe,
    DiffusionRecipe,
    LinearProbeRecipe,
    TrainingRecipe,
)
from rae_xla.runtime import Runtime, check_batch_size
from rae_xla.sharding import explained
from rae_xla.training.autoencoder import autoencoder_task
from rae_xla.training.classifier import classifier_task
from rae_xla.training.diffusion import diffusion_task
from rae_xla.training.linear_probe import linear_probe_task
from rae_xla.training.loop import TrainingTask, run_training
from rae_xla.training.update import check_microbatches

TRAINING_TASKS = ("classifier", "autoencoder", "diffusion", "linear_probe")


def train(recipe: TrainingRecipe, runtime: Runtime) -> dict[str, Any]:
    """Run a training recipe to its end and return its report; what it reads is checked before anything is written."""
    return run_training(task_of(recipe, runtime), recipe, runtime)


def explain_mesh(recipe: TrainingRecipe, runtime: Runtime) -> str:
    """How the state and what is frozen would lie on the devices, as a table; nothing is written.

    Raises:
        UserError: a sharding rule does not fit.
    """
    with without_values():
        task = task_of(recipe, runtime)
    runtime.sharding.check_rules(task.state["parameters"])
    return explained(runtime.sharding, task.state, task.frozen)


def task_of(recipe: TrainingRecipe, runtime: Runtime) -> TrainingTask:
    """What the recipe trains, checked against the devices."""
    check_batch_size(recipe.data.batch_size, runtime, "data.batch_size")
    check_microbatches(recipe, runtime)
    if isinstance(recipe, ClassifierRecipe):
        return classifier_task(recipe, runtime)
    if isinstance(recipe, AutoencoderRecipe):
        return autoencoder_task(recipe, runtime)
    if isinstance(recipe, LinearProbeRecipe):
        return linear_probe_task(recipe, runtime)
    assert isinstance(recipe, DiffusionRecipe), type(recipe)
    return diffusion_task(recipe, runtime)
