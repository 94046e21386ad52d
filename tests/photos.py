"""Small data sets of real photographs, the two that scikit-learn ships, in every kind of shard."""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rae_xla.data.indexing import Labelling, index, relative_to
from rae_xla.data.manifest import write_manifest

NUM_CLASSES = 5
Rows = list[tuple[bytes, int]]


@cache
def photographs() -> list[Image.Image]:
    """Two of 640x427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def photograph(number: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A part of a photograph, another for each number."""
    drawn = np.random.default_rng(number)
    left, top = int(drawn.integers(300)), int(drawn.integers(200))
    part = photographs()[number % 2].crop((left, top, left + 320, top + 220))
    return part.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image file's bytes."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def samples(count: int, size: tuple[int, int] = (80, 60)) -> Rows:
    """JPEG bytes and labels."""
    return [(encoded(photograph(number, size)), number % NUM_CLASSES) for number in range(count)]


def _table(rows: Rows) -> pa.Table:
    images = pa.array(
        [{"bytes": image, "path": None} for image, _ in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    return pa.table({"image": images, "label": pa.array([label for _, label in rows], pa.int64())})


def parquet(rows: Rows, images_per_block: int) -> bytes:
    """As Hugging Face writes it."""
    content = io.BytesIO()
    pq.write_table(_table(rows), content, row_group_size=images_per_block)
    return content.getvalue()


def arrow(rows: Rows, images_per_block: int, *, stream: bool) -> bytes:
    """A stream, as Hugging Face caches it, or a file."""
    content = io.BytesIO()
    table = _table(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=images_per_block)
    return content.getvalue()


def tar(rows: Rows) -> bytes:
    """As WebDataset writes it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number, (image, label) in enumerate(rows):
            about = json.dumps({"label": label}).encode()
            for suffix, part in (("jpg", image), ("cls", str(label).encode()), ("json", about)):
                member = tarfile.TarInfo(f"part/{number:06d}.{suffix}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    return content.getvalue()


def write_shards(directory: Path, kind: str, rows: Rows, num_shards: int, images_per_block: int) -> str:
    """Write rows as shards of a kind, or as folders of files; returns what to index."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "files":
        for number, (image, label) in enumerate(rows):
            folder = directory / f"class{label}"
            folder.mkdir(exist_ok=True)
            (folder / f"{number:06d}.jpg").write_bytes(image)
        return str(directory)
    writers = {
        "parquet": lambda part: parquet(part, images_per_block),
        "arrow": lambda part: arrow(part, images_per_block, stream=True),
        "arrow_file": lambda part: arrow(part, images_per_block, stream=False),
        "tar": tar,
    }
    for shard in range(num_shards):
        part = rows[len(rows) * shard // num_shards : len(rows) * (shard + 1) // num_shards]
        suffix = "arrow" if kind == "arrow_file" else kind
        (directory / f"train-{shard:03d}.{suffix}").write_bytes(writers[kind](part))
    return str(directory)


def write_manifest_of(directory: Path) -> str:
    """The manifest of the shards in a folder, beside them; its path."""
    path = str(directory / "manifest.json")
    write_manifest(path, relative_to(path, index(str(directory), Labelling(), "train", num_threads=2)))
    return path
