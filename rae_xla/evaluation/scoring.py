"""From a file of samples and a reference to scores, and to what says how they came about."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from rae_xla import storage
from rae_xla.data.sources import SOURCES, ImageSet, open_in_memory
from rae_xla.errors import UserError
from rae_xla.evaluation.features import load_extractor
from rae_xla.evaluation.measured import Measured, Measuring
from rae_xla.evaluation.reference import KEY as REFERENCE_KEY
from rae_xla.evaluation.reference import open_reference
from rae_xla.evaluation.sample_set import MANIFEST_FILE, SAMPLES_FILE
from rae_xla.evaluation.score_files import score_manifest, write_scores
from rae_xla.evaluation.scores import Scores, likeness, recognised_share, scores_of, warn_of_order
from rae_xla.evaluation.stored_images import ImagesInMemory, has_images, open_stored
from rae_xla.hosts import Hosts
from rae_xla.models.inception import INPUT_SIZE
from rae_xla.recipe import EvaluationRecipe
from rae_xla.runtime import Runtime

SAMPLES_KEY = "--samples"
WEIGHTS_KEY = "features.weights"


def evaluate_generation(
    recipe: EvaluationRecipe, runtime: Runtime, samples: str, reference: str | None, out: str | None = None
) -> Scores:
    """Scores of stored samples, by their names; ``manifest.json`` and ``report.html`` go to ``out``.

    ``samples``, ``reference``: files with images, statistics or both, or folders of pictures; a reference may be one of
    `rae_xla.evaluation.reference.NAMED`, and if none is given is the held-out split of the recipe's ``data``. ``out``:
    beside the samples if not given. On several hosts all of them read both.

    Raises:
        UserError: something is missing or does not fit.
    """
    started = time.perf_counter()
    hosts = Hosts(runtime)
    heldout = _heldout(recipe, reference)
    path, about = ("", {}) if reference is None else open_reference(
        reference, "generation", recipe.root, runtime.process_index
    )  # fmt: skip
    size = _image_size((samples, SAMPLES_KEY), (path, REFERENCE_KEY), heldout)
    num_classes = None if heldout is None else heldout.num_classes
    extractor = load_extractor(recipe.features, size, num_classes, recipe.root, WEIGHTS_KEY, runtime.process_index)
    measuring = Measuring(extractor, recipe.batch_size, runtime, hosts)
    made = measuring.file(samples, "samples", SAMPLES_KEY, _content(samples))
    labels = None if made.images is None else made.images.labels
    if heldout is not None and reference is None:
        real = measuring.images(
            ImagesInMemory(str(recipe.data and recipe.data.source), heldout.images, heldout.labels),
            "held-out images", "data.source", {"name": None, "purpose": "generation", "split": "heldout"},
        )  # fmt: skip
    else:
        real = measuring.file(path, "reference", REFERENCE_KEY, about)
    warn_of_order(labels)
    scores = {"num_samples": made.about.get("num_images"), **scores_of(extractor, made, real)}
    if extractor.space == "judge" and heldout is not None:
        scores |= _judged(made, real, heldout)
    beside = storage.join(_folder_of(samples), MANIFEST_FILE)
    made_by = storage.read_json(beside) if storage.exists(beside) else None
    manifest = score_manifest(recipe, runtime, extractor, scores, made, real, made_by, started)
    hosts.from_first(lambda: write_scores(out or storage.join(_folder_of(samples), "scores"), manifest, made, real))
    return scores


def _heldout(recipe: EvaluationRecipe, reference: str | None) -> ImageSet | None:
    if recipe.data is not None and recipe.data.source in SOURCES:
        return open_in_memory(recipe.data, "heldout")
    if reference is None:
        raise UserError(
            f"{REFERENCE_KEY}: required, unless data names a set in memory, whose held-out split is one; give a file "
            "or a name (see --help)"
        )
    return None


def _image_size(samples: tuple[str, str], reference: tuple[str, str], heldout: ImageSet | None) -> int:
    """Of the images that there are, which are to be of one size."""
    sizes = {
        key: open_stored(path, key).image_size
        for path, key in (samples, reference)
        if path and not (path.endswith(".npz") and not has_images(path, key))
    }
    if not reference[0] and heldout is not None:
        sizes["data.image_size"] = heldout.images.shape[1]
    if len(set(sizes.values())) > 1:
        found = " and ".join(f"{key} has images of {size} pixels" for key, size in sizes.items())
        raise UserError(f"{found}; score images of one size")
    return next(iter(sizes.values()), INPUT_SIZE)


def _judged(made: Measured, real: Measured, heldout: ImageSet) -> dict[str, Any]:
    """What only an independent classifier says, of sets that fit into memory."""
    images, labels = made.images, None if made.images is None else made.images.labels
    if made.seen is None or images is None or labels is None:
        return {}
    found: dict[str, Any] = {"recognised_share": recognised_share(made.seen, labels)}
    if real.seen is not None and len(real.seen["predicted"]) == len(heldout.labels):
        found["judge_heldout_accuracy"] = recognised_share(real.seen, heldout.labels)
    return found | likeness(np.concatenate(list(images.rows(0, len(images), len(images)))), labels, heldout)


def _content(samples: str) -> dict[str, Any]:
    """The hash of samples.npz; folders of pictures have none."""
    file = samples if samples.endswith(".npz") else storage.join(samples, SAMPLES_FILE)
    return {"sha256": storage.content_hash(file) if storage.exists(file) else None}


def _folder_of(samples: str) -> str:
    return samples if storage.is_directory(samples) else samples.rpartition("/")[0] or "."
