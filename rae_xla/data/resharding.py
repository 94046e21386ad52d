"""Writing a set of images again, shuffled, in large shards of small blocks: what a bucket serves well.

Which image goes where depends on the seed and the source's manifest alone, so that an interrupted run goes on with the
shards that are missing.
"""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from PIL import Image
from tqdm import tqdm

from rae_xla import storage
from rae_xla.data.order import SampleOrder
from rae_xla.data.remote import RemoteFiles
from rae_xla.data.shards import Sample, ShardReader, parquet_of
from rae_xla.data.sources import ShardedImages, StreamConfig
from rae_xla.data.transforms import decoded

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``short_side``: larger images are scaled down to it and made JPEG of this ``quality``; ``None`` keeps them."""

    images_per_shard: int = 4096
    images_per_block: int = 64
    short_side: int | None = None
    quality: int = 95


def reshard(images: ShardedImages, directory: str, layout: Layout, seed: int, num_workers: int) -> list[str]:
    """Write Parquet shards of ``images`` into ``directory``; returns their paths.

    A shard takes whole blocks of the source, shuffled, so each is read once. Every image is decoded; one that cannot be
    is told and left out. A shard that is there already is kept.

    Raises:
        SourceError: the source does not answer.
    """
    read = StreamConfig()
    reader = ShardReader(images.manifest, images.path, RemoteFiles(read.timeout_seconds, read.give_up_seconds))
    windows = SampleOrder(images.manifest.block_sizes, 1, layout.images_per_shard, seed).epoch(stream=0, epoch=0)
    # Of all that decides what is in them.
    digest = hashlib.sha256(f"{images.manifest.model_dump_json()} {layout} {seed}".encode()).hexdigest()[:8]
    names = [f"images-{digest}-{number:05d}-of-{len(windows):05d}.parquet" for number in range(len(windows))]
    with (
        ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(images), desc="writing", unit="image", disable=None) as bar,
    ):
        for name, window in zip(names, windows, strict=True):
            path = storage.join(directory, name)
            if not storage.exists(path):
                samples = reader.read_window(window)
                encoded = pool.map(partial(_encoded, layout=layout), (s.image for s in samples), chunksize=16)
                storage.write_bytes(path, parquet_of(list(_readable(samples, encoded)), layout.images_per_block))
            bar.update(len(window.rows))
    return [storage.join(directory, name) for name in names]


def _encoded(image: bytes, layout: Layout) -> bytes | str:
    """The image as it is to be kept, or why it cannot be decoded."""
    try:
        pixels = decoded(image)
    except ValueError as error:
        return str(error)
    if layout.short_side is None or min(pixels.size) <= layout.short_side:
        return image
    scale = layout.short_side / min(pixels.size)
    size = round(pixels.width * scale), round(pixels.height * scale)
    content = io.BytesIO()
    pixels.resize(size, Image.Resampling.LANCZOS).save(content, "JPEG", quality=layout.quality, subsampling=0)
    return content.getvalue()


def _readable(samples: list[Sample], encoded: Iterator[bytes | str]) -> Iterator[tuple[bytes, int]]:
    for sample, found in zip(samples, encoded, strict=True):
        if isinstance(found, bytes):
            yield found, sample.label
        else:
            logger.warning("left out: %s (%s)", sample.name, found)
