"""Files, local or ``gs://``, through fsspec. A file is whole or absent: writes go aside and are moved into place."""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import uuid
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from rae_xla.errors import UserError

# The key of a safetensors file's metadata that holds what is said about it.
_ABOUT = "rae_xla"


def resolve(root: str, path: str) -> str:
    """``path`` as it is if absolute or a URL, else inside ``root``."""
    return path if path.startswith("/") or "://" in path else posixpath.join(root, path)


def join(directory: str, *names: str) -> str:
    """A path inside a directory that may be a URL."""
    return posixpath.join(directory, *names)


def open_filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system and the path inside it.

    Raises:
        UserError: a URL whose kind is unknown.
    """
    try:
        return url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: cannot be reached ({error}); give a local path or a gs:// URL") from error


def exists(path: str) -> bool:
    """Is there a file or directory of this name?"""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.exists(inner))


def is_directory(path: str) -> bool:
    """Is there a directory of this name?"""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.isdir(inner))


def list_names(directory: str) -> list[str]:
    """Names inside a directory, sorted; none if it is not there."""
    filesystem, inner = open_filesystem(directory)
    if not filesystem.isdir(inner):
        return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in filesystem.ls(inner, detail=False))


def remove(path: str) -> None:
    """Delete a file or a directory with all in it."""
    filesystem, inner = open_filesystem(path)
    filesystem.rm(inner, recursive=True)


def read_bytes(path: str) -> bytes:
    """Raises FileNotFoundError if there is no such file."""
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def read_json(path: str) -> Any:
    """The content of a JSON file."""
    return json.loads(read_bytes(path))


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file; directories are made. An object store writes atomically; a disk gets a file and a rename.

    Raises:
        UserError: it cannot be written there.
    """
    filesystem, inner = open_filesystem(path)
    try:
        filesystem.makedirs(posixpath.dirname(inner), exist_ok=True)
        if _is_local(filesystem):
            _write_aside(inner, content)
        else:
            filesystem.pipe_file(inner, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another path") from error


def _write_aside(path: str, content: bytes) -> None:
    aside = f"{path}.{uuid.uuid4().hex[:8]}.partial"
    try:
        Path(aside).write_bytes(content)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def content_hash(path: str) -> str:
    """SHA-256 of a file's content."""
    with fsspec.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str, content: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str, content: Any) -> None:
    """Indented JSON with a line end."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_tensors(path: str, key: str) -> dict[str, Tensor]:
    """A safetensors file; a local one is mapped, so that only what is used takes memory.

    ``key`` is the recipe key or argument to name when it cannot be read.

    Raises:
        UserError: missing, or not a safetensors file.
    """
    filesystem, inner = open_filesystem(path)
    try:
        return load_safetensors(inner) if _is_local(filesystem) else parse_safetensors(read_bytes(path))
    except OSError as error:
        raise _unreadable(path, key) from error
    except SafetensorError as error:
        raise UserError(f"{key}: {path} is not a safetensors file, or is cut short ({error})") from error


def read_about(path: str) -> dict[str, Any]:
    """What `write_tensors` was told about a file's content; empty if nothing."""
    with fsspec.open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header.get("__metadata__", {}).get(_ABOUT, "{}"))


def read_pickle(path: str, key: str) -> Any:
    """A ``.pt`` file of tensors in plain containers; nothing else is unpickled.

    Raises:
        UserError: missing, not such a file, or with other objects in it.
    """
    filesystem, inner = open_filesystem(path)
    try:
        if _is_local(filesystem):
            Path(inner).open("rb").close()
            source: Any = inner
        else:
            source = io.BytesIO(read_bytes(path))
    except OSError as error:
        raise _unreadable(path, key) from error
    try:
        # Mapped, a training's file costs the memory of the weights that are taken from it.
        mapped = isinstance(source, str) and zipfile.is_zipfile(source)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    # Bytes that are no such file can stop the reader anywhere, with any exception.
    except Exception as error:
        raise UserError(f"{key}: {path} is not a checkpoint of plain tensors, or is cut short") from error


def _unreadable(path: str, key: str) -> UserError:
    return UserError(f"{key}: {path} cannot be read; make or download it first, or correct the path")


def _is_local(filesystem: Any) -> bool:
    return "file" in filesystem.protocol


def write_tensors(path: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """A safetensors file; ``about`` goes into its metadata as JSON.

    One metadata key only: safetensors writes several in random order, and equal content should be equal bytes.
    """
    metadata = None if about is None else {_ABOUT: json.dumps(about)}
    write_bytes(path, format_safetensors({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))
