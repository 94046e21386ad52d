"""Samples of a diffusion model's averaged weights while it trains: pictures, and scores by what a judge sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla.data.sources import open_in_memory
from rae_xla.evaluation.batches import Share, own_rows, padded, run_batches
from rae_xla.evaluation.distances import frechet_distance
from rae_xla.evaluation.features import JudgeFeatures
from rae_xla.evaluation.files import contact_sheet
from rae_xla.evaluation.generation import Sampler, labels_of, sample_columns
from rae_xla.hosts import Hosts
from rae_xla.models.diffusion import DiffusionModel
from rae_xla.recipe import DiffusionRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.looks import ScoringConfig, Seen

JUDGE_KEY = "scoring.judge.weights"
COLUMNS_OF_A_PREVIEW = 10

IndexedRows = list[tuple[int, np.ndarray]]
"""By the sample's index."""


class SampleLook:
    """A `Look` at samples with the recipe's own sampler, shift and guidance. Sample i is the same at every look.

    Previews and scores share a program.

    Raises:
        UserError: weights of the decoder, the guide or the judge are missing or do not fit.
    """

    title = "samples"

    def __init__(
        self, recipe: DiffusionRecipe, runtime: Runtime, module: DiffusionModel, steps_per_epoch: float, num_steps: int
    ) -> None:
        self._recipe, self._runtime, self._num_steps = recipe, runtime, num_steps
        self._hosts = Hosts(runtime)
        self._sampler = Sampler(recipe, runtime, module)
        self._judge = None if recipe.scoring is None else _Judge(recipe, recipe.scoring, runtime, self._hosts)
        self._looks = {
            name: (max(1, round(config.every_epochs * steps_per_epoch)), config.num_images)
            for name, config in (("preview", recipe.preview), ("scoring", recipe.scoring))
            if config is not None
        }
        most = max(number for _, number in self._looks.values())
        self._labels = labels_of(recipe.sampler.labels, recipe.seed, most, module.num_classes)
        self._batch_size = min(recipe.sampler.batch_size, most)
        self._program = runtime.compile(self._made, "samples")
        self._constants: Any = None

    def is_due(self, step: int) -> bool:
        """See `Look`."""
        return any(self._num_due(name, step) for name in self._looks)

    def prepare(self, state: Any, frozen: Any) -> None:
        """See `Look`."""
        judge = {} if self._judge is None else {"judge": self._judge.prepared()}
        self._constants = self._runtime.place_frozen({**self._sampler.constants(), **judge})
        self._program.prepare({}, self._given(state, frozen), next(self._batches(1))[1])

    def __call__(self, step: int, state: Any, frozen: Any, leaves: Callable[[], bool]) -> Seen | None:
        """See `Look`. The picture has the first samples, in rows of ten."""
        num_shown, num_scored = self._num_due("preview", step), self._num_due("scoring", step)
        given = self._given(state, frozen)
        rows: dict[str, IndexedRows] = {"images": [], "features": [], "predicted": []}
        for indices, batch in self._batches(max(num_shown, num_scored)):
            if leaves():
                return None
            _, made = self._program({}, given, batch)
            for name, number in (("images", num_shown), ("features", num_scored), ("predicted", num_scored)):
                if len(indices) and indices[0] < number:
                    own = own_rows({name: made[name]}, self._runtime)[name]
                    rows[name] += _up_to(number, indices, own)
        values: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        if num_shown:
            pictures["samples"] = contact_sheet(
                _gathered(self._hosts, rows["images"]), min(COLUMNS_OF_A_PREVIEW, num_shown)
            )
        if num_scored and self._judge is not None:
            seen = {name: _gathered(self._hosts, rows[name]) for name in ("features", "predicted")}
            values = self._judge.scores(seen, self._labels[:num_scored])
        return Seen(values, pictures)

    def _num_due(self, name: str, step: int) -> int:
        every_steps, num_images = self._looks.get(name, (1, 0))
        return num_images if step % every_steps == 0 or step == self._num_steps else 0

    def _batches(self, num_images: int) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """This host's indices of each batch, and the batch on the devices."""
        own = Share.of(np.arange(num_images), self._batch_size, self._runtime)
        for indices, given in zip(own.batches, own.given, strict=True):
            batch = padded(sample_columns(given, self._labels, None), own.of_host)
            yield indices, self._runtime.place_batch(batch)

    def _given(self, state: Any, frozen: Any) -> Any:
        return {**self._constants, "model": {**frozen["buffers"], **state["ema"]}}

    def _made(self, state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        with torch.no_grad():
            images = self._sampler.images(frozen, batch, self._recipe.seed)["images"]
            seen = {} if self._judge is None else self._judge.features(frozen["judge"], images, self._runtime)
            # Each host takes its own rows of them.
            return state, {name: self._runtime.split_batch(made) for name, made in {"images": images, **seen}.items()}


def _up_to(number: int, indices: np.ndarray, rows: np.ndarray) -> IndexedRows:
    return [(index, row) for index, row in zip(indices.tolist(), rows, strict=False) if index < number]


def _gathered(hosts: Hosts, rows: IndexedRows) -> np.ndarray:
    everywhere = chain.from_iterable(hosts.of_all(rows))
    return np.stack([row for _, row in sorted(everywhere, key=lambda found: found[0])])


class _Judge:
    """What samples are scored by: a classifier, and what it sees of held-out images."""

    def __init__(self, recipe: DiffusionRecipe, config: ScoringConfig, runtime: Runtime, hosts: Hosts) -> None:
        self._hosts = hosts
        self._heldout = open_in_memory(recipe.data, "heldout")
        self._runtime, self._batch_size = runtime, recipe.sampler.batch_size
        path = None if config.judge.weights is None else recipe.path(config.judge.weights)
        size, num_classes = recipe.data.image_size, self._heldout.num_classes
        self.features = JudgeFeatures(config.judge, size, num_classes, path, JUDGE_KEY)

    def prepared(self) -> dict[str, Any]:
        """The classifier's tensors; looks at the held-out images."""
        tensors = self.features.tensors()

        def view(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            features = self.features(frozen, batch["images"], self._runtime)["features"]
            return {"features": self._runtime.split_batch(features)}

        images = self._heldout.images
        own = Share.of(np.arange(len(images)), self._batch_size, self._runtime)
        rows = ({"images": images[given]} for given in own.given)
        seen = run_batches(view, tensors, lambda _: rows, len(images), own.batch_size, self._runtime, "held-out images")
        found = [_up_to(len(images), i, part["features"]) for i, (_, part) in zip(own.batches, seen, strict=True)]
        self._real = _gathered(self._hosts, list(chain.from_iterable(found)))
        return tensors

    def scores(self, seen: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
        """Named after the number of samples; without labels there is nothing to recognise."""
        number = f"{len(labels) // 1000}k" if len(labels) % 1000 == 0 else str(len(labels))
        scores = {f"judge_frechet_distance_{number}": frechet_distance(seen["features"], self._real)}
        if labels.max() < self._heldout.num_classes:
            scores[f"recognised_share_{number}"] = float((seen["predicted"] == labels).mean())
        return scores
