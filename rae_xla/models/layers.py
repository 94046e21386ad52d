"""Layers shared by the diffusion transformers and the decoder.

B batch, N tokens, D width, H heads, K = D / H width of a head, C channels of a latent token.

Fixed tables (positions, rotary angles) are computed on the host even where parameters are made on the meta device, so
that a module made there is whole once its weights are assigned.

Source: LightningDiT as used in arXiv 2510.11690 (RMSNorm, SwiGLU, 2-D rotary embedding, adaLN); the position
embeddings are those of MAE (arXiv 2111.06377).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.models.blocks import Blocks, Multiply, Values


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embeddings, float32 [grid * grid, width], tokens in row-major order.

    The first half of the width encodes the column, the second half the row; each is sines, then cosines.

    Raises:
        ValueError: ``width`` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"position embeddings need a width that is a multiple of 4, got {width}")
    with torch.device("cpu"):
        frequencies = 1.0 / 10000.0 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        rows, columns = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
        angles = [positions.flatten()[:, None] * frequencies for positions in (columns, rows)]
        return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def check_heads(width: int, num_heads: int, *, rotary: bool) -> None:
    """Raises a ValueError if attention of this width cannot have so many heads; 2-D rotary embeddings want fours."""
    if width % (4 * num_heads if rotary else num_heads):
        raise ValueError(f"width {width} does not divide over {num_heads} heads{' into fours' if rotary else ''}")


def init_linear(layer: nn.Linear) -> None:
    """Xavier weights, zero biases."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 whatever the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], same dtype."""
        return functional.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


