"""The pixel decoder of a Representation Autoencoder: a vision transformer in the style of MAE's decoder.

B batch, C channels of a latent token, h = w = grid, N = h * w tokens, D width, p patch size in pixels.

Source: arXiv 2510.11690, section 3; layout and initialisation of MAE's decoder (arXiv 2111.06377).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import Config
from rae_xla.models.layers import Attention, sincos_positions

LAYER_NORM_EPS = 1e-12


class DecoderConfig(Config):
    """Sizes of a decoder. ``weights``: a safetensors file, inside the recipe's ``root``."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int
    weights: str | None = None


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attention = Attention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.hidden = nn.Linear(config.width, config.mlp_width)
        self.output = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.output(functional.gelu(self.hidden(self.norm2(x))))


class Decoder(nn.Module):
    """The encoder's features to pixels, in the encoder's normalised pixel space (mean and std not put back)."""

    positions: Tensor

    def __init__(self, config: DecoderConfig, *, channels: int, grid: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.input = nn.Linear(channels, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("positions", sincos_positions(config.width, grid), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.output = nn.Linear(config.width, config.patch_size**2 * 3)

    def init_weights(self) -> None:
        """Xavier weights and zero biases in every linear layer; the class token starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """features float32 [B, C, h, w] -> float32 [B, 3, h * p, w * p]."""
        grid = features.shape[-1]
        tokens = features.to(self.input.weight.dtype).flatten(2).transpose(1, 2)
        x = self.input(tokens) + self.positions.to(tokens.dtype)
        # The class token stands at position zero of the position table, which is zero: nothing to add.
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        patches = self.output(self.norm(x))[:, 1:].float().unflatten(2, (self.patch_size, self.patch_size, 3))
        patches = patches.unflatten(1, (grid, grid))  # [B, h, w, p, p, 3]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
