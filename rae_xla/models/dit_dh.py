"""DiT^DH: a diffusion transformer backbone with a wide, shallow head (arXiv 2510.11690, section 5).

B batch, C channels, h = w = grid of the latent, N = h * w tokens, D backbone width, E head width.

    z = M(x_t | t, y)      backbone, on its own embedding of x_t plus fixed positions
    v = H(x_t | z, t)      head, on a second embedding of x_t, conditioned token by token on SiLU(t + z)

A head only wide and not deep gives the width that high-dimensional latents need (Theorem 1) without paying for it in
every block. Numerically equal to the released code; `convert` maps the released key names.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import Config
from rae_xla.models.layers import (
    LabelEmbedder,
    ModulatedBlock,
    ModulatedOutput,
    RotaryEmbedding2D,
    TimeEmbedder,
    sincos_positions,
)


class DiTDHConfig(Config):
    """Sizes of a DiT^DH: the backbone's, then the head's.

    ``condition_init_std`` is the standard deviation that label vectors start with. Released: 0.02, which a long
    training grows; a run of a thousand steps never hears its labels at that size.
    """

    width: int
    depth: int
    num_heads: int
    head_width: int
    head_depth: int
    head_num_heads: int
    condition_init_std: float = 0.02


class DiTDH(nn.Module):
    """Predicts the velocity of flow matching, eps - x, from a noisy latent, its time and its label."""

    positions: Tensor

    def __init__(self, config: DiTDHConfig, *, channels: int, grid: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.condition_init_std = config.condition_init_std
        self.time_embedder = TimeEmbedder(config.width)
        self.label_embedder = LabelEmbedder(num_classes, config.width)
        self.backbone_input = nn.Linear(channels, config.width)
        self.register_buffer("positions", sincos_positions(config.width, grid), persistent=False)
        self.backbone_rotary = RotaryEmbedding2D(config.width // config.num_heads, grid)
        self.backbone = nn.ModuleList(ModulatedBlock(config.width, config.num_heads) for _ in range(config.depth))
        same_width = config.width == config.head_width
        self.condition = nn.Identity() if same_width else nn.Linear(config.width, config.head_width)
        self.head_input = nn.Linear(channels, config.head_width)
        self.head_rotary = RotaryEmbedding2D(config.head_width // config.head_num_heads, grid)
        self.head = nn.ModuleList(
            ModulatedBlock(config.head_width, config.head_num_heads) for _ in range(config.head_depth)
        )
        self.output = ModulatedOutput(config.head_width, channels)

    def init_weights(self) -> None:
        """The released initialisation: Xavier input embeddings, zero modulation and output.

        Everything else keeps PyTorch's default.
        """
        for embedding in (self.backbone_input, self.head_input):
            nn.init.xavier_uniform_(embedding.weight)
            nn.init.zeros_(embedding.bias)
        for module in (self.time_embedder, self.output, *self.backbone, *self.head):
            module.init_weights()
        nn.init.normal_(self.label_embedder.table.weight, std=self.condition_init_std)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x float32 [B, C, h, w], t float32 [B] in [0, 1], labels int [B] -> velocity float32 [B, C, h, w].

        Label ``num_classes`` stands for "no class".
        """
        tokens = x.to(self.head_input.weight.dtype).flatten(2).transpose(1, 2)  # [B, N, C]
        time = self.time_embedder(t)[:, None]  # [B, 1, D]
        condition = functional.silu(time + self.label_embedder(labels)[:, None])
        z = self.backbone_input(tokens) + self.positions.to(tokens.dtype)
        for block in self.backbone:
            z = block(z, condition, self.backbone_rotary)
        condition = self.condition(functional.silu(time + z))  # [B, N, E]
        y = self.head_input(tokens)
        for block in self.head:
            y = block(y, condition, self.head_rotary)
        return self.output(y, condition).float().transpose(1, 2).unflatten(2, x.shape[2:])


def create_dit_dh(config: DiTDHConfig, latent_shape: tuple[int, int, int], num_classes: int) -> DiTDH:
    """A DiT^DH for latents of this [C, h, w]."""
    channels, grid, _ = latent_shape
    return DiTDH(config, channels=channels, grid=grid, num_classes=num_classes)