def compute_norms_in_float32(backbone: nn.Module) -> None:
    """Replace the layer norms of a timm model by `LayerNorm`; their names stay."""
    for parent in list(backbone.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.LayerNorm):
                affine = norm.elementwise_affine
                setattr(parent, name, LayerNorm(list(norm.normalized_shape), eps=norm.eps, elementwise_affine=affine))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, in float32 whatever the input's dtype."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], same dtype."""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class TokenNorm(nn.Module):
    """Zero mean and unit variance over the tokens of each image, in float32 whatever the input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, N] -> [B, D, N], same dtype."""
        centred = x.float() - x.float().mean(dim=-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


def rotary_angles(head_width: int, grid: int, theta: float = 10000.0) -> Tensor:
    """Cosines and sines of a rotary position embedding on a square grid, float32 [2, grid * grid, head_width].

    Half of a head's channels turn with the row, half with the column; theta as in the released checkpoints.

    Raises:
        ValueError: ``head_width`` is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"2-D rotary embedding needs a head width that is a multiple of 4, got {head_width}")
    per_axis = head_width // 2
    with torch.device("cpu"):
        frequencies = 1.0 / theta ** (torch.arange(0, per_axis, 2).float() / per_axis)
        angles = (torch.arange(grid).float()[:, None] * frequencies).repeat_interleave(2, dim=1)
        rows = angles[:, None, :].expand(grid, grid, per_axis)
        columns = angles[None, :, :].expand(grid, grid, per_axis)
        both = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_width)
    return torch.stack([both.cos(), both.sin()])


class Rotary(nn.Module):
    """Turns the channels (2i, 2i + 1) of each head as a pair, by `rotary_angles`."""

    angles: Tensor
    partners: Tensor

    def __init__(self, head_width: int, grid: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.register_buffer("angles", rotary_angles(head_width, grid).transpose(1, 2).contiguous(), persistent=False)
        with torch.device("cpu"):
            pair = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
            partners = torch.block_diag(*[pair] * (head_width // 2))
        self.register_buffer("partners", partners, persistent=False)

    def tables(self) -> tuple[Tensor, Tensor]:
        """What `rotate` is given: float32 [2, K, N], and [K, K]."""
        return self.angles, self.partners


def rotate(x: Tensor, angles: Tensor, partners: Tensor) -> Tensor:
    """[B, H, K, N] -> [B, H, K, N], same dtype, by the tables of a `Rotary`."""
    cos, sin = angles
    return (x * cos + _partners_of(x, partners) * sin).to(x.dtype)


def _partners_of(x: Tensor, partners: Tensor) -> Tensor:
    """Channels (2i, 2i + 1) to (-(2i + 1), 2i)."""
    if x.device.type == "xla":
        # To take neighbours apart costs a TPU many times what this product does. It moves numbers and rounds none, but
        # where a TPU rounds the inputs of all products, see `rae_xla.precision`.
        return partners.to(x.dtype) @ x
    even, odd = x.unflatten(2, (-1, 2)).unbind(3)
    return torch.stack((-odd, even), dim=3).flatten(2, 3)


class Linear(nn.Linear):
    """A linear layer over [B, N, D] whose bias gradient suits a TPU, and whose result may come in parts."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, E]."""
        return self.parts(x, 1)[0]

    def parts(self, x: Tensor, number: int) -> tuple[Tensor, ...]:
        """[B, N, D] -> so many tensors [B, N, E / number], whose gradients are summed for the bias part by part."""
        assert self.bias is not None
        parts: tuple[Tensor, ...] = _Linear.apply(x, self.weight, self.bias, number)
        return parts


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, number: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias).chunk(number, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = torch.cat(gradients, dim=-1)
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return gradient @ weight, of_weight, torch.cat([_sum_of_rows(part) for part in gradients]), None


def _sum_of_rows(x: Tensor) -> Tensor:
    """[..., D] -> [D]."""
    if x.device.type == "xla":
        # As a product it takes a TPU a tenth of the time of a sum. Of eight rows, or the compiler makes it a sum again.
        return (torch.ones(8, x[..., 0].numel(), dtype=x.dtype, device=x.device) @ x.flatten(0, -2))[0]
    return x.flatten(0, -2).sum(dim=0)


class Attention(nn.Module):
    """Multi-head self-attention with bias; softmax in float32; rotary embedding where its tables are given.

    Tokens are the last dimension of all that a head works on: a TPU's registers are 128 lanes wide, which N fills and K
    (72 in DiT-XL) does not, and heads lie one under the other without being moved.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        assert width % num_heads == 0, (width, num_heads)
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)

    def forward(self, x: Tensor, *rotary: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        parts = self.qkv.parts(x, 3)
        q, k, v = [part.transpose(1, 2).unflatten(1, (self.num_heads, -1)) for part in parts]  # each [B, H, K, N]
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed: Tensor = _Mixed.apply(q * q.shape[-2] ** -0.5, k, v)
        return self.output(mixed.flatten(1, 2).transpose(1, 2))


class _Mixed(torch.autograd.Function):
    """Values mixed by the softmax of scores: q, k, v [B, H, K, N] -> [B, H, K, N].

    The softmax's division is done behind the product of the values, and backwards before it: on numbers of a query, of
    which there are fewer than of a query and a key. Autograd would divide behind a product that is rounded to bfloat16:
    a query's gradients of scores would not add up to zero, and what all keys have in common would leak into the query's
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = k.transpose(-2, -1) @ q  # [B, H, keys, queries]
        weights = (scores.float() - scores.amax(dim=-2, keepdim=True).float()).exp()
        # Not as a product: a TPU rounds what it multiplies, and this is the sum of what backwards is not rounded.
        total = weights.sum(dim=-2, keepdim=True)
        ctx.save_for_backward(q, k, v, weights, total)
        return ((v @ weights.to(v.dtype)) / total).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, weights, total = ctx.saved_tensors
        gradient = (gradient / total).to(v.dtype)
        of_weights = (v.transpose(-2, -1) @ gradient).float()
        common = (weights * of_weights).sum(dim=-2, keepdim=True) / total
        of_scores = (weights * (of_weights - common)).to(v.dtype)
        of_v = gradient @ weights.to(v.dtype).transpose(-2, -1)
        return k @ of_scores, q @ of_scores.transpose(-2, -1), of_v


class SwiGLU(nn.Module):
    """Gated MLP whose hidden width is two thirds of four times the width, so that its size equals a plain MLP's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(width * 4.0))
        self.gate_and_value = Linear(width, 2 * hidden)
        self.output = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        gate, value = self.gate_and_value.parts(x, 2)
        return self.output(functional.silu(gate) * value)


class ModulatedBlock(nn.Module):
    """A LightningDiT block: attention and SwiGLU, each shifted, scaled and gated by the condition (adaLN-zero).

    The condition is per sample [B, 1, D] in the backbone and per token [B, N, D] in the wide head.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.modulation = Linear(width, 6 * width)

    def init_weights(self) -> None:
        """Zero modulation: the block starts as the identity."""
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, *rotary: Tensor) -> Tensor:
        """x [B, N, D], condition [B, 1 or N, D], the tables of a `Rotary` -> [B, N, D].

        In place of the condition its modulation, [B, 1, 6 D], if that was computed ahead.
        """
        ahead = condition.shape[-1] == self.modulation.out_features
        modulation = condition if ahead else self.modulation(functional.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1), *rotary)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ModulatedBlocks(Blocks):
    """`ModulatedBlock`s, all of whose modulations are computed ahead of them where there is one condition a sample.

    A third of their parameters make the modulation, of one row a sample: in each block every device would gather what
    it hardly multiplies. At once it multiplies its own part by the rows of all.
    """

    def ahead(
        self, values: Values, multiply: Multiply, *shared: Tensor
    ) -> tuple[Values, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Blocks`."""
        condition, *rotary = shared
        if condition.shape[1] > 1:
            return values, (), shared
        product = multiply(functional.silu(condition).squeeze(1), values["modulation.weight"])
        if product is None:
            return values, (), shared
        left = {name: value for name, value in values.items() if not name.startswith("modulation.")}
        return left, ((product + values["modulation.bias"][:, None]).unsqueeze(2),), tuple(rotary)


class ModulatedOutput(nn.Module):
    """Last layer of a diffusion transformer: norm, modulation, linear; starts at zero."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, channels)

    def init_weights(self) -> None:
        """Zero everywhere, so that the first predicted velocity is zero."""
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D], condition [B, 1 or N, D] -> [B, N, C]."""
        shift, scale = self.modulation(functional.silu(condition)).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; all broadcast to [B, N, D]."""
    return x * (1 + scale) + shift


class TimeEmbedder(nn.Module):
    """Gaussian Fourier features of the time, then a two-layer MLP. The frequencies are drawn once and kept."""

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(num_frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def init_weights(self) -> None:
        """Frequencies from a standard normal; MLP weights with standard deviation 0.02."""
        nn.init.normal_(self.frequencies)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        """t float32 [B] in [0, 1] -> [B, D]. The angles are float32 whatever the weights are."""
        angles = t.float()[:, None] * self.frequencies.float() * (2 * math.pi)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One vector a class, and one more for "no class": label ``num_classes``."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """int labels [B] in 0..num_classes -> [B, D]."""
        return self.table(labels)
