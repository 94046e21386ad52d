"""Latents of a whole source, encoded once and stored in shards, to train from without the encoder.

There is no augmentation of what is stored but the mirrored image, whose latents are stored too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from torch import Tensor

from rae_xla import storage
from rae_xla.data.indexing import Labelling, index_shards, relative_to
from rae_xla.data.loader import images_in_order
from rae_xla.data.manifest import StoredLatents, write_manifest
from rae_xla.data.shards import parquet_of
from rae_xla.data.sources import open_images
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import check_one_host, map_rows
from rae_xla.models.autoencoder import load_latent_encoder, made_with
from rae_xla.models.functional import call, tensors_of
from rae_xla.recipe import DiffusionRecipe
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

LATENTS_PER_BLOCK = 64
INDEXING_THREADS = 8


def store_latents(
    recipe: DiffusionRecipe, runtime: Runtime, out: str, dtype: Literal["float16", "float32"], per_shard: int
) -> dict[str, Any]:
    """Encode the recipe's training split into shards beside the manifest ``out``; returns what was written.

    With ``data.flip``, the mirrored images too. float16 rounds normalised latents to 2^-11 of their size.

    Raises:
        UserError: random crops, which cannot be stored; weights that do not fit.
    """
    if recipe.data.crop != "centre":
        raise UserError("data.crop: latents are of one crop; use centre")
    check_one_host(runtime, "encoding")
    images = open_images(recipe.data, recipe.root, "train")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    stored = StoredLatents(
        shape=recipe.autoencoder.encoder.latent_shape,
        dtype=dtype,
        mirrored=recipe.data.flip,
        made_with=made_with(recipe.autoencoder, recipe.root, recipe.data.image_size),
    )

    def encode(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = to_unit(batch["images"])
        found = {"plain": call(encoder, frozen, runtime, pixels), "labels": batch["labels"]}
        return {**found, "mirrored": call(encoder, frozen, runtime, pixels.flip(-1))} if stored.mirrored else found

    rows, name = images_in_order(images, recipe.data), "encoding"
    parts = map_rows(encode, tensors_of(encoder), rows, len(images), recipe.data.batch_size, runtime, name)
    directory = out.rpartition("/")[0] or "."
    paths = []
    for number, shard in enumerate(_in_shards(parts, stored, per_shard)):
        paths.append(storage.join(directory, f"latents-{number:05d}.parquet"))
        storage.write_bytes(paths[-1], parquet_of(shard, LATENTS_PER_BLOCK))
    manifest = index_shards(paths, Labelling(num_classes=images.num_classes), INDEXING_THREADS)
    manifest = manifest.model_copy(update={"latents": stored})
    write_manifest(out, relative_to(out, manifest))
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    return {
        "manifest": out,
        "num_images": manifest.num_images,
        "num_shards": len(paths),
        "mirrored": stored.mirrored,
        "gib": num_bytes / 2**30,
        "runtime": runtime.describe(),
    }


def _in_shards(
    parts: Iterator[dict[str, np.ndarray]], stored: StoredLatents, per_shard: int
) -> Iterator[list[tuple[bytes, int]]]:
    rows: list[tuple[bytes, int]] = []
    for part in parts:
        views = [part[name].astype(stored.dtype) for name in ("plain", "mirrored") if name in part]
        for row, label in enumerate(part["labels"].tolist()):
            rows.append((b"".join(view[row].tobytes() for view in views), label))
            if len(rows) == per_shard:
                yield rows
                rows = []
    if rows:
        yield rows
