"""The discriminator: small heads on features of a frozen DINO (arXiv 2301.09515, as used in arXiv 2510.11690).

B batch, D width of the backbone, N patch tokens, K kernel, L logits of an image.

As released: the last block's features go through two heads, once as the last and once as block 11's; the norm, called
batch norm there, takes its statistics over the tokens of each image by itself, as an instance norm does. Its MLPs take
the tanh approximation of GELU, which DINO itself does not. Real and reconstructed images go through in one pass, so the
vectors of the spectral norm move on once an update, there twice.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import Config
from rae_xla.models.convert.encoders import features_only
from rae_xla.models.convert.files import read_weight_file
from rae_xla.models.functional import Tensors
from rae_xla.models.layers import TokenNorm, compute_norms_in_float32
from rae_xla.models.loading import assign_weights, on_meta, values_wanted
from rae_xla.models.resize import resize_bilinear

NORM_EPS = 1e-6
SLOPE = 0.2
SPECTRAL_EPS = 1e-12
# Ends of the names of a spectrally normalised weight and its vectors.
_WEIGHT, _LEFT, _RIGHT = ".weight", ".left", ".right"


class DiscriminatorConfig(Config):
    """DINO ViT-S/8 unless told otherwise. ``feature_blocks``: from zero; the last block is always one more.

    ``weights``: timm's file or DINO's own, safetensors or ``.pth``; ``null`` fetches timm's. ``width``, ``depth`` and
    ``num_heads`` replace the timm model's, which then has no published weights.
    """

    timm_model: str = "vit_small_patch8_224.dino"
    input_size: int = Field(default=224, gt=0)
    feature_blocks: tuple[int, ...] = Field(default=(2, 5, 8, 11), strict=False, min_length=1)
    kernel_size: int = Field(default=9, gt=0)
    width: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    weights: str | None = None

    @model_validator(mode="after")
    def _buildable(self) -> DiscriminatorConfig:
        if not timm.is_model(self.timm_model):
            raise ValueError(f"timm_model: timm has no {self.timm_model!r}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: {self.kernel_size} has no middle; use {self.kernel_size + 1}")
        try:
            backbone = on_meta(lambda: _backbone(self))
        # timm asserts that heads divide the width; a model of another family does not take the options.
        except (AssertionError, TypeError, RuntimeError) as error:
            raise ValueError(f"timm_model: {self.timm_model} cannot be built with these sizes ({error})") from error
        depth = len(backbone.blocks)
        wrong = [block for block in self.feature_blocks if not 0 <= block < depth]
        if wrong:
            raise ValueError(f"feature_blocks: {wrong[0]} is not there; blocks are 0 to {depth - 1}")
        if list(self.feature_blocks) != sorted(set(self.feature_blocks)):
            raise ValueError(f"feature_blocks: {list(self.feature_blocks)} are not in order, each once")
        return self

    @property
    def has_own_sizes(self) -> bool:
        """Whether its sizes are not those of timm's pretrained model."""
        return any(size is not None for size in (self.width, self.depth, self.num_heads))


def _backbone(config: DiscriminatorConfig) -> Any:
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.num_heads}
    options: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    options |= {"img_size": config.input_size, "num_classes": 0, "global_pool": "", "act_layer": "gelu_tanh"}
    return timm.create_model(config.timm_model, **options)


class DinoFeatures(nn.Module):
    """The frozen backbone."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        compute_norms_in_float32(self.backbone)
        # Heads look at what blocks give, which no norm follows.
        self.backbone.norm = nn.Identity()
        pretrained: Any = timm.get_pretrained_cfg(config.timm_model)
        for name, values in (("pixel_mean", pretrained.mean), ("pixel_std", pretrained.std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1] -> [H, B, D, N]: of the last block, then of each feature block."""
        size, blocks = self.config.input_size, self.config.feature_blocks
        pixels = ((resize_bilinear(images, size) + 1.0) / 2.0 - self.pixel_mean) / self.pixel_std
        backbone: Any = self.backbone
        x = backbone.patch_embed(pixels.to(backbone.patch_embed.proj.weight.dtype))
        x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(x)))
        found = []
        for number, block in enumerate(backbone.blocks):
            x = block(x)
            if number in blocks:
                found.append(x)
        tokens = torch.stack([x, *found])[:, :, backbone.num_prefix_tokens :]
        return tokens.transpose(-1, -2)


