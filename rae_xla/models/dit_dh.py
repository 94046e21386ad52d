"""DiT^DH: a diffusion transformer backbone with a wide, shallow head (arXiv 2510.11690, section 5).

B batch, C channels, h = w = grid of the latent, N = h * w tokens, D backbone width, E head width.

    z = M(x_t | t, y)      backbone, on its own embedding of x_t plus fixed positions
    v = H(x_t | z, t)      head, on a second embedding of x_t, conditioned token by token on SiLU(t + z)

A head only wide and not deep gives the width that high-dimensional latents need (Theorem 1) without paying for it in
every block. Numerically equal to the released code; `convert` maps the released key names.
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.models.dit import DIT_SIZES, DiTConfig
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

HEAD = {"head_width": 2048, "head_depth": 2, "head_num_heads": 16}
DIT_DH_SIZES = {name.replace("dit_", "dit_dh_"): {**sizes, **HEAD} for name, sizes in DIT_SIZES.items()}


class DiTDHConfig(DiTConfig):
    """Sizes of a DiT^DH, as for a DiT: of the backbone, then of the head.

    Names: dit_dh_s, dit_dh_b, dit_dh_l, dit_dh_xl.
    """

    sizes = DIT_DH_SIZES
    head_width: int = Field(gt=0)
    head_depth: int = Field(gt=0)
    head_num_heads: int = Field(gt=0)

    @model_validator(mode="after")
    def _head_fits(self) -> DiTDHConfig:
        check_heads(self.head_width, self.head_num_heads, rotary=True)
        return self

    @property
    def narrowest_width(self) -> int:
        """See `DiTConfig`; only the head has to be wide."""
        return self.head_width


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
        self.backbone_rotary = Rotary(config.width // config.num_heads, grid)
        self.backbone = ModulatedBlocks(ModulatedBlock(config.width, config.num_heads) for _ in range(config.depth))
        same_width = config.width == config.head_width
        self.condition = nn.Identity() if same_width else nn.Linear(config.width, config.head_width)
        self.head_input = nn.Linear(channels, config.head_width)
        self.head_rotary = Rotary(config.head_width // config.head_num_heads, grid)
        self.head = ModulatedBlocks(
            ModulatedBlock(config.head_width, config.head_num_heads) for _ in range(config.head_depth)
        )
        self.output = ModulatedOutput(config.head_width, channels)

    def init_weights(self) -> None:
        """The released initialisation: Xavier input embeddings, zero modulation and output.

        Everything else keeps PyTorch's default.
        """
        for embedding in (self.backbone_input, self.head_input):
            init_linear(embedding)
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
        z = self.backbone(z, condition, *self.backbone_rotary.tables())
        condition = self.condition(functional.silu(time + z))  # [B, N, E]
        y = self.head(self.head_input(tokens), condition, *self.head_rotary.tables())
        return self.output(y, condition).float().transpose(1, 2).unflatten(2, x.shape[2:])
