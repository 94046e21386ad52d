"""Exact mean and variance of the encoder's features at every position, over a whole split.

The released script keeps a running value with momentum 0.1, which forgets all but its last tens of batches. Here every
image counts once: features come off the device, and batches are merged in float64 (Chan, Golub and LeVeque, 1979), so
the answer depends neither on the batch size nor on the number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla import storage
from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import open_images
from rae_xla.data.transforms import to_unit
from rae_xla.evaluation.batches import map_rows
from rae_xla.models.autoencoder import load_latent_encoder
from rae_xla.models.functional import call, tensors_of
from rae_xla.recipe import LatentStatsRecipe, save_recipe
from rae_xla.runtime import Runtime


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations; float64."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @staticmethod
    def of(rows: np.ndarray) -> Moments:
        """Of the rows of an array."""
        rows = rows.astype(np.float64)
        mean = rows.mean(axis=0)
        return Moments(len(rows), mean, np.square(rows - mean).sum(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Of both sets of rows together."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        squares = self.squares + other.squares + np.square(difference) * (self.count * other.count / count)
        return Moments(count, mean, squares)


def latent_stats(recipe: LatentStatsRecipe, runtime: Runtime) -> dict[str, Tensor]:
    """``mean`` and ``variance`` (over n), float32 [C, h, w], of the training split's features."""
    images = open_images(recipe.data, recipe.root, "train")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)

    def encode(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"features": call(encoder, frozen, runtime, to_unit(batch["images"]))}

    moments: Moments | None = None
    rows, num_images = images_in_order(images, recipe.data), len(images)
    name, batch_size = "latent statistics", recipe.data.batch_size
    for output in map_rows(encode, tensors_of(encoder), rows, num_images, batch_size, runtime, name):
        part = Moments.of(output["features"])
        moments = part if moments is None else moments.merge(part)
    assert moments is not None
    return {
        "mean": torch.from_numpy(moments.mean.astype(np.float32)),
        "variance": torch.from_numpy((moments.squares / moments.count).astype(np.float32)),
    }


def write_latent_stats(recipe: LatentStatsRecipe, runtime: Runtime) -> dict[str, Any]:
    """`latent_stats` into ``latent_stats.safetensors`` of the run directory; returns what was found."""
    stats = latent_stats(recipe, runtime)
    run_dir = recipe.path(recipe.run_dir)
    path = storage.join(run_dir, "latent_stats.safetensors")
    report = {
        "task": "latent_stats",
        "path": path,
        "shape": list(stats["mean"].shape),
        "average_mean": float(stats["mean"].mean()),
        "average_variance": float(stats["variance"].mean()),
        "runtime": runtime.describe(),
    }
    if runtime.process_index == 0:
        save_recipe(recipe, run_dir)
        storage.write_tensors(path, stats)
        storage.write_json(storage.join(run_dir, "report.json"), report)
    return report
