"""Tensors in files, local or ``gs://``: safetensors, and PyTorch's own without its pickles."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from rae_xla import storage
from rae_xla.errors import UserError

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


def read_tensors(path: str, key: str) -> dict[str, Tensor]:
    """A safetensors file; a local one is mapped, so that only what is used takes memory.

    ``key`` is the recipe key or argument to name when it cannot be read.

    Raises:
        UserError: missing, or not a safetensors file.
    """
    filesystem, inner = storage.open_filesystem(path)
    try:
        return load_safetensors(inner) if storage.is_local(filesystem) else parse_safetensors(storage.read_bytes(path))
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
    filesystem, inner = storage.open_filesystem(path)
    try:
        if storage.is_local(filesystem):
            Path(inner).open("rb").close()
            source: Any = inner
        else:
            source = io.BytesIO(storage.read_bytes(path))
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
            yield from (data[begin : begin + storage.PIECE_BYTES] for begin in range(0, len(data), storage.PIECE_BYTES))

    storage.write_pieces(path, pieces())
    return [len(head) + begin for begin in begins]


def bytes_of(tensor: Tensor) -> memoryview:
    """A host tensor's values as they lie in a file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
