"""From a file of samples and a reference to scores, and to what says how they came about."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from rae_xla import storage
from rae_xla.data.sources import SOURCES, DataConfig, open_in_memory
from rae_xla.errors import UserError
from rae_xla.evaluation.features import Features, load_extractor
from rae_xla.evaluation.measured import Measured, Measuring
from rae_xla.evaluation.reference import KEY as REFERENCE_KEY
from rae_xla.evaluation.reference import open_reference
from rae_xla.evaluation.score_files import MANIFEST_FILE, SCORES, score_manifest, write_scores
from rae_xla.evaluation.scores import Scores, check_enough, likeness, recognised_share, scores_of, warn_of_order
from rae_xla.evaluation.stored_images import SAMPLES_FILE, ImagesInMemory, has_images, open_stored
from rae_xla.hosts import Hosts, check_seen_by_all
from rae_xla.models.inception import INPUT_SIZE
from rae_xla.recipe import EvaluationRecipe
from rae_xla.runtime import Runtime

SAMPLES_KEY = "--samples"
WEIGHTS_KEY = "features.weights"


class SampleScoring:
    """Samples against a reference, in the features of an extractor: stored ones, those of a job, those of a training.

    ``reference``: a file, a folder or one of `rae_xla.evaluation.reference.NAMED`; ``None``: the held-out split of
    ``data``, a set in memory. ``image_size``: of the samples, if they are images. ``key``: names the weights.
    ``about``: what is known of the reference.

    Raises:
        UserError: weights or reference are missing or do not fit.
    """

    def __init__(
        self,
        features: Features,
        data: DataConfig | None,
        reference: str | None,
        root: str,
        image_size: int | None,
        batch_size: int,
        runtime: Runtime,
        hosts: Hosts,
        key: str = WEIGHTS_KEY,
    ) -> None:
        in_memory = data is not None and data.source in SOURCES
        self._heldout = open_in_memory(data, "heldout") if data is not None and in_memory else None
        self._path: str | None = None
        self.about: dict[str, Any] = {"name": None, "purpose": "generation", "split": "heldout"}
        if reference is not None:
            named = reference
            self._path, self.about = hosts.from_first(lambda: open_reference(named, "generation", root))
            check_seen_by_all(self._path, REFERENCE_KEY, hosts)
        elif self._heldout is None:
            raise UserError(
                f"{REFERENCE_KEY}: required, unless data names a set in memory, whose held-out split is one; give a "
                "file or a name (see --help)"
            )
        num_classes = None if self._heldout is None else self._heldout.num_classes
        size = self._checked_size(image_size)
        known = size or INPUT_SIZE
        self.extractor = load_extractor(features, known, num_classes, root, key, runtime.process_index)
        self.measuring = Measuring(self.extractor, size, batch_size, runtime, hosts)

    def _checked_size(self, image_size: int | None) -> int | None:
        if self._path is None:
            assert self._heldout is not None
            size: int | None = self._heldout.images.shape[1]
        else:
            no_images = self._path.endswith(".npz") and not has_images(self._path, REFERENCE_KEY)
            size = None if no_images else open_stored(self._path, REFERENCE_KEY).image_size
        if None not in (size, image_size) and size != image_size:
            raise UserError(
                f"{REFERENCE_KEY}: its images have {size} pixels a side, the samples have {image_size}; score images "
                "of one size"
            )
        return image_size or size

    def reference(self) -> Measured:
        """Measured by all hosts."""
        if self._path is not None:
            return self.measuring.file(self._path, "reference", REFERENCE_KEY, self.about)
        assert self._heldout is not None
        images = ImagesInMemory("held-out images", self._heldout.images, self._heldout.labels)
        return self.measuring.images(images, "held-out images", "data.source", self.about)

    def scores(self, made: Measured, real: Measured) -> Scores:
        """By their names; a classifier also says how many it recognises, and how many of the held-out images."""
        scores: Scores = {"num_samples": made.about.get("num_images"), **scores_of(self.extractor, made, real)}
        if self._heldout is None or made.seen is None or "predicted" not in made.seen:
            return scores
        # Without labels there is nothing to recognise.
        if made.labels is not None and made.labels.max() < self._heldout.num_classes:
            scores["recognised_share"] = recognised_share(made.seen, made.labels)
        if real.seen is not None and real.labels is not None:
            scores["judge_heldout_accuracy"] = recognised_share(real.seen, real.labels)
        return scores

    def likeness(self, made: Measured) -> Scores:
        """How samples differ from each other beside held-out images; nothing without both."""
        if self._heldout is None or made.images is None or made.labels is None:
            return {}
        images = np.concatenate(list(made.images.rows(0, len(made.images), len(made.images))))
        return likeness(images, made.labels, self._heldout)


def evaluate_generation(
    recipe: EvaluationRecipe, runtime: Runtime, samples: str, reference: str | None, out: str | None = None
) -> Scores:
    """Scores of stored samples, by their names; ``manifest.json`` and ``report.html`` go to ``out``.

    ``samples``: a file with images, statistics or both, or a folder of pictures; ``reference``: see `SampleScoring`.
    ``out``: if not given ``scores/`` beside samples.npz, ``NAME.scores/`` beside others. All hosts read both.

    Raises:
        UserError: something is missing or does not fit.
    """
    started = time.perf_counter()
    hosts = Hosts(runtime)
    check_seen_by_all(samples, SAMPLES_KEY, hosts)
    has_no_images = samples.endswith(".npz") and not has_images(samples, SAMPLES_KEY)
    stored = None if has_no_images else open_stored(samples, SAMPLES_KEY)
    if stored is not None:
        check_enough(len(stored), "samples")
    size = None if stored is None else stored.image_size
    scoring = SampleScoring(
        recipe.features, recipe.data, reference, recipe.root, size, recipe.batch_size, runtime, hosts
    )
    # The reference first: it is the sooner measured, and may be of other features.
    real = scoring.reference()
    made = scoring.measuring.file(samples, "samples", SAMPLES_KEY)
    warn_of_order(made.labels)
    scores = scoring.scores(made, real)
    if scoring.extractor.space == "judge":
        scores |= scoring.likeness(made)
    folder, name = _folder_and_name(samples)
    beside = storage.join(folder, MANIFEST_FILE)
    made_by = storage.read_json(beside) if name == SAMPLES_FILE and storage.exists(beside) else None
    manifest = score_manifest(runtime, scoring.extractor, scores, made, real, made_by, recipe.batch_size, started)
    beside = storage.join(folder, SCORES if name == SAMPLES_FILE else f"{name.removesuffix('.npz')}.{SCORES}")
    hosts.from_first(lambda: write_scores(out or beside, manifest, made, real))
    return scores


def _folder_and_name(samples: str) -> tuple[str, str]:
    """Of a file; of a folder that holds samples.npz, that; of one of pictures, where it is and what it is called."""
    if storage.exists(storage.join(samples, SAMPLES_FILE)):
        return samples, SAMPLES_FILE
    folder, _, name = samples.rstrip("/").rpartition("/")
    return folder or ".", name
