"""``tools/prepare_data.py``: from its arguments to a manifest."""

from __future__ import annotations

import argparse
import logging
import os
import posixpath
from typing import Any

from rae_xla.data.indexing import Labelling, check_out, index, index_shards, relative_to
from rae_xla.data.manifest import Manifest, write_manifest
from rae_xla.data.resharding import Layout, reshard
from rae_xla.data.sources import ShardedImages
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

GIB = 2**30
# A host holds a block of each of its streams at least.
LARGE_BLOCK_IMAGES = 256


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Index, write again if asked to, write the manifest; see the tool's help.

    Raises:
        UserError: see `rae_xla.data.indexing.index`; a number out of range.
    """
    for name, least in (
        ("images_per_shard", 1),
        ("images_per_block", 1),
        ("quality", 1),
        ("jobs", 1),
        ("short_side", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: at least {least}, got {value}")
    if arguments.short_side and not arguments.reshard:
        raise UserError("--short-side: goes with --reshard")
    if arguments.seed < 0:
        raise UserError(f"--seed: at least 0, got {arguments.seed}")
    if not arguments.out.endswith(".json"):
        raise UserError(f"--out: {arguments.out} is to be a manifest; give a path that ends in .json")
    if not arguments.reshard:
        check_out(arguments.out, [arguments.source])
    labelling = Labelling(
        image_column=arguments.image_column, label_column=arguments.label_column, num_classes=arguments.num_classes
    )
    manifest = index(arguments.source, labelling, arguments.split, arguments.jobs)
    if arguments.reshard:
        manifest = _resharded(manifest, arguments)
    write_manifest(arguments.out, relative_to(arguments.out, manifest))
    largest = max(manifest.block_sizes)
    if largest > LARGE_BLOCK_IMAGES:
        logger.warning(
            "blocks of up to %d images are read together, and a host holds one of each of its streams; "
            "--reshard makes smaller ones",
            largest,
        )
    return {
        "manifest": arguments.out,
        "num_images": manifest.num_images,
        "num_classes": manifest.num_classes,
        "num_shards": len(manifest.shards),
        "gib": sum(shard.num_bytes for shard in manifest.shards) / GIB,
        "largest_block": largest,
    }


def _resharded(manifest: Manifest, arguments: argparse.Namespace) -> Manifest:
    layout = Layout(
        images_per_shard=arguments.images_per_shard,
        images_per_block=arguments.images_per_block,
        short_side=arguments.short_side,
        quality=arguments.quality,
    )
    directory = arguments.out.rpartition("/")[0] or "."
    inside = (directory if "://" in directory else posixpath.abspath(directory)) + "/"
    if any(shard.path.startswith(inside) for shard in manifest.shards):
        raise UserError(f"--out: {directory} is where SOURCE is; give another folder to --reshard into")
    images = ShardedImages(manifest=manifest, path="")
    num_workers = min(arguments.jobs, len(os.sched_getaffinity(0)))
    paths = reshard(images, directory, layout, arguments.seed, num_workers)
    return index_shards(paths, Labelling(num_classes=manifest.num_classes), arguments.jobs)
