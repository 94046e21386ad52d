"""Manifests: which shards a set of images has, made once by ``tools/prepare_data.py`` and read at every start.

A manifest is a JSON file, beside its shards or elsewhere; paths in it are relative to its folder, or URLs.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.data.remote import RemoteFiles
from rae_xla.errors import SourceError, UserError

Container = Literal["parquet", "arrow", "tar", "files"]


class Shard(Config):
    """A file of many images, or with ``files`` image files of so many bytes (``sizes``) and their ``labels``.

    ``blocks``: number of images in each part that is read by itself: a row group of Parquet, a record batch of Arrow,
    some neighbouring members of a tar file. ``ranges``: first byte and end of each block, where its format has no index
    of its own. ``header``: the range of Arrow's schema.
    """

    path: str
    num_bytes: int = Field(ge=0)
    checksum: str | None = None
    blocks: tuple[Annotated[int, Field(gt=0)], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    header: tuple[int, int] = (0, 0)
    files: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of image files each is read by itself."""
        return (1,) * len(self.files) or self.blocks

    @property
    def num_images(self) -> int:
        """In all blocks."""
        return sum(self.block_sizes)


class StoredLatents(Config):
    """Latents in place of images: what `rae_xla.evaluation.latent_cache` wrote.

    ``shape`` [C, h, w]; normalised. ``mirrored``: each is followed by that of the mirrored image. ``made_with``: what
    decided them besides the images: hashes of files by recipe key, and values of keys.
    """

    shape: tuple[int, int, int]
    dtype: Literal["float16", "float32"]
    mirrored: bool
    made_with: dict[str, Any]

    def parsed(self, content: bytes) -> np.ndarray:
        """[1 or 2, C, h, w]: plain, and mirrored."""
        return np.frombuffer(content, dtype=self.dtype).reshape(1 + self.mirrored, *self.shape)


class Manifest(Config):
    """``image_column`` and ``label_column`` are a table's columns, or the suffixes of a tar file's members."""

    version: Literal[1] = 1
    container: Container
    num_images: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    image_column: str
    label_column: str
    shards: tuple[Shard, ...] = Field(min_length=1)
    latents: StoredLatents | None = None

    @property
    def block_sizes(self) -> list[int]:
        """Of all shards, one after the other."""
        return [size for shard in self.shards for size in shard.block_sizes]


def write_manifest(path: str, manifest: Manifest) -> None:
    """As JSON, without what is left at its default."""
    content = manifest.model_dump(mode="json", exclude_defaults=True)
    storage.write_text(path, json.dumps({"version": manifest.version, **content}, indent=1) + "\n")


def read_manifest(path: str, key: str = "data.source") -> Manifest:
    """Raises a `UserError` that names ``key`` if it is missing, no manifest, or does not add up."""
    files = RemoteFiles()
    try:
        content = files.read(path, 0, files.info(path)["size"])
    except SourceError as error:
        raise UserError(f"{key}: {error}; tools/prepare_data.py makes manifests") from error
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        finding = error.errors()[0]
        where = ".".join(str(part) for part in finding["loc"])
        raise UserError(
            f"{key}: {path} is not a manifest of tools/prepare_data.py ({where or 'content'}: {finding['msg']})"
        ) from error
    empty = [shard.path for shard in manifest.shards if not shard.num_images]
    if empty:
        raise UserError(f"{key}: {path}: {empty[0]} has no images; make the manifest again without it")
    found = sum(shard.num_images for shard in manifest.shards)
    if found != manifest.num_images:
        raise UserError(f"{key}: {path} says {manifest.num_images} images, its shards have {found}; make it again")
    return manifest


def shard_path(manifest_path: str, shard: Shard) -> str:
    """Of a shard, or of the folder that a list of files is in."""
    return storage.resolve(manifest_path.rpartition("/")[0] or ".", shard.path)


def checksum_in(about: dict[str, Any]) -> str | None:
    """What a store says of a file's content without reading it; a disk says nothing."""
    if about.get("lfs"):
        # The Hub's large files; by its versions an object or a mapping.
        lfs = about["lfs"]
        return f"sha256:{lfs['sha256'] if isinstance(lfs, dict) else lfs.sha256}"
    keys = ("crc32c", "md5Hash", "sha256", "etag", "blob_id")
    return next((f"{key}:{about[key]}" for key in keys if about.get(key)), None)


def check_shards(manifest: Manifest, manifest_path: str, key: str = "data.source") -> None:
    """Compare sizes, and checksums where the store knows them, with what is there now: one listing of each folder.

    Image files of a folder are not compared.

    Raises:
        UserError: a shard is missing or another.
    """
    paths = {shard_path(manifest_path, shard): shard for shard in manifest.shards if not shard.files}
    files = RemoteFiles()
    there: dict[str, dict[str, dict[str, Any]]] = {}
    for path, shard in paths.items():
        folder, _, name = path.rpartition("/")
        try:
            if folder not in there:
                there[folder] = files.listing(folder)
        except SourceError as error:
            raise UserError(f"{key}: {error}; put it back, or make {manifest_path} again") from error
        about = there[folder].get(name)
        if about is None:
            raise UserError(f"{key}: {path} is missing; put it back, or make {manifest_path} again")
        checksum = checksum_in(about)
        same_kind = checksum and shard.checksum and checksum.split(":")[0] == shard.checksum.split(":")[0]
        if about["size"] != shard.num_bytes or (same_kind and checksum != shard.checksum):
            raise UserError(f"{key}: {path} has changed since it was indexed; make {manifest_path} again")
