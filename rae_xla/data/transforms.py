"""What happens to an image between the source and the batch. Bytes stay uint8 until the device."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image, ``size`` pixels square, its short side scaled to fit, as ADM prepares ImageNet.

    While the short side is at least twice the size, halved by averaging; then bicubic (arXiv 2105.05233, appendix).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_unit(images: Tensor) -> Tensor:
    """On the device: uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255.0


def to_bytes(images: Tensor) -> Tensor:
    """On the device: [B, 3, H, W] -> uint8 [B, H, W, 3]; clamped, times 255, truncated as released."""
    return (images.float().clamp(0.0, 1.0) * 255.0).to(torch.uint8).permute(0, 2, 3, 1)
