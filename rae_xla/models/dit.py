"""DiT on representation latents: LightningDiT at patch 1 (arXiv 2510.11690, section 4; blocks of arXiv 2501.01423).

B batch, C channels, h = w = grid of the latent, N = h * w tokens, D width.

Numerically equal to the released ``LightningDiT``; `convert` maps the released key names.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor, nn

from rae_xla.config import NamedSizes
from rae_xla.models.layers import (
    LabelEmbedder,
    ModulatedBlock,
    ModulatedBlocks,
    ModulatedOutput,
    Rotary,
    TimeEmbedder,
    check_heads,
    init_linear,
    sincos_positions,
)

# width, depth, heads
DIT_SIZES = {
    "dit_s": {"width": 384, "depth": 12, "num_heads": 6},
    "dit_b": {"width": 768, "depth": 12, "num_heads": 12},
    "dit_l": {"width": 1024, "depth": 24, "num_heads": 16},
    "dit_xl": {"width": 1152, "depth": 28, "num_heads": 16},
}


class DiTConfig(NamedSizes):
    """Sizes of a DiT: a ``name`` (dit_s, dit_b, dit_l, dit_xl) or each of them; one that is given wins over the name's.

    ``weights``: a file to start or to sample from. ``condition_init_std``: the standard deviation that label vectors
    start with. Released: 0.02, which a long training grows; a run of a thousand steps never hears its labels at that
    size.
    """

    sizes = DIT_SIZES
    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    condition_init_std: float = Field(default=0.02, ge=0)
    weights: str | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> DiTConfig:
        check_heads(self.width, self.num_heads, rotary=True)
        return self

    @property
    def narrowest_width(self) -> int:
        """The width that the velocity passes through, which Theorem 1 compares with the token width."""
        return self.width


class DiT(nn.Module):
    """Predicts the velocity of flow matching, eps - x, from a noisy latent, its time and its label."""

    positions: Tensor

    def __init__(self, config: DiTConfig, *, channels: int, grid: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.condition_init_std = config.condition_init_std
        self.time_embedder = TimeEmbedder(config.width)
        self.label_embedder = LabelEmbedder(num_classes, config.width)
        self.input = nn.Linear(channels, config.width)
        self.register_buffer("positions", sincos_positions(config.width, grid), persistent=False)
        self.rotary = Rotary(config.width // config.num_heads, grid)
        self.blocks = ModulatedBlocks(ModulatedBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.output = ModulatedOutput(config.width, channels)

    def init_weights(self) -> None:
        """The released initialisation: Xavier linear layers with zero biases; zero modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        for module in (self.time_embedder, self.output, *self.blocks):
            module.init_weights()
        nn.init.normal_(self.label_embedder.table.weight, std=self.condition_init_std)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x float32 [B, C, h, w], t float32 [B] in [0, 1], labels int [B] -> velocity float32 [B, C, h, w].

        Label ``num_classes`` stands for "no class".
        """
        tokens = x.to(self.input.weight.dtype).flatten(2).transpose(1, 2)  # [B, N, C]
        condition = (self.time_embedder(t) + self.label_embedder(labels))[:, None]  # [B, 1, D]
        z = self.input(tokens) + self.positions.to(tokens.dtype)
        z = self.blocks(z, condition, *self.rotary.tables())
        return self.output(z, condition).float().transpose(1, 2).unflatten(2, x.shape[2:])
