"""Files, local or ``gs://``, through fsspec. A file is whole or absent: writes go aside and are moved into place."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import posixpath
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from rae_xla.errors import StoppedError, UserError, first_line

# The key of a safetensors file's metadata that holds what is said about it.
_ABOUT = "rae_xla"
# As safetensors names them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Handed to a file at a time; an object store gets as many in one request.
_PIECE_BYTES = 32 * 2**20


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
        UserError: it cannot be written there.
    """
    filesystem, inner = open_filesystem(path)
    try:
        filesystem.makedirs(posixpath.dirname(inner), exist_ok=True)
        if _is_local(filesystem):
            _write_aside(inner, pieces)
        else:
            _upload(filesystem, inner, pieces)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); give another path"
        ) from error


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
    file = filesystem.open(path, "wb", block_size=_PIECE_BYTES)
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


def write_tensors(path: str, tensors: Mapping[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """A safetensors file; ``about`` goes into its metadata as JSON."""
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    stream_tensors(path, described, (tensors[name] for name in in_file_order(described)), about)


def in_file_order(described: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    """Names as `stream_tensors` wants their values: largest types first, so that all can be mapped."""
    return sorted(described, key=lambda name: -described[name][0].itemsize)


def stream_tensors(
    path: str,
    described: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    values: Iterable[Tensor],
    about: dict[str, Any] | None = None,
) -> list[int]:
    """A safetensors file of tensors that are made one after the other, `in_file_order`. Returns where each begins.

    Equal content is equal bytes.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": {_ABOUT: json.dumps(about)}}
    begins, end = [], 0
    for name in in_file_order(described):
        dtype, shape = described[name]
        begins.append(end)
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begins[-1], end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    head = len(content).to_bytes(8, "little") + content

    def pieces() -> Iterator[bytes | memoryview]:
        yield head
        for tensor in values:
            data = bytes_of(tensor)
            yield from (data[begin : begin + _PIECE_BYTES] for begin in range(0, len(data), _PIECE_BYTES))

    write_pieces(path, pieces())
    return [len(head) + begin for begin in begins]


def bytes_of(tensor: Tensor) -> memoryview:
    """A host tensor's values as they lie in a file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
