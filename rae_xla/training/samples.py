"""Samples of a diffusion model's averaged weights while it trains: pictures, and scores in an extractor's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla.evaluation.batches import Columns, Share, batch_size_for, gathered, own_rows, padded
from rae_xla.evaluation.files import contact_sheet
from rae_xla.evaluation.generation import Sampler, labels_of, sample_columns
from rae_xla.evaluation.measured import Measured, Viewing
from rae_xla.evaluation.reference import NAMED
from rae_xla.evaluation.scoring import SampleScoring
from rae_xla.hosts import Hosts
from rae_xla.models.diffusion import DiffusionModel
from rae_xla.recipe import DiffusionRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.looks import ScoringConfig, Seen, counted

WEIGHTS_KEY = "scoring.features.weights"
COLUMNS_OF_A_PREVIEW = 10
# Scores that are none of the samples'.
OF_OTHERS = ("num_samples", "judge_heldout_accuracy")

IndexedColumns = list[tuple[np.ndarray, Columns]]
"""Indices of samples, and what was found of them."""


class SampleLook:
    """A `Look` at samples with the recipe's own sampler, shift and guidance. Sample i is the same at every look.

    Previews and scores share a program.

    Raises:
        UserError: weights of the decoder, the guide or the extractor, or the reference, are missing or do not fit.
    """

    title = "samples"

    def __init__(
        self, recipe: DiffusionRecipe, runtime: Runtime, module: DiffusionModel, steps_per_epoch: float, num_steps: int
    ) -> None:
        self._recipe, self._runtime, self._num_steps = recipe, runtime, num_steps
        self._hosts = Hosts(runtime)
        self._sampler = Sampler(recipe, runtime, module)
        self._scored = None if recipe.scoring is None else _Scored(recipe, recipe.scoring, runtime, self._hosts)
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
        self._constants = self._runtime.place_frozen(self._sampler.constants())
        self._program.prepare({}, self._given(state, frozen), next(self._batches(1))[1])
        if self._scored is not None:
            self._scored.prepare(batch_size_for(self._batch_size, self._runtime) // self._runtime.num_processes)

    def __call__(self, step: int, state: Any, frozen: Any, leaves: Callable[[], bool]) -> Seen | None:
        """See `Look`. The picture has the first samples, in rows of ten."""
        num_shown, num_scored = self._num_due("preview", step), self._num_due("scoring", step)
        given = self._given(state, frozen)
        shown: IndexedColumns = []
        scored: IndexedColumns = []
        for indices, batch in self._batches(max(num_shown, num_scored)):
            if leaves():
                return None
            _, made = self._program({}, given, batch)
            if len(indices) and indices[0] < num_shown:
                shown.append((indices[indices < num_shown], own_rows(made, self._runtime)))
            # All hosts take part in every batch, whether or not they have a sample left.
            if self._scored is not None and num_scored:
                scored.append((indices[indices < num_scored], self._scored.features(made["images"])))
        values: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        if num_shown:
            images = gathered(shown, num_shown, self._hosts)["images"]
            pictures["samples"] = contact_sheet(images, min(COLUMNS_OF_A_PREVIEW, num_shown))
        if self._scored is not None and num_scored:
            found = gathered(scored, num_scored, self._hosts)
            values = self._scored.scores(found, self._labels[:num_scored])
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
            return state, {"images": self._sampler.images(frozen, batch, self._recipe.seed)["images"]}


class _Scored:
    """What samples are scored by: an extractor, as a program of its own in float32, and a reference."""

    def __init__(self, recipe: DiffusionRecipe, config: ScoringConfig, runtime: Runtime, hosts: Hosts) -> None:
        self._runtime, self._size = runtime, recipe.autoencoder.image_size
        reference = config.reference
        if reference is not None and reference not in NAMED:
            reference = recipe.path(reference)
        self._scoring = SampleScoring(
            config.features, recipe.data, reference, recipe.root, self._size, recipe.sampler.batch_size,
            runtime, hosts, WEIGHTS_KEY,
        )  # fmt: skip
        self.features = Viewing(self._scoring.extractor, runtime)
        self._reference: Measured | None = None

    def prepare(self, images_of_host: int) -> None:
        """Measure the reference, and compile what looks at a batch of which this host has so many images."""
        self._reference = self._scoring.reference()
        blank = torch.zeros(images_of_host, self._size, self._size, 3, dtype=torch.uint8)
        self.features.prepare(self._runtime.place_batch({"images": blank})["images"])

    def scores(self, seen: Columns, labels: np.ndarray) -> dict[str, float]:
        """Those of samples, named after the number of these."""
        assert self._reference is not None
        scores = self._scoring.scores(Measured.of(seen, {}, labels=labels), self._reference)
        number = counted(len(labels))
        return {
            f"{name}_{number}": scores[name] for name in scores if name not in OF_OTHERS and scores[name] is not None
        }
