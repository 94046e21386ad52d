"""Resizing as two matrix products, which every device runs well, and splits like any other; also backwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Keys' cubic convolution with PyTorch's coefficient.
_A = -0.75


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """float32 [B, 3, H, W] -> float32 [B, 3, size, size]: ``interpolate(mode="bicubic", align_corners=False)``.

    No antialiasing, edges repeated, as the released autoencoders resize; equal to PyTorch's to 1e-5 where products are
    float32.
    """
    return _resized(images, size, (-1, 0, 1, 2), _cubic)


def resize_bilinear(images: Tensor, size: int) -> Tensor:
    """float32 [B, 3, H, W] -> float32 [B, 3, size, size]: ``interpolate(mode="bilinear", align_corners=False)``.

    As `resize_bicubic`; so the released discriminator resizes what it sees.
    """
    return _resized(images, size, (0, 1), lambda distance: 1 - distance)


def _resized(images: Tensor, size: int, taps: tuple[int, ...], kernel: Callable[[Tensor], Tensor]) -> Tensor:
    for _ in range(2):  # The last dimension, then by transposition the one before it.
        weights = _weights(images.shape[-1], size, images.device, taps, kernel)
        images = (images @ weights.T).transpose(-1, -2)
    return images


def _weights(
    size_in: int, size_out: int, device: torch.device, taps: tuple[int, ...], kernel: Callable[[Tensor], Tensor]
) -> Tensor:
    """float32 [size_out, size_in]; each row holds the taps of one output pixel."""
    positions = torch.arange(size_in, device=device, dtype=torch.float32)
    centres = (torch.arange(size_out, device=device, dtype=torch.float32) + 0.5) * (size_in / size_out) - 0.5
    first = centres.floor()
    weights = torch.zeros(size_out, size_in, device=device)
    for offset in taps:
        tap = first + offset
        clamped = tap.clamp(0, size_in - 1)[:, None]
        weights = weights + (positions == clamped) * kernel((centres - tap).abs())[:, None]
    return weights


def _cubic(distance: Tensor) -> Tensor:
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
