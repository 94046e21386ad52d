"""Files, local or ``gs://``, through fsspec. A file is whole or absent: writes go aside and are moved into place.

Tensors in files: `rae_xla.tensor_files`. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import uuid
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from rae_xla.errors import StoppedError, UserError, first_line

# Handed to a file at a time; an object store gets as many in one request.
PIECE_BYTES = 32 * 2**20


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
    """Names inside a directory, sorted; none if it is not there.

    Raises:
        StoppedError: nobody can say, because it cannot be reached or looked into.
    """
    filesystem, inner = open_filesystem(directory)
    try:
        filesystem.invalidate_cache(inner)
        names = filesystem.ls(inner, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # What stores and the libraries below raise has no common base.
    except Exception as error:
        raise StoppedError(f"{directory} cannot be listed ({first_line(error)}); try again when it can") from error
    return sorted(posixpath.basename(name.rstrip("/")) for name in names)


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
    """`write_pieces` of one piece."""
    write_pieces(path, [content])


def write_pieces(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a whole file; directories are made. An object store writes atomically; a disk gets a file and a rename.

    Raises:
        UserError: it cannot be written there. StoppedError: not now.
    """
    filesystem, inner = open_filesystem(path)
    try:
        filesystem.makedirs(posixpath.dirname(inner), exist_ok=True)
        if is_local(filesystem):
            _write_aside(inner, pieces)
        else:
            _upload(filesystem, inner, pieces)
    except OSError as error:
        why = f"{path}: cannot be written ({error.strerror or first_line(error)})"
        if is_local(filesystem) or isinstance(error, PermissionError | FileNotFoundError):
            raise UserError(f"{why}; give another path") from error
        raise StoppedError(f"{why}; try again when it can") from error


def _write_aside(path: str, pieces: Iterable[bytes | memoryview]) -> None:
    aside = f"{path}.{uuid.uuid4().hex[:8]}.partial"
    try:
        with Path(aside).open("wb") as file:
            for piece in pieces:
                file.write(piece)
            # A file that has its name has its content, whatever happens to the machine.
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        directory = os.open(posixpath.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        Path(aside).unlink(missing_ok=True)


def _upload(filesystem: Any, path: str, pieces: Iterable[bytes | memoryview]) -> None:
    pieces = iter(pieces)
    first = next(pieces, b"")
    second = next(pieces, None)
    if second is None:
        return filesystem.pipe_file(path, bytes(first))
    file = filesystem.open(path, "wb", block_size=PIECE_BYTES)
    try:
        for piece in chain((first, second), pieces):
            file.write(piece)
        file.close()
    except BaseException:
        # Or it would be closed, and so be there, when it is forgotten.
        file.closed = True
        file.discard()
        raise


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


def is_local(filesystem: Any) -> bool:
    """Is it this machine's own, of `open_filesystem`?"""
    return "file" in filesystem.protocol
