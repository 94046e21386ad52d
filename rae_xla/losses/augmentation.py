"""Differentiable augmentation of what a discriminator sees: translation and colour (arXiv 2006.10738), without cutout.

B batch, H = W image side. Everything is drawn for each image by itself, and shapes are fixed: an image is moved by two
products with matrices of zeros and ones, which a TPU does in passing and which have a gradient. At a TPU's default
precision pixels are rounded to bfloat16 by it, real and reconstructed ones alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.random import Purpose, uniform

# Of the image's side.
LARGEST_SHIFT = 0.125
NUM_DRAWN = 5


def drawn(seed: int, purpose: Purpose, rows: Tensor) -> Tensor:
    """What `augmented` takes: float32 [B, 5] in [0, 1), for the samples of these positions in the run, int32 [B]."""
    return uniform(seed, purpose, rows, (NUM_DRAWN,))


def augmented(images: Tensor, numbers: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] moved and recoloured; what comes in from the edge is 0.

    ``numbers`` [B, 5] in [0, 1): down, right, brightness, saturation, contrast. An image moves by whole pixels, up to
    an eighth of its side either way; then 0.5 is added at most, or taken; colours go from none to twice as strong;
    contrast from half to one and a half.
    """
    down, right, brightness, saturation, contrast = (column.view(-1, 1, 1, 1) for column in numbers.unbind(dim=1))
    images = _moved(images, down, right)
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2.0 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _moved(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    side = images.shape[-1]
    # Each output row is one input row, or none.
    rows = _choice(down, side)  # [B, 1, H, H]
    columns = _choice(right, side)
    return rows @ images @ columns.transpose(-1, -2)


def _choice(number: Tensor, side: int) -> Tensor:
    """[B, 1, 1, 1] in [0, 1) -> float32 [B, 1, side, side]: one in row i at column i + shift, if there is one."""
    largest = round(side * LARGEST_SHIFT)
    shift = (number * (2 * largest + 1)).floor() - largest
    positions = torch.arange(side, device=number.device, dtype=torch.float32)
    return (positions == positions[:, None] + shift).float()
