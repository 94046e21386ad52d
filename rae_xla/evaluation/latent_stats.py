"""Exact mean and variance of the encoder's features at every position, over a whole split.

The released script keeps a running value with momentum 0.1, which forgets all but its last tens of batches. Here every
image counts once. The devices reduce each batch to its moments, so that what leaves them does not grow with the batch;
the host merges those in float64 (Chan, Golub and LeVeque, 1979). The answer depends neither on the batch size nor on
the number of devices. A pass that was killed goes on where it was.

B batch, C channels, h = w = grid of the latent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla import storage, tensor_files
from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import ImageSet, ShardedImages, open_images
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import check_one_host, num_rows_of, run_batches
from rae_xla.models.autoencoder import load_latent_encoder, made_with
from rae_xla.models.functional import call, tensors_of
from rae_xla.recipe import LatentStatsRecipe, save_recipe
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

STATS_FILE = "latent_stats.safetensors"
REPORT_FILE = "report.json"
# Only while a pass is under way.
PROGRESS_FILE = "latent_stats_progress.safetensors"
# What a kill may cost; a save is some megabytes.
SECONDS_BETWEEN_SAVES = 30.0


def exact_mean(values: Tensor, is_real: Tensor) -> Tensor:
    """Mean of the real rows of float32 [B, ...], as two float32 numbers to be added in float64: [2, ...].

    A float32 sum of many rows loses digits, more of them the further the rows are from zero. The second number is the
    mean of what the first leaves: a sum around zero, which keeps them. ``is_real``: bool [B].
    """
    real = is_real.to(values.dtype)
    of_rows = real.view(-1, *[1] * (values.ndim - 1))
    first = (values * of_rows).sum(dim=0) / real.sum()
    rest = ((values - first) * of_rows).sum(dim=0) / real.sum()
    return torch.stack([first, rest])


def reduce_batch(features: Tensor, is_real: Tensor) -> dict[str, Tensor]:
    """On the device, what `Moments.of_batch` takes: float32 [B, C, h, w] and bool [B] -> float32 [2, C, h, w] each.

    ``mean``, and ``square``: the mean square of what the features differ by from its first number.
    """
    mean = exact_mean(features, is_real)
    return {"mean": mean, "square": exact_mean((features - mean[0]).square(), is_real)}


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations; float64 [C, h, w]."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @staticmethod
    def of_batch(count: int, reduced: Mapping[str, np.ndarray]) -> Moments:
        """Of a batch with so many real rows, from what `reduce_batch` found."""
        first, rest = reduced["mean"].astype(np.float64)
        square = reduced["square"].astype(np.float64).sum(axis=0)
        # Features that are all the same may come out below zero by a last digit.
        return Moments(count, first + rest, np.maximum(square - np.square(rest), 0.0) * count)

    def merge(self, other: Moments) -> Moments:
        """Of both sets of rows together."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        squares = self.squares + other.squares + np.square(difference) * (self.count * other.count / count)
        return Moments(count, mean, squares)


@dataclass(frozen=True)
class Progress:
    """``moments`` of a source's images before number ``position``, but those that cannot be decoded."""

    position: int
    moments: Moments

    @staticmethod
    def none(latent_shape: tuple[int, int, int]) -> Progress:
        """Of no image yet."""
        return Progress(0, Moments(0, np.zeros(latent_shape), np.zeros(latent_shape)))


