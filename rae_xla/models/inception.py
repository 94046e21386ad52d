"""Inception-v3 as FID knows it: the network of 2015-12-05, whose features ADM's evaluator compares images in.

B batch, H = W image side, C channels.

Source: arXiv 1512.00567 for the architecture, ADM's evaluator (arXiv 2105.05233) for what is taken from it. Images are
scaled as TensorFlow 1 did: corners not aligned, no half-pixel centres, no antialiasing. That is linear in the pixels,
so two fixed matrices do it, within 3e-5 grey levels of the gathers that it is usually written with. Batch norms are
what they are when nothing is trained, a factor and a summand of each channel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.errors import UserError
from rae_xla.models.convert.files import read_weight_file
from rae_xla.models.convert.inception import from_torch_fidelity
from rae_xla.models.loading import assign_weights, on_meta, values_wanted

INPUT_SIZE = 299
POOL_WIDTH = 2048
NUM_LOGITS = 1008
# sFID's: the first channels of one branch, each of 17 x 17 places.
SPATIAL_CHANNELS = 7
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17 * 17

Convolutions = tuple[tuple[str, int, int | tuple[int, int]], ...]
"""Names, output channels and kernel sizes, one after the other."""


class Convolution(nn.Module):
    """Convolution, factor and summand of each channel, ReLU. Keeps height and width unless ``is_valid``."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int], *, stride: int = 1, is_valid: bool = False
    ) -> None:
        super().__init__()
        height_width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride = stride
        self.padding = (0, 0) if is_valid else (height_width[0] // 2, height_width[1] // 2)
        self.weight = nn.Parameter(torch.empty(width, channels, *height_width))
        self.scale = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, width, h', w']."""
        x = functional.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return functional.relu(x * self.scale.view(-1, 1, 1) + self.shift.view(-1, 1, 1))


class Mixed(nn.Module):
    """Branches side by side, their channels joined in order.

    ``branches``: `Convolutions` each. ``pooling``: the width of a convolution after a pooling of 3 x 3, in the last
    branch; 0 pools with stride 2 and nothing after it, and then the last convolution of each branch has that stride
    too. ``forks``: names of branches whose last two convolutions are side by side, not one after the other.
    """

    def __init__(
        self,
        channels: int,
        branches: tuple[Convolutions, ...],
        pooling: int,
        *,
        forks: tuple[str, ...] = (),
        max_pooling: bool = False,
    ) -> None:
        super().__init__()
        self._branches: list[tuple[list[str], list[str]]] = []
        self._halves, self._max_pooling = pooling == 0, max_pooling
        for branch in branches:
            names = [name for name, _, _ in branch]
            num_last = 2 if names[0].rpartition("_")[0] in forks else 1
            before = channels
            for index, (name, width, kernel) in enumerate(branch):
                halves = self._halves and index == len(branch) - 1
                self.add_module(name, Convolution(before, width, kernel, stride=1 + halves, is_valid=halves))
                before = before if num_last == 2 and index == len(branch) - 2 else width
            self._branches.append((names[:-num_last], names[-num_last:]))
        if pooling:
            self.branch_pool = Convolution(channels, pooling, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        outputs = []
        for before, last in self._branches:
            y = x
            for name in before:
                y = self.get_submodule(name)(y)
            outputs += [self.get_submodule(name)(y) for name in last]
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self._halves:
            return functional.max_pool2d(x, 3, stride=2)
        if self._max_pooling:
            pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return self.branch_pool(pooled)


def _mixed_5(channels: int, pooling: int) -> Mixed:
    branches = (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
    )
    return Mixed(channels, branches, pooling)


def _mixed_6(width: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    long = (("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, down), ("branch7x7dbl_3", width, across))
    branches = (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, across), ("branch7x7_3", 192, down)),
        (*long, ("branch7x7dbl_4", width, down), ("branch7x7dbl_5", 192, across)),
    )
    return Mixed(768, branches, 192)


def _mixed_7(channels: int, *, max_pooling: bool) -> Mixed:
    across, down = (1, 3), (3, 1)
    branches = (
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), ("branch3x3_2a", 384, across), ("branch3x3_2b", 384, down)),
        (
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            ("branch3x3dbl_3a", 384, across),
            ("branch3x3dbl_3b", 384, down),
        ),
    )
    return Mixed(channels, branches, 192, forks=("branch3x3", "branch3x3dbl"), max_pooling=max_pooling)


class Inception(nn.Module):
    """Images of one size to the features of FID and sFID."""

    resize: Tensor

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, is_valid=True)
        self.conv2d_2a_3x3 = Convolution(32, 32, 3, is_valid=True)
        self.conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.conv2d_4a_3x3 = Convolution(80, 192, 3, is_valid=True)
        self.mixed_5b, self.mixed_5c, self.mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
        self.mixed_6a = Mixed(288, ((("branch3x3", 384, 3),), double), 0)
        self.mixed_6b, self.mixed_6c, self.mixed_6d, self.mixed_6e = map(_mixed_6, (128, 160, 160, 192))
        short = (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3))
        long = (("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)))
        self.mixed_7a = Mixed(768, (short, (*long, ("branch7x7x3_4", 192, 3))), 0)
        self.mixed_7b, self.mixed_7c = _mixed_7(1280, max_pooling=False), _mixed_7(2048, max_pooling=True)
        # The Inception Score's; the features here do without.
        self.fc = nn.Linear(POOL_WIDTH, NUM_LOGITS)
        self.register_buffer("resize", torch.from_numpy(tf1_resize(image_size)), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, H, W] in [0, 255] -> FID's features float32 [B, 2048], and sFID's [B, 2023], channels last."""
        x = self.resize @ images @ self.resize.T  # [B, 3, 299, 299]
        x = (x - 128.0) * 0.0078125
        x = self.conv2d_2b_3x3(self.conv2d_2a_3x3(self.conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.conv2d_4a_3x3(self.conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]
        x = self.mixed_5d(self.mixed_5c(self.mixed_5b(x)))
        x = self.mixed_6d(self.mixed_6c(self.mixed_6b(self.mixed_6a(x))))  # [B, 768, 17, 17]
        # Of the first branch, whose channels come first.
        spatial = x[:, :SPATIAL_CHANNELS]
        x = self.mixed_7c(self.mixed_7b(self.mixed_7a(self.mixed_6e(x))))  # [B, 2048, 8, 8]
        return x.mean(dim=(2, 3)), spatial.permute(0, 2, 3, 1).flatten(1)


def tf1_resize(size: int) -> np.ndarray:
    """The matrix float32 [299, size] that scales a column of pixels as TensorFlow 1's bilinear resize does."""
    places = np.arange(INPUT_SIZE, dtype=np.float32) * (np.float32(size) / np.float32(INPUT_SIZE))
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, size - 1)
    share = (places - low).astype(np.float32)
    matrix = np.zeros((INPUT_SIZE, size), np.float32)
    rows = np.arange(INPUT_SIZE)
    matrix[rows, low] += 1 - share
    matrix[rows, high] += share
    return matrix


def load_inception(path: str, image_size: int, key: str) -> Inception:
    """The network with weights from torch-fidelity's file or one of that layout, for images of this size.

    Raises:
        UserError: the file is unreadable or of another model; names ``key``, the file and the difference.
    """
    module = on_meta(lambda: Inception(image_size))
    if values_wanted():
        try:
            tensors = from_torch_fidelity(read_weight_file(path, key).tensors)
        except ValueError as error:
            raise UserError(f"{key}: {path} is not Inception as torch-fidelity has it: {error}") from error
        assign_weights(module, tensors, path, key)
    return module.requires_grad_(False)
