"""What a folder of stored parts says it holds, and its values, checked as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rae_xla import storage, tensor_files
from rae_xla.data.remote import RemoteFiles
from rae_xla.errors import SourceError, first_line

INDEX_FILE = "index.json"
MARKER_FILE = "complete.json"
FORMAT = 1
# For one answer of the store, and for all tries at one.
TIMEOUT_SECONDS = 60.0
GIVE_UP_SECONDS = 300.0


class DamagedError(Exception):
    """What was stored is not as it was written; one line that names the file."""


@dataclass(frozen=True)
class StoredPart:
    """Where the values of a part are."""

    file: str
    begin: int
    crc32: int
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class StoredIndex:
    """What a folder says it holds.

    Raises:
        DamagedError: the index or the marker is not as it was written.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        try:
            content = storage.read_bytes(storage.join(directory, INDEX_FILE))
            marker = storage.read_json(storage.join(directory, MARKER_FILE))
            if hashlib.sha256(content).hexdigest() != marker["index_sha256"]:
                raise ValueError("it is not what was written")
            index = json.loads(content)
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}, this version reads {FORMAT}")
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise DamagedError(f"{storage.join(directory, INDEX_FILE)}: {first_line(error)}") from error
        self.about: dict[str, Any] = index["about"]
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(t["shape"]) for name, t in index["tensors"].items()}
        self.dtypes = {name: tensor_files.DTYPES[t["dtype"]] for name, t in index["tensors"].items()}
        self.parts = {
            name: [
                StoredPart(p["file"], p["begin"], p["crc32"], tuple(p["offsets"]), tuple(p["shape"]))
                for p in tensor["parts"]
            ]
            for name, tensor in index["tensors"].items()
        }
        for name, shape in self.shapes.items():
            if sum(math.prod(part.shape) for part in self.parts[name]) != math.prod(shape):
                raise DamagedError(f"{storage.join(directory, INDEX_FILE)}: the parts of {name} are not all of it")
        self._files = RemoteFiles(TIMEOUT_SECONDS, GIVE_UP_SECONDS)
        self._sizes: dict[str, int] = {}

    def read(self, name: str, part: StoredPart) -> Tensor:
        """A part's values.

        Raises:
            DamagedError: they are not as they were written.
            SourceError: the store does not answer.
        """
        path = storage.join(self.directory, part.file)
        dtype = self.dtypes[name]
        size = math.prod(part.shape) * dtype.itemsize
        if self._size(path) < part.begin + size:
            raise DamagedError(f"{path} is cut short")
        # What came over a network is asked for once more before the file is taken for damaged.
        for _ in range(2):
            content = self._files.read(path, part.begin, part.begin + size)
            if zlib.crc32(content) == part.crc32:
                return torch.frombuffer(bytearray(content), dtype=dtype).reshape(part.shape)
        raise DamagedError(f"{path} is damaged ({name} has another checksum)")

    def _size(self, path: str) -> int:
        if path not in self._sizes:
            try:
                self._sizes[path] = int(self._files.info(path)["size"])
            except SourceError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise DamagedError(f"{path} is not there") from error
                raise
        return self._sizes[path]

    def whole(self, name: str) -> Tensor:
        """All values of a tensor. Raises as `read` does."""
        if len(self.parts[name]) == 1:
            return self.read(name, self.parts[name][0])
        values = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        for part in self.parts[name]:
            narrowed(values, part.offsets, part.shape).copy_(self.read(name, part))
        return values


def narrowed(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The part of a tensor that begins there and is that long."""
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor
