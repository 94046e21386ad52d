"""Files, local or ``gs://``, through fsspec. A file is whole or absent: writes go aside and are moved into place."""

from __future__ import annotations

import json
import posixpath
import uuid
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from rae_xla.errors import UserError


def resolve(root: str, path: str) -> str:
    """``path`` as it is if absolute or a URL, else inside ``root``."""
    return path if path.startswith("/") or "://" in path else posixpath.join(root, path)


def join(directory: str, *names: str) -> str:
    """A path inside a directory that may be a URL."""
    return posixpath.join(directory, *names)


def exists(path: str) -> bool:
    """Is there a file or directory of this name?"""
    filesystem, inner = url_to_fs(path)
    return bool(filesystem.exists(inner))


def list_names(directory: str) -> list[str]:
    """Names inside a directory, sorted; none if it is not there."""
    filesystem, inner = url_to_fs(directory)
    if not filesystem.isdir(inner):
        return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in filesystem.ls(inner, detail=False))


def remove(path: str) -> None:
    """Delete a file or a directory with all in it."""
    filesystem, inner = url_to_fs(path)
    filesystem.rm(inner, recursive=True)


def read_bytes(path: str) -> bytes:
    """Raises FileNotFoundError if there is no such file."""
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def read_json(path: str) -> Any:
    """The content of a JSON file."""
    return json.loads(read_bytes(path))


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file; directories are made. An object store writes atomically; a disk gets a file and a rename."""
    filesystem, inner = url_to_fs(path)
    filesystem.makedirs(posixpath.dirname(inner), exist_ok=True)
    if "file" not in filesystem.protocol:
        filesystem.pipe_file(inner, content)
        return
    aside = f"{inner}.{uuid.uuid4().hex[:8]}.partial"
    filesystem.pipe_file(aside, content)
    filesystem.mv(aside, inner)


def write_text(path: str, content: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str, content: Any) -> None:
    """Indented JSON with a line end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_tensors(path: str, key: str) -> dict[str, Tensor]:
    """A safetensors file; ``key`` is the recipe key to name when it cannot be read.

    Raises:
        UserError: missing, or not a safetensors file.
    """
    try:
        return parse_safetensors(read_bytes(path))
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read; make it first, or correct the path") from error
    except SafetensorError as error:
        raise UserError(f"{key}: {path} is not a safetensors file, or is cut short ({error})") from error


def write_tensors(path: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """A safetensors file; ``about`` goes into its metadata as JSON.

    One metadata key only: safetensors writes several in random order, and equal content should be equal bytes.
    """
    metadata = None if about is None else {"rae_xla": json.dumps(about)}
    write_bytes(path, format_safetensors({k: v.contiguous() for k, v in tensors.items()}, metadata=metadata))
