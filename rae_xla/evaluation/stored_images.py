"""Sets of images in files, for scores: an ``.npz`` as ADM's evaluator reads it, or a folder of pictures.

Images are read as they are needed, from the first on.
"""

from __future__ import annotations

import io
import logging
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
import numpy as np

from rae_xla import storage
from rae_xla.data.transforms import decoded
from rae_xla.errors import UserError, first_line

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.npz"
IMAGES = "arr_0"
LABELS = "arr_1"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What damage and other formats lead to: a bare array is no archive, a cut file ends, a member does not inflate.
_DAMAGE = (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


class StoredImages(Protocol):
    """Square images, read as they are wanted."""

    @property
    def path(self) -> str:
        """The file or folder."""

    @property
    def labels(self) -> np.ndarray | None:
        """Whole numbers [n], if there are any."""

    @property
    def image_size(self) -> int:
        """Height and width."""

    def __len__(self) -> int: ...

    def rows(self, begin: int, end: int, size: int) -> Iterator[np.ndarray]:
        """Images ``begin`` to ``end``, uint8 [up to ``size``, S, S, 3] at a time.

        Raises:
            UserError: the file ends before, or a picture is none.
        """


@dataclass(frozen=True)
class ArchivedImages:
    """``arr_0`` of an ``.npz``."""

    path: str
    key: str
    shape: tuple[int, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """See `StoredImages`."""
        return self.shape[1]

    def rows(self, begin: int, end: int, size: int) -> Iterator[np.ndarray]:
        """See `StoredImages`."""
        of_one = int(np.prod(self.shape[1:]))
        with _archive(self.path, self.key) as archive, archive.open(f"{IMAGES}.npy") as member:
            _read_header(member)
            _skip(member, begin * of_one)
            for first in range(begin, end, size):
                number = min(size, end - first)
                content = member.read(number * of_one)
                if len(content) != number * of_one:
                    raise UserError(f"{self.key}: {self.path} is cut short")
                yield np.frombuffer(content, np.uint8).reshape(number, *self.shape[1:])


@dataclass(frozen=True)
class Pictures:
    """Image files of a folder, in the order of their names."""

    path: str
    key: str
    names: list[str]
    image_size: int
    labels: None = None

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, begin: int, end: int, size: int) -> Iterator[np.ndarray]:
        """See `StoredImages`."""
        for first in range(begin, end, size):
            names = self.names[first : min(first + size, end)]
            yield np.stack([_picture(storage.join(self.path, name), self.key, self.image_size) for name in names])


@dataclass(frozen=True)
class ImagesInMemory:
    """An array of images, uint8 [n, S, S, 3]."""

    path: str
    images: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> int:
        """See `StoredImages`."""
        return int(self.images.shape[1])

    def rows(self, begin: int, end: int, size: int) -> Iterator[np.ndarray]:
        """See `StoredImages`."""
        for first in range(begin, end, size):
            yield self.images[first : min(first + size, end)]


def images_at(images: StoredImages, indices: np.ndarray, size: int = 256) -> np.ndarray:
    """Those with these indices, in their order: uint8 [k, S, S, 3]. All up to the last of them are read."""
    found: dict[int, np.ndarray] = {}
    end = int(indices.max()) + 1
    for begin, rows in zip(range(0, end, size), images.rows(0, end, size), strict=True):
        for index in indices[(indices >= begin) & (indices < begin + len(rows))].tolist():
            found[index] = rows[index - begin].copy()
    return np.stack([found[index] for index in indices.tolist()])


def open_stored(path: str, key: str) -> StoredImages:
    """Images of an ``.npz``, of a folder that holds ``samples.npz``, or of a folder of pictures.

    Raises:
        UserError: there are none, or they are not square and uint8; names ``key``.
    """
    if not path.endswith(".npz") and storage.is_directory(path):
        names = storage.list_names(path)
        if SAMPLES_FILE in names:
            return open_stored(storage.join(path, SAMPLES_FILE), key)
        names = [name for name in names if name.lower().endswith(PICTURES)]
        if not names:
            raise UserError(f"{key}: {path} holds neither {SAMPLES_FILE} nor pictures ({', '.join(PICTURES)})")
        return Pictures(path, key, names, len(_picture(storage.join(path, names[0]), key, None)))
    with _archive(path, key) as archive:
        if f"{IMAGES}.npy" not in archive.namelist():
            raise UserError(f"{key}: {path} holds no images ({IMAGES}), but {_listed(archive)}")
        with archive.open(f"{IMAGES}.npy") as member:
            shape, is_fortran, dtype = _read_header(member)
    _check_images(shape, dtype, path, key)
    if is_fortran:
        raise UserError(f"{key}: {path} holds its images in Fortran's order; save them in C's")
    small = read_arrays(path, key)
    labels = small.get(LABELS)
    if labels is not None and labels.dtype.kind not in "iu":
        logger.info("%s: %s of %s are %s, and not taken for labels", key, LABELS, path, labels.dtype)
        labels = None
    if labels is not None and labels.shape != shape[:1]:
        raise UserError(f"{key}: {path} has {shape[0]} images, and labels ({LABELS}) of shape {list(labels.shape)}")
    return ArchivedImages(path, key, shape, labels)


def has_images(path: str, key: str) -> bool:
    """Whether an ``.npz`` holds images. Raises a `UserError` if it is none."""
    with _archive(path, key) as archive:
        return f"{IMAGES}.npy" in archive.namelist()


def read_arrays(path: str, key: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` but its images. Raises a `UserError` if it is none; nothing is unpickled."""
    with _archive(path, key) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        found = {}
        for name in names:
            if name != IMAGES:
                content = io.BytesIO(archive.read(f"{name}.npy"))
                found[name] = np.lib.format.read_array(content, allow_pickle=False)
        return found


@contextmanager
def _archive(path: str, key: str) -> Iterator[zipfile.ZipFile]:
    try:
        with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read; make it first, or correct the path") from error
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{key}: {path} is not an .npz file, or is damaged ({first_line(error)})") from error


def _listed(archive: zipfile.ZipFile) -> str:
    return ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _skip(member: Any, num_bytes: int) -> None:
    while num_bytes:
        num_bytes -= len(member.read(min(num_bytes, 2**24))) or num_bytes


def _picture(path: str, key: str, image_size: int | None) -> np.ndarray:
    try:
        pixels = np.asarray(decoded(storage.read_bytes(path)))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read ({first_line(error)})") from error
    _check_images((1, *pixels.shape), pixels.dtype, path, key)
    if image_size is not None and len(pixels) != image_size:
        raise UserError(f"{key}: {path} has {len(pixels)} pixels a side, the first picture has {image_size}")
    return pixels


def _check_images(shape: tuple[int, ...], dtype: np.dtype, path: str, key: str) -> None:
    if dtype != np.uint8 or len(shape) != 4 or not shape[0] or shape[1] != shape[2] or shape[3] != 3:
        raise UserError(f"{key}: images of {path} are {dtype} {list(shape)}, should be uint8 [n, S, S, 3] in 0..255")
