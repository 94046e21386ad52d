"""The pixel decoder of a Representation Autoencoder: a vision transformer in the style of MAE's decoder.

B batch, C channels of a latent token, h = w = grid, N = h * w tokens, D width, p patch size in pixels.

Source: arXiv 2510.11690, section 3; layout and initialisation of MAE's decoder (arXiv 2111.06377).
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import NamedSizes
from rae_xla.models.blocks import Blocks
from rae_xla.models.layers import Attention, LayerNorm, Linear, check_heads, init_linear, sincos_positions

LAYER_NORM_EPS = 1e-12


# The decoders of the paper, table 2.
DECODER_SIZES = {
    "vit_b": {"patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_width": 3072},
    "vit_l": {"patch_size": 16, "width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096},
    "vit_xl": {"patch_size": 16, "width": 1152, "depth": 28, "num_heads": 16, "mlp_width": 4096},
}


class DecoderConfig(NamedSizes):
    """Sizes of a decoder: a ``name`` (vit_b, vit_l, vit_xl) or each of them; one that is given wins over the name's.

    An image side is ``patch_size`` times the latent's grid: 16 gives 256 px from 16x16 tokens, 32 gives 512 px.
    ``weights``: safetensors, or the released ``.pt``; inside the recipe's ``root`` if relative.
    """

    sizes = DECODER_SIZES
    patch_size: int = Field(gt=0)
    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    weights: str | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> DecoderConfig:
        check_heads(self.width, self.num_heads, rotary=False)
        if self.width % 4:
            raise ValueError(f"width: {self.width} is not a multiple of 4, which fixed positions need")
        return self


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.attention = Attention(config.width, config.num_heads)
        self.norm2 = LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.hidden = Linear(config.width, config.mlp_width)
        self.output = Linear(config.mlp_width, config.width)

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
        self.blocks = Blocks(DecoderBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.output = nn.Linear(config.width, config.patch_size**2 * 3)

    def init_weights(self) -> None:
        """Xavier weights and zero biases in every linear layer; the class token starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, features: Tensor) -> Tensor:
        """features float32 [B, C, h, w] -> float32 [B, 3, h * p, w * p]."""
        grid = features.shape[-1]
        tokens = features.to(self.input.weight.dtype).flatten(2).transpose(1, 2)
        x = self.input(tokens) + self.positions.to(tokens.dtype)
        # The class token stands at position zero of the position table, which is zero: nothing to add.
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.blocks(x)
        patches = self.output(self.norm(x))[:, 1:].float().unflatten(2, (self.patch_size, self.patch_size, 3))
        patches = patches.unflatten(1, (grid, grid))  # [B, h, w, p, p, 3]
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
