"""Blocks of images out of shards: tables of Parquet and Arrow, tar files as WebDataset lays them out, image files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rae_xla import storage
from rae_xla.data.manifest import Manifest, Shard, shard_path
from rae_xla.data.order import Window
from rae_xla.data.remote import RemoteFiles
from rae_xla.errors import SourceError

OUR_COLUMNS = "image", "label"
_TAR_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Sample:
    """An encoded image and its label; ``name`` says where it is from."""

    name: str
    image: bytes
    label: int


class ShardReader:
    """Blocks of a manifest's shards, counted through all shards."""

    def __init__(self, manifest: Manifest, manifest_path: str, files: RemoteFiles) -> None:
        self._manifest = manifest
        self._manifest_path = manifest_path
        self._files = files
        self._blocks = [(shard, block) for shard in manifest.shards for block in range(len(shard.block_sizes))]
        self.num_blocks = len(self._blocks)
        # An index or a schema is read once; it is small beside the images.
        self._parquet: dict[str, pq.FileMetaData] = {}
        self._arrow: dict[str, bytes] = {}

    def read(self, number: int) -> list[Sample]:
        """The samples of a block.

        Raises:
            SourceError: its bytes do not come, or are not what the manifest says.
        """
        shard, block = self._blocks[number]
        path = shard_path(self._manifest_path, shard)
        if shard.files:
            file = storage.join(path, shard.files[block])
            return [Sample(file, self._files.read(file, 0, shard.sizes[block]), shard.labels[block])]
        try:
            pairs = self._pairs(path, shard, block)
        except (pa.ArrowException, tarfile.TarError, KeyError, ValueError, TypeError) as error:
            raise SourceError(
                f"{path}: block {block} is not as it was indexed ({error}); make the manifest again"
            ) from error
        if len(pairs) != shard.blocks[block]:
            raise SourceError(
                f"{path}: block {block} has {len(pairs)} images, the manifest says {shard.blocks[block]}; make it again"
            )
        largest = max(label for _, label in pairs)
        if largest >= self._manifest.num_classes:
            raise SourceError(f"{path}: block {block} has a label {largest}, the manifest says less; make it again")
        return [Sample(f"{path} block {block} row {row}", image, label) for row, (image, label) in enumerate(pairs)]

    def read_window(self, window: Window) -> list[Sample]:
        """The samples of a window in their order."""
        rows = [sample for piece in window.pieces for sample in self.read(piece.block)[piece.first : piece.end]]
        return [rows[row] for row in window.rows]

    def _pairs(self, path: str, shard: Shard, block: int) -> list[tuple[bytes, int]]:
        columns = self._manifest.image_column, self._manifest.label_column
        if self._manifest.container == "parquet":
            return table_pairs(
                self._parquet_file(path, shard).read_row_group(block, columns=list(columns), use_threads=False),
                *columns,
            )
        content = self._files.read(path, *shard.ranges[block])
        if self._manifest.container == "tar":
            return [(image, label) for _, image, label in tar_samples(io.BytesIO(content + _TAR_END), *columns)]
        if path not in self._arrow:
            self._arrow[path] = self._files.read(path, *shard.header)
        return table_pairs(pa.ipc.open_stream(self._arrow[path] + content).read_all(), *columns)

    def _parquet_file(self, path: str, shard: Shard) -> pq.ParquetFile:
        known = self._parquet.get(path)
        # In this thread: a worker process that ends while Arrow's own threads read is aborted.
        opened = pq.ParquetFile(self._files.open(path, shard.num_bytes), metadata=known, pre_buffer=False)
        self._parquet[path] = opened.metadata
        return opened


def parquet_of(rows: list[tuple[bytes, int]], rows_per_block: int) -> bytes:
    """A shard of our own: contents and labels under `OUR_COLUMNS`."""
    contents, labels = [row[0] for row in rows], [row[1] for row in rows]
    columns = [pa.array(contents, pa.binary()), pa.array(labels, pa.int64())]
    file = io.BytesIO()
    # Encoded images and latents do not compress further.
    pq.write_table(pa.table(columns, names=list(OUR_COLUMNS)), file, row_group_size=rows_per_block, compression="none")
    return file.getvalue()


def check_schema(schema: Any, image_column: str, label_column: str) -> None:
    """Raises a ValueError if a table does not have images as bytes, and labels as whole numbers."""
    for name, fits, wanted in (
        (image_column, _holds_bytes, "bytes, or a struct with bytes"),
        (label_column, pa.types.is_integer, "whole numbers"),
    ):
        if name not in schema.names:
            raise ValueError(f"it has no {name}, only {', '.join(schema.names)}")
        if not fits(schema.field(name).type):
            raise ValueError(f"{name} is {schema.field(name).type}, not {wanted}")


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind] and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def table_pairs(table: Any, image_column: str, label_column: str) -> list[tuple[bytes, int]]:
    """Images and labels of a table. An image is bytes, or as Hugging Face writes it a struct with ``bytes``."""
    images, labels = table.column(image_column), table.column(label_column)
    if pa.types.is_struct(images.type):
        images = pa.chunked_array([chunk.field("bytes") for chunk in images.chunks], images.type.field("bytes").type)
    if images.null_count or labels.null_count:
        raise ValueError(f"{image_column} or {label_column} is empty in some rows")
    return list(zip(images.to_pylist(), labels.to_pylist(), strict=True))


def tar_samples(file: Any, image_suffix: str, label_suffix: str) -> Iterator[tuple[int, bytes, int]]:
    """Offset, image and label of a tar file's samples: neighbouring members whose names differ in suffixes only."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        name: tuple[str, str] | None = None
        first, members = 0, dict[str, bytes]()
        for member in archive:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if (folder, stem) != name:
                if name is not None:
                    yield first, *_tar_sample(name, members, image_suffix, label_suffix)
                name, first, members = (folder, stem), member.offset, {}
            extracted = archive.extractfile(member)
            assert extracted is not None
            members[suffix.lower()] = extracted.read()
        if name is not None:
            yield first, *_tar_sample(name, members, image_suffix, label_suffix)


def _tar_sample(
    name: tuple[str, str], members: dict[str, bytes], image_suffix: str, label_suffix: str
) -> tuple[bytes, int]:
    for suffix in (image_suffix, label_suffix.partition("#")[0]):
        if suffix not in members:
            raise ValueError(f"{'/'.join(name)} has no .{suffix}, only {', '.join(members)}")
    suffix, _, key = label_suffix.partition("#")
    label = json.loads(members[suffix])
    if key:
        label = label[key] if isinstance(label, dict) and key in label else None
    if not isinstance(label, int):
        raise ValueError(f"{'/'.join(name)}.{suffix} is no whole number; name the key of a JSON object as {suffix}#key")
    return members[image_suffix], label