def statistics_so_far(
    recipe: LatentStatsRecipe, images: ImageSet | ShardedImages, runtime: Runtime, progress: Progress
) -> Iterator[Progress]:
    """How far the pass over ``images`` is after each batch, from ``progress`` on.

    Raises:
        UserError: the encoder's weights are missing or do not fit.
    """
    check_one_host(runtime, "latent statistics")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)

    def reduced(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = call(encoder, frozen, runtime, to_unit(batch["images"]))
        return reduce_batch(features, batch["is_real"])

    rows, num_left = images_in_order(images, recipe.data, progress.position), len(images) - progress.position
    name, batch_size = "latent statistics", recipe.data.batch_size
    for part, found in run_batches(reduced, tensors_of(encoder), rows, num_left, batch_size, runtime, name):
        moments = progress.moments.merge(Moments.of_batch(num_rows_of(part), found))
        progress = Progress(int(part["positions"][-1]) + 1, moments)
        yield progress


def write_latent_stats(recipe: LatentStatsRecipe, runtime: Runtime) -> dict[str, Any]:
    """``latent_stats.safetensors`` of the run directory: ``mean`` and ``variance`` (over n), float32 [C, h, w].

    Goes on with a pass that was killed, in batches of any size, and leaves alone what is there. Returns what was found.

    Raises:
        UserError: the encoder's weights are missing or do not fit; what is there already is of another pass.
    """
    run_dir, latent_shape = recipe.path(recipe.run_dir), recipe.autoencoder.encoder.latent_shape
    names = STATS_FILE, PROGRESS_FILE, REPORT_FILE
    path, progress_path, report_path = [storage.join(run_dir, name) for name in names]
    images = open_images(recipe.data, recipe.root, "train")
    decided_by = _decided_by(recipe, images)
    begun = Progress.none(latent_shape)
    if storage.exists(path) and storage.exists(report_path):
        _check_same_pass(path, decided_by)
        logger.info("latent statistics: %s is there already", path)
        return dict(storage.read_json(report_path))
    if storage.exists(progress_path):
        begun = read_progress(progress_path, decided_by)
        logger.info("latent statistics: goes on after %d of %d images", begun.position, len(images))
    progress, saved = begun, time.monotonic()
    for progress in statistics_so_far(recipe, images, runtime, begun):
        if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
            write_progress(progress_path, progress, decided_by)
            saved = time.monotonic()
    moments = progress.moments
    stats = {"mean": moments.mean, "variance": moments.squares / moments.count}
    report = {
        "task": "latent_stats",
        "path": path,
        "num_images": moments.count,
        "shape": list(latent_shape),
        "average_mean": float(stats["mean"].mean()),
        "average_variance": float(stats["variance"].mean()),
        "runtime": runtime.describe(),
    }
    save_recipe(recipe, run_dir)
    found = {name: torch.from_numpy(values).float() for name, values in stats.items()}
    tensor_files.write_tensors(path, found, {"decided_by": decided_by})
    storage.write_json(report_path, report)
    if storage.exists(progress_path):
        storage.remove(progress_path)
    return report


def write_progress(path: str, progress: Progress, decided_by: Mapping[str, Any]) -> None:
    """A file of how far a pass is; with what decides its result, see `read_progress`."""
    moments = progress.moments
    tensors = {"mean": torch.from_numpy(moments.mean), "squares": torch.from_numpy(moments.squares)}
    about = {"position": progress.position, "count": moments.count, "decided_by": dict(decided_by)}
    tensor_files.write_tensors(path, tensors, about)


def read_progress(path: str, decided_by: Mapping[str, Any]) -> Progress:
    """What `write_progress` wrote.

    Raises:
        UserError: the file cannot be read, or its pass was over other images or with another encoder; names all keys.
    """
    tensors = tensor_files.read_tensors(path, "run_dir")
    about = _check_same_pass(path, decided_by)
    moments = Moments(about["count"], tensors["mean"].numpy(), tensors["squares"].numpy())
    return Progress(about["position"], moments)


def _check_same_pass(path: str, decided_by: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of itself; raises a `UserError` if it is not of a pass that is decided by the same."""
    about = tensor_files.read_about(path)
    before = about.get("decided_by", {})
    changed = [key for key in sorted({*before, *decided_by}) if before.get(key) != decided_by.get(key)]
    if changed:
        raise UserError(
            f"{path}: the pass that it is of had another {', '.join(changed)}; remove it to begin anew, or give the "
            "run another run_dir"
        )
    return about


def _decided_by(recipe: LatentStatsRecipe, images: ImageSet | ShardedImages) -> dict[str, Any]:
    """What decides the statistics, by recipe key: hashes of files, and values."""
    encoder = recipe.autoencoder.encoder.model_dump(exclude={"weights"})
    return {
        **made_with(recipe.autoencoder, recipe.root, recipe.data.image_size),
        **{f"autoencoder.encoder.{key}": value for key, value in encoder.items()},
        "data.source": storage.content_hash(images.path) if isinstance(images, ShardedImages) else recipe.data.source,
        "data.num_images": recipe.data.num_images,
        "data.resampling": recipe.data.resampling,
        "precision": recipe.precision,
    }
