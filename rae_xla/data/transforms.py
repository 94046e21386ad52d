"""What happens to an image between the source and the batch. Bytes stay uint8 until the device."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from rae_xla.errors import first_line
from rae_xla.random import Purpose, uniform


def shift_randomly(images: np.ndarray, largest: int, seed: int, positions: np.ndarray) -> np.ndarray:
    """Each image moved by its own whole numbers in -largest..largest down and right; edges fill with zero.

    uint8 [B, H, W, 3] -> the same. ``positions`` int32 [B] are the samples' positions in the run.
    """
    if largest == 0:
        return images
    drawn = uniform(seed, Purpose.IMAGE_SHIFT, torch.from_numpy(positions), (2,)).numpy()
    offsets = np.floor(drawn * (2 * largest + 1)).astype(int)  # into the padded image
    padded = np.pad(images, ((0, 0), (largest, largest), (largest, largest), (0, 0)))
    height, width = images.shape[1:3]
    moved = [image[y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)]
    return np.stack(moved)


Resampling = Literal["fast", "exact"]
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


def decoded(file: Any) -> Image.Image:
    """An image file, or its bytes, as RGB and upright; what is transparent in it keeps its colour.

    Raises:
        ValueError: not an image, cut short, or of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel; convert it to 8 first")
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("no image of a known kind") from error
    # Damaged bytes stop Pillow's readers anywhere, with any exception.
    except Exception as error:
        raise ValueError(first_line(error)) from error


def decoded_fast(content: bytes) -> Image.Image | np.ndarray:
    """`decoded`, or the same pixels [H, W, 3] sooner: most files are whole JPEG of three channels.

    Raises:
        ValueError: see `decoded`.
    """
    # A file that is cut short would come with its end in grey, and without a word.
    if not (content.startswith(_JPEG_START) and content.rstrip(b"\0").endswith(_JPEG_END)):
        return decoded(content)
    file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        pixels = decode_jpeg(file, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    except RuntimeError:
        return decoded(content)
    return pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else decoded(content)


def centre_crop(image: Image.Image | np.ndarray, size: int, resampling: Resampling = "exact") -> np.ndarray:
    """The middle of an RGB image, uint8 [size, size, 3], its short side scaled to fit, as ADM prepares ImageNet.

    While the short side is at least twice the size, halved by averaging; then bicubic (arXiv 2105.05233, appendix).
    ``exact`` has the released preparation's pixels. ``fast`` is bicubic by other code, in a fifth of the time: one
    value in some hundreds differs, by 1 of 255 or rarely 2.
    """
    if isinstance(image, np.ndarray) and min(image.shape[:2]) >= 2 * size:
        image = Image.fromarray(image)
    while isinstance(image, Image.Image) and min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    pixels = _scaled(image, size, resampling)
    return _cut(pixels, size, (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2)


def random_crop(
    image: Image.Image | np.ndarray, short_side: int, size: int, drawn: tuple[float, float], resampling: Resampling
) -> np.ndarray:
    """A part of an RGB image whose short side is scaled to ``short_side``, uint8 [size, size, 3].

    ``drawn``: two numbers in [0, 1) that say where, down and right.
    """
    pixels = _scaled(image, short_side, resampling)
    top, left = [int(u * (side - size + 1)) for u, side in zip(drawn, pixels.shape, strict=False)]
    return _cut(pixels, size, top, left)


def _scaled(image: Image.Image | np.ndarray, short_side: int, resampling: Resampling) -> np.ndarray:
    if resampling == "exact":
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        scale = short_side / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    pixels = np.array(image) if isinstance(image, Image.Image) else image
    scale = short_side / min(pixels.shape[:2])
    height, width = [round(side * scale) for side in pixels.shape[:2]]
    scaled = interpolate(_channels_last(pixels), size=(height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def mirrored(pixels: np.ndarray) -> np.ndarray:
    """Left for right; [H, W, 3] -> the same."""
    # NumPy takes ten times as long to turn pixels of three bytes round.
    return _channels_last(pixels).flip(-1)[0].permute(1, 2, 0).numpy()


def _channels_last(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] -> a view [1, 3, H, W] that PyTorch knows to lie channels last: the dimension of one comes first."""
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def _cut(pixels: np.ndarray, size: int, top: int, left: int) -> np.ndarray:
    return pixels[top : top + size, left : left + size]


def to_unit(images: Tensor) -> Tensor:
    """On the device: uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255.0


def to_bytes(images: Tensor) -> Tensor:
    """On the device: [B, 3, H, W] -> uint8 [B, H, W, 3]; clamped, times 255, truncated as released."""
    return (images.float().clamp(0.0, 1.0) * 255.0).to(torch.uint8).permute(0, 2, 3, 1)
