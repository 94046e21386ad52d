"""Sample files: ``samples.npz`` as ADM's evaluator reads it, contact sheets, manifests."""

from __future__ import annotations

import hashlib
import io
import zipfile

import numpy as np
from PIL import Image

from rae_xla import storage
from rae_xla.errors import UserError


def write_samples(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    """``arr_0`` uint8 [N, H, W, 3] and ``arr_1`` int64 [N]."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images, labels.astype(np.int64))
    storage.write_bytes(path, buffer.getvalue())


def read_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a sample file.

    Raises:
        UserError: missing, not an npz file, or without ``arr_0`` and ``arr_1``.
    """
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as arrays:
            return arrays["arr_0"], arrays["arr_1"]
    except OSError as error:
        raise UserError(f"samples: {path} cannot be read; make it with tools/sample.py") from error
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"samples: {path} is not a sample file with arr_0 (images) and arr_1 (labels)") from error


def write_png(path: str, image: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    storage.write_bytes(path, buffer.getvalue())


def contact_sheet(images: np.ndarray, columns: int, gap_pixels: int = 2) -> np.ndarray:
    """uint8 [n, H, W, 3] side by side, row by row, on white."""
    height, width = images.shape[1] + gap_pixels, images.shape[2] + gap_pixels
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height + gap_pixels, columns * width + gap_pixels, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap_pixels + index // columns * height, gap_pixels + index % columns * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def file_hash(path: str) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(storage.read_bytes(path)).hexdigest()
