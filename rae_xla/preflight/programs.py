"""The compiled programs of a recipe, by name, each run by the code that its tool runs, without weights.

A program is started on a runtime whose steps do not run, but raise what is wanted of them: `TracedProgram` by
``tracing``, `CountedProgram` by ``counting``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from rae_xla.data.loader import blank_batch
from rae_xla.data.sources import ImageSet, ShardedImages, num_classes_of, open_images, open_source
from rae_xla.evaluation.features import load_extractor
from rae_xla.evaluation.generation import Sampler
from rae_xla.evaluation.latent_stats import Progress, statistics_so_far
from rae_xla.evaluation.measured import Measuring
from rae_xla.evaluation.reconstruction import reconstruct
from rae_xla.evaluation.stored_images import ImagesInMemory
from rae_xla.hosts import Hosts
from rae_xla.models.loading import without_values
from rae_xla.recipe import (
    AutoencoderRecipe,
    CommonRecipe,
    DiffusionRecipe,
    EvaluationRecipe,
    LatentStatsRecipe,
    ReconstructionRecipe,
    SamplingRecipe,
    TrainingRecipe,
)
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import CountedProgram, Runtime, TracedProgram, create
from rae_xla.sharding import MeshConfig
from rae_xla.training.adversarial import PhaseName
from rae_xla.training.autoencoder import decoder_phases
from rae_xla.training.optimizer import total_steps
from rae_xla.training.tasks import task_of

P = TypeVar("P", TracedProgram, CountedProgram)
RECONSTRUCTED_PER_DEVICE = 8
# Of images that scores are of, where the recipe has no data.
SCORED_IMAGE_SIZE = 256


def programs_of(recipe: CommonRecipe) -> dict[str, Callable[[Runtime], Any]]:
    """How each program of the recipe is started."""
    programs: dict[str, Callable[[Runtime], Any]] = {}
    if isinstance(recipe, TrainingRecipe):
        programs |= {name: partial(_train, recipe, phase) for name, phase in phases_of_training(recipe).items()}
    if isinstance(recipe, DiffusionRecipe | SamplingRecipe):
        programs["sample"] = lambda runtime: _sample(recipe, runtime)
    if isinstance(recipe, LatentStatsRecipe):
        programs["latent_stats"] = lambda runtime: _latent_stats(recipe, runtime)
    if isinstance(recipe, ReconstructionRecipe):
        programs["reconstruct"] = lambda runtime: _reconstruct(recipe, runtime)
    if isinstance(recipe, EvaluationRecipe):
        programs["features"] = lambda runtime: _features(recipe, runtime)
    return programs


def phases_of_training(recipe: CommonRecipe) -> dict[str, PhaseName | None]:
    """Names of a training's programs, and which of its phases each is, if it has several."""
    if isinstance(recipe, AutoencoderRecipe) and recipe.adversarial is not None:
        return {f"train_{phase.name}": phase.name for phase in decoder_phases(recipe, _images_of(recipe))}
    return {"train": None} if isinstance(recipe, TrainingRecipe) else {}


def num_steps_of(recipe: TrainingRecipe, program: str) -> int:
    """Of a training's program in the recipe's whole run."""
    images = _images_of(recipe)
    num_steps = total_steps(recipe.train, len(images) / recipe.data.batch_size)
    if not isinstance(recipe, AutoencoderRecipe):
        return num_steps
    begins = decoder_phases(recipe, images)
    ends = [*[phase.after for phase in begins[1:]], num_steps]
    wanted = phases_of_training(recipe)[program]
    return next(end - phase.after for phase, end in zip(begins, ends, strict=True) if wanted in (None, phase.name))


def _images_of(recipe: TrainingRecipe) -> ImageSet | ShardedImages:
    return open_source(recipe.data, recipe.root, "train")


def traced(recipe: CommonRecipe, program: str, grid: Sequence[int]) -> TracedProgram:
    """What a slice would compile that has so many chips along each of its axes.

    Raises:
        UserError: the recipe does not fit the devices.
    """
    runtime = create("tracing", recipe.mesh, recipe.precision, grid)
    return raised(TracedProgram, lambda: _start(recipe, program, runtime))


def flops_per_image(recipe: CommonRecipe, program: str) -> float:
    """Of the matrix products and convolutions that the model itself has, two a multiply-add, nothing computed twice."""
    if isinstance(recipe, TrainingRecipe):
        recipe = recipe.model_copy(update={"compute": ComputeConfig()})
    runtime = create("counting", MeshConfig(), recipe.precision)
    found = raised(CountedProgram, lambda: _start(recipe, program, runtime))
    return found.flops / found.num_images


def raised(kind: type[P], start: Callable[[], None]) -> P:
    """What the first step raises that ``start`` comes to."""
    try:
        start()
    except kind as found:
        return found
    raise AssertionError("no step was called")


def _start(recipe: CommonRecipe, program: str, runtime: Runtime) -> None:
    with without_values():
        programs_of(recipe)[program](runtime)


def _train(recipe: TrainingRecipe, name: PhaseName | None, runtime: Runtime) -> None:
    task = task_of(recipe, runtime)
    phase = next(phase for phase in task.phases if name is None or phase.name == f"decoder_{name}")
    state, frozen = runtime.place_state(phase.touched(task.state)), runtime.place_frozen(task.frozen)
    batch = runtime.place_batch(blank_batch(task.images, recipe.data))
    runtime.compile(phase.update, phase.name or task.name)(state, frozen, batch)


def _sample(recipe: DiffusionRecipe | SamplingRecipe, runtime: Runtime) -> None:
    labels = np.zeros(recipe.sampler.batch_size, dtype=np.int64)
    Sampler(recipe, runtime).sample(labels, recipe.seed)


def _latent_stats(recipe: LatentStatsRecipe, runtime: Runtime) -> None:
    images = open_images(recipe.data, recipe.root, "train")
    next(statistics_so_far(recipe, images, runtime, Progress.none(recipe.autoencoder.encoder.latent_shape)))


def _reconstruct(recipe: ReconstructionRecipe, runtime: Runtime) -> None:
    size = recipe.autoencoder.image_size
    images = np.zeros((RECONSTRUCTED_PER_DEVICE * runtime.num_devices, size, size, 3), dtype=np.uint8)
    reconstruct(recipe.autoencoder, recipe.root, images, len(images), runtime)


def _features(recipe: EvaluationRecipe, runtime: Runtime) -> None:
    size = SCORED_IMAGE_SIZE if recipe.data is None else recipe.data.image_size
    num_classes = None if recipe.data is None else num_classes_of(recipe.data, recipe.root)
    extractor = load_extractor(recipe.features, size, num_classes, recipe.root, "features.weights")
    images = np.zeros((recipe.batch_size, size, size, 3), dtype=np.uint8)
    measuring = Measuring(extractor, size, recipe.batch_size, runtime, Hosts(runtime))
    measuring.images(ImagesInMemory("blank images", images), "features", "features")
