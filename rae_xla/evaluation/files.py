"""Sample files: ``samples.npz`` as ADM's evaluator reads it, contact sheets, manifests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from rae_xla import storage
from rae_xla.errors import UserError


def write_samples(path: str, images: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray) -> None:
    """``arr_0`` uint8 [N, H, W, 3] of this ``shape``, handed in part by part, and ``arr_1`` int64 [N].

    No more than a part is in memory.
    """
    arrays = {
        "arr_0.npy": _npy_pieces(images, shape, np.dtype(np.uint8)),
        "arr_1.npy": _npy_pieces([labels.astype(np.int64)], labels.shape, np.dtype(np.int64)),
    }
    storage.write_pieces(path, _zipped(arrays))


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """An ``.npz`` of arrays in memory; the same arrays are the same bytes."""
    members = {f"{name}.npy": _npy_pieces([array], array.shape, array.dtype) for name, array in arrays.items()}
    storage.write_pieces(path, _zipped(members))


def write_array(path: str, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """A ``.npy`` file of an array that is handed in part by part along its first dimension."""
    storage.write_pieces(path, _npy_pieces(parts, shape, dtype))


def _npy_pieces(parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> Iterator[bytes]:
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for part in parts:
        yield np.ascontiguousarray(part, dtype).tobytes()


class _Collected(io.RawIOBase):
    """A file that cannot be gone back in, whose content is taken as it comes."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def _zipped(members: Mapping[str, Iterable[bytes]]) -> Iterator[bytes]:
    """A zip file, its members not compressed: noise and photographs would not become smaller."""
    file = _Collected()
    with zipfile.ZipFile(file, "w") as archive:
        for name, pieces in members.items():
            # The same samples are the same bytes, whenever they are written.
            about = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(about, "w", force_zip64=True) as member:
                for piece in pieces:
                    member.write(piece)
                    yield file.taken()
    yield file.taken()


def read_array(path: str, key: str) -> np.ndarray:
    """A ``.npy`` file; ``key`` is the argument to name when it cannot be read.

    Raises:
        UserError: missing, or not an array of numbers.
    """
    try:
        array = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read; correct the path") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}: {path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{key}: {path} is not a .npy file of one array of numbers")
    return array


def write_png(path: str, image: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    storage.write_bytes(path, as_png(image))


def as_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def figure_png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def contact_sheet(images: np.ndarray, columns: int, gap_pixels: int = 2) -> np.ndarray:
    """uint8 [n, H, W, 3] side by side, row by row, on white."""
    height, width = images.shape[1] + gap_pixels, images.shape[2] + gap_pixels
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height + gap_pixels, columns * width + gap_pixels, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap_pixels + index // columns * height, gap_pixels + index % columns * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet
