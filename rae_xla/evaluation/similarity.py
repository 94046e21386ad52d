"""How near an image comes to another: PSNR and SSIM, on the host in float64 or on the device in float32.

B batch, H = W image side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SSIM_SIGMA = 1.5
SSIM_BORDER = 5


def as_unit(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float64 [B, 3, H, W] in [0, 1], for scores on the host."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255.0


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B]; both [B, 3, H, W] in [0, 1]. 100 for equal images."""
    errors = (first - second).square().mean(dim=(1, 2, 3))
    return -10.0 * errors.clamp(min=1e-10).log10()


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity, [B]; both [B, 3, H, W] in [0, 1], larger than 10 pixels.

    Wang et al. 2004: Gaussian window of standard deviation 1.5 and 11 pixels, on each channel, population variances;
    the mean leaves out a border of 5 pixels, as scikit-image's does. Libraries that pad and keep the border give other
    numbers.
    """
    mean1, mean2 = _blurred(first), _blurred(second)
    variance1, variance2 = _blurred(first.square()) - mean1.square(), _blurred(second.square()) - mean2.square()
    covariance = _blurred(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + 0.01**2) / (mean1.square() + mean2.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance1 + variance2 + 0.03**2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blurred(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 3, H - 10, W - 10]. Sums of shifted images: a TPU's products would round to bfloat16."""
    taps = [math.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) for offset in range(-SSIM_BORDER, SSIM_BORDER + 1)]
    for dim in (2, 3):
        length = images.shape[dim] - 2 * SSIM_BORDER
        shifted = [images.narrow(dim, begin, length) * (tap / sum(taps)) for begin, tap in enumerate(taps)]
        images = torch.stack(shifted).sum(dim=0)
    return images
