"""Scores of reconstructions and samples; samples are seen with the eyes of an independent classifier, the judge.

These are not FID: that name belongs to Inception features and ADM's references. The Fréchet distance here is taken in
the judge's hidden layer, against the held-out split, and its name says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rae_xla import storage
from rae_xla.data.sources import ImageSet, open_in_memory
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import map_batches
from rae_xla.evaluation.distances import (
    frechet_distance,
    identical_images,
    nearest_neighbour_distances,
)
from rae_xla.evaluation.features import JudgeFeatures
from rae_xla.evaluation.files import contact_sheet, read_samples, write_png
from rae_xla.evaluation.reconstruction import reconstruct
from rae_xla.evaluation.similarity import as_unit, psnr
from rae_xla.recipe import EvaluationRecipe, save_recipe
from rae_xla.runtime import Runtime


class Judge:
    """The independent classifier, and the held-out images that samples are compared with."""

    def __init__(self, recipe: EvaluationRecipe, runtime: Runtime) -> None:
        self._recipe = recipe
        self._runtime = runtime
        self.heldout: ImageSet = open_in_memory(recipe.data, "heldout")
        judge = recipe.judge
        path = None if judge.weights is None else recipe.path(judge.weights)
        size, num_classes = recipe.data.image_size, self.heldout.num_classes
        self._features = JudgeFeatures(judge, size, num_classes, path, "judge.weights")

    def look(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, H, W, 3] -> (features float32 [n, F], predicted labels int64 [n])."""

        def view(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._features(frozen, batch["images"], self._runtime)

        size, tensors = self._recipe.data.batch_size, self._features.tensors()
        parts = list(map_batches(view, tensors, {"images": images}, size, self._runtime, "judging"))
        return np.concatenate([p["features"] for p in parts]), np.concatenate([p["predicted"] for p in parts])

    def score_samples(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float | int | None]:
        """How many samples the judge recognises, how far they are from real ones, and how they differ from each other.

        ``neighbour_distance`` and ``real_neighbour_distance`` are means over as many images of each class, since a
        larger set has nearer neighbours; ``None`` if a class has one image only.

        Raises:
            UserError: fewer than two images, or not uint8 [n, S, S, 3] of the recipe's size.
        """
        size = self.heldout.images.shape[1:]
        if images.dtype != np.uint8 or images.shape[1:] != size:
            found = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"samples: arr_0 is {found}, should be uint8 [n, {', '.join(map(str, size))}]")
        if len(images) < 2:
            raise UserError("samples: at least 2 are needed for scores")
        both, predicted = self.look(np.concatenate([images, self.heldout.images]))
        num = len(images)
        kept, kept_real = matched_classes(labels, self.heldout.labels)
        real = nearest_neighbour_distances(self.heldout.images[kept_real], self.heldout.labels[kept_real])
        return {
            "num_samples": num,
            "recognised_share": float((predicted[:num] == labels).mean()),
            "judge_heldout_accuracy": float((predicted[num:] == self.heldout.labels).mean()),
            "judge_frechet_distance": frechet_distance(both[:num], both[num:]),
            "identical_images": identical_images(images),
            "neighbour_distance": _mean_or_none(nearest_neighbour_distances(images[kept], labels[kept])),
            "real_neighbour_distance": _mean_or_none(real),
        }


def _mean_or_none(distances: np.ndarray) -> float | None:
    return float(distances.mean()) if np.isfinite(distances).all() else None


def matched_classes(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices into two label arrays: of every class, the first images of each, equally many of both."""
    kept: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label in np.unique(first):
        members = [np.flatnonzero(labels == label) for labels in (first, second)]
        number = min(len(members[0]), len(members[1]))
        for indices, of_class in zip(kept, members, strict=True):
            indices.append(of_class[:number])
    return np.concatenate(kept[0]), np.concatenate(kept[1])


def evaluate_generation(recipe: EvaluationRecipe, runtime: Runtime, samples: str) -> dict[str, Any]:
    """Scores of a sample file."""
    images, labels = read_samples(samples)
    return Judge(recipe, runtime).score_samples(images, labels)


def evaluate_reconstruction(recipe: EvaluationRecipe, runtime: Runtime, num_shown: int = 40) -> dict[str, Any]:
    """PSNR on the held-out split; writes ``reconstructions.png``, each image above its reconstruction."""
    originals = open_in_memory(recipe.data, "heldout").images
    reconstructions = reconstruct(recipe.autoencoder, recipe.root, originals, recipe.data.batch_size, runtime)
    run_dir = recipe.path(recipe.run_dir)
    if runtime.process_index == 0:
        columns = num_shown // 2
        pairs = [part[row : row + columns] for row in (0, columns) for part in (originals, reconstructions)]
        save_recipe(recipe, run_dir)
        write_png(storage.join(run_dir, "reconstructions.png"), contact_sheet(np.concatenate(pairs), columns))
    return {"psnr": float(psnr(as_unit(originals), as_unit(reconstructions)).mean()), "num_images": len(originals)}
