"""Scores of an autoencoder on held-out images: rFID, PSNR, SSIM, LPIPS, and pictures beside their originals.

Two programs: encoder and decoder in the recipe's precision, and what compares images, in float32.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from rae_xla import storage
from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import ImageSet, ShardedImages, open_images
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import Columns, check_one_host, num_rows_of, run_batches
from rae_xla.evaluation.distances import frechet_distance
from rae_xla.evaluation.features import Extractor, load_extractor
from rae_xla.evaluation.files import contact_sheet, write_png
from rae_xla.evaluation.measured import DIGEST, MOMENTS, Measured, Measuring, check_numbers, digests_of
from rae_xla.evaluation.reconstruction import Reconstructing, lpips_network
from rae_xla.evaluation.reference import KEY as REFERENCE_KEY
from rae_xla.evaluation.reference import open_reference
from rae_xla.evaluation.score_files import score_manifest, write_scores
from rae_xla.evaluation.scores import Scores, check_enough, reconstruction_distance
from rae_xla.evaluation.similarity import SSIM_BORDER, psnr, ssim
from rae_xla.evaluation.stored_images import ImagesInMemory, StoredImages
from rae_xla.hosts import Hosts
from rae_xla.losses.perceptual import PerceptualDistance
from rae_xla.models.autoencoder import made_with
from rae_xla.models.functional import InFloat32, call, tensors_of
from rae_xla.recipe import EvaluationRecipe, save_recipe
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

OF_EACH = ("psnr", "ssim", "lpips")
NUM_SHOWN = 20


class _Comparing:
    """Images and their reconstructions to scores of each, and the features of those that are to be ``seen``."""

    def __init__(
        self,
        extractor: Extractor,
        perceptual: PerceptualDistance | None,
        image_size: int,
        runtime: Runtime,
        seen: tuple[str, ...],
    ) -> None:
        self._seen = seen
        self._extractor, self._perceptual, self._runtime = extractor, perceptual, runtime
        self._has_ssim = image_size > 2 * SSIM_BORDER

    def tensors(self) -> dict[str, Any]:
        """What a call is given as ``frozen``, on the host."""
        perceptual = {} if self._perceptual is None else {"perceptual": tensors_of(self._perceptual)}
        return {"extractor": self._extractor.tensors(), **perceptual}

    def __call__(self, frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``originals``, ``images`` uint8 [B, S, S, 3] -> ``psnr`` ... [B], ``images.features`` ... [B, F]."""
        first, second = to_unit(batch["originals"]), to_unit(batch["images"])
        found = {"psnr": psnr(second, first)}
        if self._has_ssim:
            found["ssim"] = ssim(second, first)
        if self._perceptual is not None:
            in_float32 = InFloat32(self._runtime.whole)
            found["lpips"] = call(self._perceptual, frozen["perceptual"], in_float32, 2 * second - 1, 2 * first - 1)
        for name in self._seen:
            seen = self._extractor(frozen["extractor"], batch[name], self._runtime)
            found |= {f"{name}.{column}": values for column, values in seen.items() if column in MOMENTS}
        return {name: self._runtime.split_batch(values) for name, values in found.items()}


