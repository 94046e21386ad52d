"""Scores of reconstructions and samples, in the features of an independent classifier: the judge.

These are not FID: that name belongs to Inception features and ADM's references. The Fréchet distance here is in the
judge's hidden layer, against the held-out split, and its name says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rae_xla import storage
from rae_xla.data.sources import ImageSet, open_source
from rae_xla.data.transforms import to_bytes, to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import map_batches
from rae_xla.evaluation.distances import frechet_distance, nearest_neighbour_distances
from rae_xla.models.autoencoder import load_latent_decoder, load_latent_encoder
from rae_xla.models.classifier import ConvNet, JudgeOutputs
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import load_weights
from rae_xla.recipe import EvaluationRecipe
from rae_xla.runtime import Runtime

LARGEST_LEVEL = 255.0


class Judge:
    """The independent classifier: what it sees in images, and the held-out images it compares with."""

    def __init__(self, recipe: EvaluationRecipe, runtime: Runtime) -> None:
        self._recipe = recipe
        self._runtime = runtime
        self.heldout: ImageSet = open_source(recipe.data, "heldout")
        self._module = JudgeOutputs(ConvNet(recipe.judge, self.heldout.num_classes))
        if recipe.judge.weights is None:
            raise UserError("judge.weights: required here; train the judge and give its safetensors file")
        load_weights(self._module.classifier, recipe.path(recipe.judge.weights), "judge.weights")
        self._heldout_view = self.look(self.heldout.images)

    def look(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, H, W, 3] -> (features float32 [n, F], predicted labels [n])."""

        def view(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            both = call(self._module, frozen, self._runtime.compute_dtype, to_unit(batch["images"]))
            return {"both": both}

        size = self._recipe.data.batch_size
        parts = map_batches(view, tensors_of(self._module), {"images": images}, size, self._runtime, "judging")
        both = np.concatenate([part["both"] for part in parts])
        split = self._recipe.judge.feature_width
        return both[:, :split], both[:, split:].argmax(axis=1)

    def heldout_accuracy(self) -> float:
        """Share of real held-out images that the judge recognises."""
        return float((self._heldout_view[1] == self.heldout.labels).mean())

    def score_samples(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
        """Recognition, Fréchet distance in the judge's features, and diversity inside a class."""
        features, predicted = self.look(images)
        generated = nearest_neighbour_distances(images, labels)
        real = nearest_neighbour_distances(*_same_number_per_class(self.heldout))
        return {
            "num_samples": len(images),
            "recognised_share": float((predicted == labels).mean()),
            "judge_frechet_distance": frechet_distance(features, self._heldout_view[0]),
            "identical_pairs": _identical(images, labels),
            "neighbour_distance": float(_per_class(generated, labels, images, self.heldout)),
            "real_neighbour_distance": float(real.mean()),
        }
