"""What stands beside scores: a manifest that says how they came about, and a report for people."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rae_xla import __version__, storage
from rae_xla.config import flattened
from rae_xla.errors import UserError
from rae_xla.evaluation.features import Extractor
from rae_xla.evaluation.measured import Measured
from rae_xla.evaluation.score_report import score_report
from rae_xla.evaluation.scores import ARITHMETIC, Scores
from rae_xla.precision import effective_precision
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.html"
# Where scores lie, beside samples.
SCORES = "scores"
# What of a manifest moves no score: where files lie, how long it took, in what portions, what was scored before, and
# what follows from other keys.
IGNORED = (
    "path",
    "seconds",
    "made_now",
    "batch_size",
    "num_devices",
    "mesh",
    "scores",
    "scored",
    "scored_against",
    "times",
    "evaluations",
)
# And what may move its last digits.
ROUNDING = ("device", "runtime", "torch", "torch_xla", "rae_xla")


def score_manifest(
    runtime: Runtime,
    extractor: Extractor,
    scores: Scores,
    samples: Measured,
    reference: Measured,
    sampling: Mapping[str, Any] | None,
    batch_size: int,
    started: float,
) -> dict[str, Any]:
    """All that decides the scores. ``sampling``: the manifest of the samples; ``started``: by ``perf_counter``."""
    described = runtime.describe()
    precision = effective_precision("fp32_highest", described["device"])
    return {
        "scores": scores,
        "samples": {**samples.about, "labels": label_counts(samples.labels)},
        "sampling": None if sampling is None else dict(sampling),
        "reference": reference.about,
        "features": extractor.about(),
        "precision": precision,
        "distances": ARITHMETIC,
        "batch_size": batch_size,
        "rae_xla": __version__,
        # The runtime's own precision is the sampler's, and not that of the scores.
        "runtime": {name: value for name, value in described.items() if name not in precision},
        "seconds": round(time.perf_counter() - started, 2),
    }


def label_counts(labels: np.ndarray | None) -> dict[str, Any] | None:
    """How many classes there are, and how many images of the rarest and of the most frequent one."""
    if labels is None:
        return None
    counts = np.unique(labels, return_counts=True)[1]
    digest = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max()), "sha256": digest}


def write_scores(
    directory: str, manifest: Mapping[str, Any], made: Measured, reference: Measured, images_are: str = "Samples"
) -> None:
    """``manifest.json`` and ``report.html``."""
    storage.write_json(storage.join(directory, MANIFEST_FILE), manifest)
    storage.write_text(storage.join(directory, REPORT_FILE), score_report(manifest, made, reference, images_are))
    logger.info("scores: %s", storage.join(directory, REPORT_FILE))


def compare(first: str, second: str) -> dict[str, Any]:
    """What differs between two manifests of scores, given as files or folders.

    ``moves_scores`` and ``moves_last_digits``: keys with both values. ``scores``: both values of each.

    Raises:
        UserError: a file is missing, or no manifest of scores.
    """
    manifests = [_read_manifest(path) for path in (first, second)]
    flat = [dict(flattened({**manifest, "scores": None})) for manifest in manifests]
    found: dict[str, Any] = {"moves_scores": {}, "moves_last_digits": {}}
    for key in dict.fromkeys((*flat[0], *flat[1])):
        values = [manifest.get(key) for manifest in flat]
        parts = key.split(".")
        if values[0] != values[1] and not set(parts) & set(IGNORED):
            found["moves_last_digits" if parts[-1] in ROUNDING else "moves_scores"][key] = values
    scores = [manifest["scores"] for manifest in manifests]
    names = dict.fromkeys((*scores[0], *scores[1]))
    return {**found, "scores": {name: [of_one.get(name) for of_one in scores] for name in names}}


def _read_manifest(path: str) -> dict[str, Any]:
    file = path if path.endswith(".json") else storage.join(path, MANIFEST_FILE)
    try:
        content = storage.read_json(file)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no manifest of scores is there; tools/evaluate.py writes one beside scores"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {file} is not JSON; make the scores again") from error
    if not isinstance(content, dict) or not isinstance(content.get("scores"), dict):
        raise UserError(f"{path}: {file} is no manifest of scores; give the folder that tools/evaluate.py wrote")
    return content
