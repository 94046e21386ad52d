"""Scores of samples against a reference, in an extractor's features, by ADM's protocol where that is Inception.

Names are kept apart: ``fid``, ``sfid``, ``inception_score``, ``precision`` and ``recall`` are Inception's. In other
spaces the name says which: ``frechet_distance_dinov2_b``, ``judge_frechet_distance``.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from rae_xla.data.sources import ImageSet
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import Columns
from rae_xla.evaluation.distances import (
    IMAGES_PER_SPLIT,
    NUM_NEIGHBOURS,
    frechet_distance,
    identical_images,
    inception_score,
    nearest_neighbour_distances,
    precision_and_recall,
)
from rae_xla.evaluation.features import Extractor, InceptionFeatures
from rae_xla.evaluation.measured import Measured

logger = logging.getLogger(__name__)

Scores = dict[str, Any]

# How distances are computed, for manifests.
ARITHMETIC = {
    "frechet_distance": "float64",
    "precision_and_recall": f"float32, squared distances, k = {NUM_NEIGHBOURS}",
    "inception_score": f"float64, splits of {IMAGES_PER_SPLIT} in file order, logits without bias",
}


def scores_of(extractor: Extractor, samples: Measured, reference: Measured) -> Scores:
    """Scores of samples, by their names; ``None`` for those that need images where there are statistics only.

    Raises:
        UserError: too few images for precision and recall.
    """
    first, second, space = samples.gaussians["features"], reference.gaussians["features"], extractor.space
    for who, gaussian in (("samples", first), ("reference", second)):
        if gaussian.count is not None:
            check_enough(gaussian.count, who, len(gaussian.mean))
    distance = frechet_distance(first, second)
    if space == "judge":
        return {"judge_frechet_distance": distance}
    manifold: tuple[float | None, float | None] = (None, None)
    if samples.seen is not None and reference.seen is not None:
        manifold = precision_and_recall(reference.seen["features"], samples.seen["features"])
    if not isinstance(extractor, InceptionFeatures):
        names = (f"{name}_{space}" for name in ("frechet_distance", "precision", "recall"))
        return dict(zip(names, (distance, *manifold), strict=True))
    spatial = [measured.gaussians.get("spatial") for measured in (samples, reference)]
    return {
        "fid": distance,
        "sfid": None if spatial[0] is None or spatial[1] is None else frechet_distance(spatial[0], spatial[1]),
        "inception_score": None
        if samples.seen is None
        else inception_score(samples.seen["features"], extractor.logits_weight),
        "precision": manifold[0],
        "recall": manifold[1],
    }


def check_enough(count: int, who: str, width: int = 0) -> None:
    """Warns of fewer images than a covariance of ``width`` features needs.

    Raises:
        UserError: fewer than precision and recall need.
    """
    if count <= NUM_NEIGHBOURS:
        raise UserError(f"{who}: {count} images are too few for scores; {NUM_NEIGHBOURS + 1} are the least")
    if count <= width:
        logger.warning(
            "%s: %d images are too few for a covariance of %d features; distances of so few are larger, and do not "
            "compare with those of more", who, count, width,
        )  # fmt: skip


def reconstruction_distance(space: str) -> str:
    """What the distance of reconstructions from their originals is called in an extractor's space."""
    return "rfid" if space == "inception" else f"{space}_reconstruction_frechet_distance"


def recognised_share(seen: Columns, labels: np.ndarray) -> float:
    """Of the images, those that a classifier takes for their label."""
    return float((seen["predicted"] == labels).mean())


def warn_of_order(labels: np.ndarray | None) -> None:
    """The Inception Score is of splits in file order, and collapses if each has few of the classes."""
    if labels is None or len(labels) <= IMAGES_PER_SPLIT:
        return
    classes = len(np.unique(labels))
    first = len(np.unique(labels[:IMAGES_PER_SPLIT]))
    if first < min(classes, IMAGES_PER_SPLIT) / 2:
        logger.warning(
            "samples: the first %d have %d of %d classes; Inception Scores are of splits in file order, and too low "
            "where classes are not mixed", IMAGES_PER_SPLIT, first, classes,
        )  # fmt: skip


def likeness(images: np.ndarray, labels: np.ndarray, real: ImageSet) -> Scores:
    """How samples differ from each other, in grey levels, with real images beside.

    Distances are means over as many images of each class, since a larger set has nearer neighbours; ``None`` if a class
    has one image only.
    """
    kept, kept_real = matched_classes(labels, real.labels)
    of_real = nearest_neighbour_distances(real.images[kept_real], real.labels[kept_real])
    return {
        "identical_images": identical_images(images),
        "neighbour_distance": _mean_or_none(nearest_neighbour_distances(images[kept], labels[kept])),
        "real_neighbour_distance": _mean_or_none(of_real),
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
