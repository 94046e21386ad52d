"""Frozen representation encoders through timm: images in, a grid of patch features out.

B batch, C channels, h = w = grid of patch tokens, N = h * w, p patch size in pixels.

Source: arXiv 2510.11690, section 3. Class and register tokens are dropped; the final LayerNorm has no learned scale.
"""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import Config


class EncoderConfig(Config):
    """Any vision transformer of timm by its sizes. ``weights``: a safetensors file, inside the recipe's ``root``."""

    name: Literal["timm_vit"]
    input_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    weights: str | None = None

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.input_size // self.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of a latent."""
        return self.width, self.grid, self.grid

    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [3, 1, 1] each, of the pixel space the encoder reads and the decoder writes."""
        return torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)


class Encoder(nn.Module):
    """Images to patch features. Resizing, mean and standard deviation are part of it."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.input_size % config.patch_size:
            raise ValueError(f"input_size {config.input_size} is not a multiple of patch_size {config.patch_size}")
        self.config = config
        self.backbone: Any = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=config.input_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=0,
            global_pool="",
        )
        # The released autoencoders replace the last norm's scale and shift by none at all.
        self.backbone.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        mean, std = config.pixel_stats()
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> float32 [B, C, h, w], each token of zero mean and unit variance."""
        size = (self.config.input_size, self.config.input_size)
        if images.shape[2:] != size:
            images = functional.interpolate(images, size=size, mode="bicubic", align_corners=False)
        pixels = ((images - self.pixel_mean) / self.pixel_std).to(next(self.backbone.parameters()).dtype)
        tokens = self.backbone.forward_features(pixels)[:, self.backbone.num_prefix_tokens :]
        return tokens.float().transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))
