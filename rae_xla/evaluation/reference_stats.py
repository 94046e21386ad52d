"""References made from a data set: statistics of all its images, read once, and some of the images themselves."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np

from rae_xla import __version__, storage
from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import ShardedImages, open_images
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import check_one_host, num_rows_of, run_batches
from rae_xla.evaluation.features import load_extractor
from rae_xla.evaluation.gaussian import Scatter
from rae_xla.evaluation.measured import MOMENTS, check_numbers, view, write_statistics
from rae_xla.evaluation.reference import Purpose
from rae_xla.evaluation.scores import check_enough
from rae_xla.evaluation.stored_images import IMAGES, LABELS
from rae_xla.recipe import EvaluationRecipe
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)


def write_reference(
    recipe: EvaluationRecipe, runtime: Runtime, purpose: Purpose, out: str, keep_images: int = 0
) -> dict[str, Any]:
    """An ``.npz`` with ``mu``, ``sigma`` and the like, float64, as ADM's evaluator reads it; returns what it says.

    Of all images of the recipe's ``data``: of a set in memory those that are trained on (``generation``), or those
    that are held out. ``keep_images``: so many of them, evenly spread, stay in the file as ``arr_0``, with labels, for
    precision and recall.

    Raises:
        UserError: no data, weights that do not fit, more images to keep than there are; several hosts.
    """
    started = time.perf_counter()
    check_one_host(runtime, "a reference")
    if recipe.data is None:
        raise UserError("data: required for a reference; it says whose statistics are taken")
    if not out.endswith(".npz"):
        raise UserError(f"--out: {out} should end in .npz")
    if purpose == "reconstruction" and recipe.data.num_images is not None:
        raise UserError("data.num_images: cuts what is trained on; leave it out for what is held out")
    images = open_images(recipe.data, recipe.root, "train" if purpose == "generation" else "heldout")
    if keep_images > len(images):
        raise UserError(f"--keep-images: there are {len(images)} images, and {keep_images} were asked for")
    extractor = load_extractor(
        recipe.features, recipe.data.image_size, images.num_classes, recipe.root, "features.weights"
    )
    wanted = set(np.linspace(0, len(images) - 1, keep_images).round().astype(int).tolist())
    kept: list[np.ndarray] = []
    labels: list[int] = []
    scatters: dict[str, Scatter] = {}
    batches = run_batches(
        view(extractor, runtime), extractor.tensors(), images_in_order(images, recipe.data), len(images),
        min(recipe.batch_size, len(images)), runtime, "reference", exact=True,
    )  # fmt: skip
    for part, found in batches:
        seen = {name: found[name][: num_rows_of(part)] for name in MOMENTS if name in found}
        check_numbers(seen, recipe.data.source)
        for name, rows in seen.items():
            scatters[name] = scatters.get(name, Scatter.none(rows.shape[1])).with_rows(rows)
        for row, position in enumerate(part["positions"].tolist()):
            if position in wanted:
                kept.append(part["images"][row].copy())
                labels.append(int(part["labels"][row]))
    count = scatters["features"].count
    check_enough(count, recipe.data.source, len(scatters["features"].mean))
    about = {
        "purpose": purpose,
        "num_images": count,
        "image_size": recipe.data.image_size,
        "source": storage.content_hash(images.path) if isinstance(images, ShardedImages) else recipe.data.source,
        "resampling": recipe.data.resampling,
        "features": extractor.about(),
        "rae_xla": __version__,
    }
    images_kept = {IMAGES: np.stack(kept), LABELS: np.array(labels, np.int64)} if kept else {}
    write_statistics(out, {name: scatter.gaussian() for name, scatter in scatters.items()}, about, images_kept)
    return {**about, "path": out, "kept_images": len(kept), "seconds": round(time.perf_counter() - started, 2)}