def evaluate_reconstruction(
    recipe: EvaluationRecipe, runtime: Runtime, reference: str | None = None, out: str | None = None
) -> Scores:
    """Scores on the held-out images of the recipe's ``data``, by their names.

    ``rfid``, or what its features say, is against ``reference``, or if none is given against the same images as they
    are. Writes ``manifest.json``, ``report.html`` and ``reconstructions.png``, each image above its reconstruction,
    into ``out`` or the run directory. ``ssim`` and ``lpips`` are ``None`` for images of ten pixels and fewer, and
    without VGG's weights.

    Raises:
        UserError: something is missing or does not fit; several hosts.
    """
    started = time.perf_counter()
    check_one_host(runtime, "reconstruction")
    if recipe.data is None or recipe.autoencoder is None:
        raise UserError("autoencoder: required for reconstruction, with data to reconstruct")
    heldout = open_images(recipe.data, recipe.root, "heldout")
    path, about = ("", {}) if reference is None else open_reference(reference, "reconstruction", recipe.root)
    size = recipe.data.image_size
    extractor = load_extractor(recipe.features, size, heldout.num_classes, recipe.root, "features.weights")
    perceptual = lpips_network(recipe.root)
    if perceptual is None:
        logger.info("lpips: left out; VGG-16's weights are neither in %s/pretrained nor in torch.hub's", recipe.root)
    seen = ("originals", "images") if reference is None else ("images",)
    columns, shown = _compared(recipe, runtime, heldout, extractor, perceptual, seen)
    count = num_rows_of(columns)
    made = _measured(
        "images", columns, {"num_images": count, "made_with": _made_with(recipe)}, ImagesInMemory("", shown[1])
    )
    check_enough(count, "held-out images", len(made.gaussians["features"].mean))
    if reference is None:
        of_originals = {"path": recipe.data.source, "name": None, "num_images": count}
        real = _measured("originals", columns, {**of_originals, "purpose": "reconstruction", "split": "heldout"})
    else:
        measuring = Measuring(extractor, size, recipe.batch_size, runtime, Hosts(runtime))
        real = measuring.file(path, "reference", REFERENCE_KEY, about)
    distance = frechet_distance(made.gaussians["features"], real.gaussians["features"])
    means = {name: float(columns[name].mean(dtype=np.float64)) if name in columns else None for name in OF_EACH}
    scores = {reconstruction_distance(extractor.space): distance, **means, "num_images": count}
    directory = out or recipe.path(recipe.run_dir)
    save_recipe(recipe, directory)
    write_png(storage.join(directory, "reconstructions.png"), contact_sheet(np.concatenate(shown), len(shown[0])))
    manifest = score_manifest(runtime, extractor, scores, made, real, None, recipe.batch_size, started)
    write_scores(directory, manifest, made, real, "Reconstructions")
    return scores


def _compared(
    recipe: EvaluationRecipe,
    runtime: Runtime,
    heldout: ImageSet | ShardedImages,
    extractor: Extractor,
    perceptual: PerceptualDistance | None,
    seen: tuple[str, ...],
) -> tuple[Columns, list[np.ndarray]]:
    """Columns of all images; the first images, and their reconstructions."""
    assert recipe.data is not None and recipe.autoencoder is not None
    data = recipe.data
    there_and_back = Reconstructing(recipe.autoencoder, recipe.root, runtime)
    comparing = _Comparing(extractor, perceptual, data.image_size, runtime, seen)
    shown: list[np.ndarray] = []
    digests: list[Columns] = []

    def rows(_: int) -> Iterator[Columns]:
        originals = images_in_order(heldout, data)
        made = run_batches(
            there_and_back,
            there_and_back.tensors(),
            originals,
            len(heldout),
            recipe.batch_size,
            runtime,
            "reconstructing",
        )
        for part, found in made:
            number = num_rows_of(part)
            pair = {"originals": part["images"], "images": found["images"][:number]}
            digests.append({f"{name}.{DIGEST}": digests_of(images) for name, images in pair.items()})
            if not shown:
                shown.extend(values[:NUM_SHOWN].copy() for values in (pair["originals"], pair["images"]))
            yield pair

    name, batch_size = "comparing", recipe.batch_size
    compared = run_batches(comparing, comparing.tensors(), rows, len(heldout), batch_size, runtime, name, exact=True)
    parts = [{name: values[: num_rows_of(part)] for name, values in found.items()} for part, found in compared]
    columns = {name: np.concatenate([part[name] for part in of]) for of in (parts, digests) for name in of[0]}
    check_numbers(columns, "reconstructions")
    return columns, shown


def _measured(which: str, columns: Columns, about: dict[str, Any], images: StoredImages | None = None) -> Measured:
    seen = {name: columns[f"{which}.{name}"] for name in (*MOMENTS, DIGEST) if f"{which}.{name}" in columns}
    return Measured.of(seen, about, images)


def _made_with(recipe: EvaluationRecipe) -> dict[str, Any]:
    assert recipe.data is not None and recipe.autoencoder is not None
    decoder = recipe.autoencoder.decoder
    return {
        **made_with(recipe.autoencoder, recipe.root, recipe.data.image_size),
        "autoencoder.decoder.weights": storage.content_hash(recipe.path(decoder.weights or "")),
        "data.resampling": recipe.data.resampling,
        "precision": recipe.precision,
    }