class SpectralConvolution(nn.Module):
    """A circular convolution along the tokens; its weight, as a matrix, has a largest singular value of 1.

    That value is estimated by ``left`` and ``right``, which are not trained: see `spectral_vectors`.
    """

    left: Tensor
    right: Tensor

    def __init__(self, width: int, width_out: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width, kernel_size))
        self.bias = nn.Parameter(torch.empty(width_out))
        self.register_buffer("left", torch.empty(width_out))
        self.register_buffer("right", torch.empty(width * kernel_size))

    def init_weights(self) -> None:
        """PyTorch's for a convolution; vectors of random directions."""
        bound = 1.0 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        for vector in (self.left, self.right):
            vector.copy_(functional.normalize(torch.randn_like(vector), dim=0, eps=SPECTRAL_EPS))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, N] -> [B, D_out, N]."""
        largest = self.left @ (self.weight.float().flatten(1) @ self.right)
        weight = (self.weight.float() / largest).to(self.weight.dtype)
        padding = weight.shape[-1] // 2
        return functional.conv1d(functional.pad(x, (padding, padding), mode="circular"), weight, self.bias)


class _Head(nn.Module):
    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.input = SpectralConvolution(width, width, 1)
        self.norm1 = TokenNorm(width, NORM_EPS)
        self.middle = SpectralConvolution(width, width, kernel_size)
        self.norm2 = TokenNorm(width, NORM_EPS)
        self.output = SpectralConvolution(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, N] -> [B, N]."""
        x = functional.leaky_relu(self.norm1(self.input(x)), SLOPE)
        x = (x + functional.leaky_relu(self.norm2(self.middle(x)), SLOPE)) / math.sqrt(2.0)
        return self.output(x).squeeze(1)


class DiscriminatorHeads(nn.Module):
    """What is trained of the discriminator."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = on_meta(lambda: _backbone(config)).embed_dim
        number = len(config.feature_blocks) + 1
        self.heads = nn.ModuleList(_Head(width, config.kernel_size) for _ in range(number))

    def init_weights(self) -> None:
        """Convolutions as PyTorch does, norms as they are."""
        for module in self.modules():
            if isinstance(module, SpectralConvolution):
                module.init_weights()

    def forward(self, features: Tensor) -> Tensor:
        """[H, B, D, N] -> logits float32 [B, H * N], high for images that are real."""
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1).float()


def spectral_vectors(parameters: Tensors, buffers: Tensors) -> Tensors:
    """The vectors after one more step of power iteration, as `torch.nn.utils.spectral_norm` takes at every pass.

    Of `DiscriminatorHeads`, values packed: stacks of them if the name says so. No gradient goes through it.
    """
    found = dict(buffers)
    for name in [name.removesuffix(_LEFT) for name in buffers if name.endswith(_LEFT)]:
        weight = parameters[name + _WEIGHT].detach().float().flatten(-2)  # [..., D_out, D * K]
        right = _directions(weight.transpose(-1, -2), buffers[name + _LEFT])
        found |= {name + _RIGHT: right, name + _LEFT: _directions(weight, right)}
    return found


def _directions(matrices: Tensor, vectors: Tensor) -> Tensor:
    product = (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
    return functional.normalize(product, dim=-1, eps=SPECTRAL_EPS)


def load_features(config: DiscriminatorConfig, path: str, key: str) -> DinoFeatures:
    """The frozen backbone with the weights of a file.

    Raises:
        UserError: the file is unreadable or of another model; names ``key``, the file and the difference.
    """
    module = on_meta(lambda: DinoFeatures(config))
    if values_wanted():
        kept = features_only(read_weight_file(path, key).tensors)
        assign_weights(module, {f"backbone.{name}": value for name, value in kept.items()}, path, key)
    return module.requires_grad_(False)
