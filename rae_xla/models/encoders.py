"""Frozen representation encoders through timm: images in, a grid of patch features out.

B batch, C channels, h = w = grid of patch tokens, N = h * w, p patch size in pixels.

Source: arXiv 2510.11690, section 3. Class and register tokens are dropped; the final LayerNorm has no learned scale,
but for Web-SSL's.

The released autoencoders were made with the Hugging Face ports of these encoders, and the numbers here are the ports'
(tests/test_encoders.py, 1e-5). Where timm differs, this file follows the port: SigLIP's GELU is the tanh approximation,
MAE's norms have eps 1e-12, and position embeddings are resampled as the port does it, once, when weights are loaded:
bicubic, with antialiasing for DINOv2 with registers and without for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from pydantic import Field, model_validator
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from rae_xla.config import Config
from rae_xla.errors import UserError
from rae_xla.models.convert.encoders import features_only, is_port, timm_from_port
from rae_xla.models.convert.files import read_weight_file
from rae_xla.models.layers import compute_norms_in_float32
from rae_xla.models.loading import assign_weights, on_meta, values_wanted
from rae_xla.models.resize import resize_bicubic


@dataclass(frozen=True, kw_only=True)
class EncoderRow:
    """timm's model, the input size its autoencoder was trained at, and where its port differs from timm.

    ``port``: what diffusers calls it.
    ``affine_norm``: the last norm keeps its learned scale and shift. ``is_published``: timm has weights of it.
    """

    timm_model: str
    input_size: int
    port: str | None = None
    norm_eps: float | None = None
    antialias_positions: bool = False
    affine_norm: bool = False
    is_published: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def _dinov2(size: str) -> EncoderRow:
    timm_model = f"vit_{size}_patch14_reg4_dinov2.lvd142m"
    return EncoderRow(timm_model=timm_model, input_size=224, port="dinov2", antialias_positions=True)


ENCODERS = {
    "dinov2_s": _dinov2("small"),
    "dinov2_b": _dinov2("base"),
    "dinov2_l": _dinov2("large"),
    "siglip2_b": EncoderRow(
        timm_model="vit_base_patch16_siglip_256.v2_webli",
        input_size=256,
        port="siglip2",
        options={"act_layer": "gelu_tanh"},
    ),
    # Of the second paper (arXiv 2601.16208).
    "siglip2_so400m": EncoderRow(
        timm_model="vit_so400m_patch14_siglip_224.v2_webli",
        input_size=224,
        port="siglip2",
        options={"act_layer": "gelu_tanh"},
    ),
    "webssl_dino_l": EncoderRow(
        timm_model="vit_large_patch14_dinov2.lvd142m",
        input_size=224,
        affine_norm=True,
        is_published=False,
    ),
    "mae_b": EncoderRow(timm_model="vit_base_patch16_224.mae", input_size=256, port="mae", norm_eps=1e-12),
}


GENERIC = "timm_vit"


class EncoderConfig(Config):
    """One of `ENCODERS` by name, or ``timm_vit``: any vision transformer of timm by its ``timm_model``.

    ``input_size``: the side that images are resized to; the named ones have a default. The sizes below it replace those
    of the timm model, which then has no pretrained weights. ``weights``: safetensors of timm, of the transformers port
    or trained here, inside the recipe's ``root`` if relative; ``null`` fetches timm's from the Hugging Face hub.
    """

    name: str
    timm_model: str
    input_size: int = Field(gt=0)
    patch_size: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    depth: int | None = Field(default=None, gt=0)
    num_heads: int | None = Field(default=None, gt=0)
    weights: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("name") in (None, GENERIC):
            return content
        row = ENCODERS.get(str(content["name"]))
        if row is None:
            raise ValueError(f"name {content['name']!r} is not known; use {', '.join(ENCODERS)} or {GENERIC}")
        if content.get("timm_model", row.timm_model) != row.timm_model:
            raise ValueError("timm_model: another model than the name's goes with name: timm_vit")
        return {"timm_model": row.timm_model, "input_size": row.input_size, **content}

    @model_validator(mode="after")
    def _buildable(self) -> EncoderConfig:
        if not timm.is_model(self.timm_model) or _pretrained_cfg(self.timm_model) is None:
            raise ValueError(f"timm_model: timm has no {self.timm_model!r}")
        patch_size = _shape_facts(self)[0]
        if self.input_size % patch_size:
            raise ValueError(f"input_size: {self.input_size} is not a multiple of the patch size {patch_size}")
        return self

    @property
    def row(self) -> EncoderRow:
        """How to build it."""
        return ENCODERS.get(self.name) or EncoderRow(timm_model=self.timm_model, input_size=self.input_size)

    @property
    def timm_options(self) -> dict[str, Any]:
        """What timm's ``create_model`` is given."""
        row = self.row
        sizes = {
            "patch_size": self.patch_size,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }
        norm = {} if row.norm_eps is None else {"norm_layer": partial(nn.LayerNorm, eps=row.norm_eps)}
        return {
            **row.options,
            **norm,
            **{name: size for name, size in sizes.items() if size is not None},
            "img_size": self.input_size,
            "num_classes": 0,
            "global_pool": "",
        }

    @property
    def has_own_sizes(self) -> bool:
        """Whether its sizes are not those of timm's pretrained model."""
        return any(size is not None for size in (self.patch_size, self.width, self.depth, self.num_heads))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of a latent."""
        patch_size, width = _shape_facts(self)
        grid = self.input_size // patch_size
        return width, grid, grid

    def pixel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [3, 1, 1] each, of the pixel space the encoder reads and the decoder writes."""
        pretrained = _pretrained_cfg(self.timm_model)
        assert pretrained is not None  # checked when the configuration was made
        mean, std = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in (pretrained.mean, pretrained.std))
        return mean, std


def _pretrained_cfg(timm_model: str) -> Any:
    try:
        return timm.get_pretrained_cfg(timm_model)
    except RuntimeError:  # An unknown tag behind a known name.
        return None


@lru_cache
def _shape_facts(config: EncoderConfig) -> tuple[int, int]:
    """Patch size and width, as timm builds it. At timm's own input size: the recipe's may not be divisible."""
    options = {**config.timm_options, "depth": 1}
    del options["img_size"]
    try:
        with torch.device("meta"):
            backbone: Any = timm.create_model(config.timm_model, **options)
    # timm asserts that heads divide the width; a model of another family does not take the options.
    except (AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(f"{config.timm_model} cannot be built with these sizes ({error})") from error
    plain = isinstance(backbone, VisionTransformer) and isinstance(backbone.norm, nn.LayerNorm)
    if not plain or backbone.pos_embed is None or not isinstance(backbone.patch_embed, PatchEmbed):
        raise ValueError(f"timm_model: {config.timm_model} is not a plain vision transformer with position embeddings")
    return backbone.patch_embed.patch_size[0], backbone.embed_dim


class Encoder(nn.Module):
    """Images to patch features. Resizing, mean and standard deviation are part of it."""

    backbone: Any
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        backbone: Any = timm.create_model(config.timm_model, **config.timm_options)
        if not config.row.affine_norm:
            # The released autoencoders replace the last norm's scale and shift by none at all.
            backbone.norm = nn.LayerNorm(config.latent_shape[0], eps=backbone.norm.eps, elementwise_affine=False)
        compute_norms_in_float32(backbone)
        self.backbone = backbone
        mean, std = config.pixel_stats()
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] -> float32 [B, C, h, w], each token of zero mean and unit variance.

        But for an encoder whose last norm is kept.
        """
        size = self.config.input_size
        if images.shape[2:] != (size, size):
            images = resize_bicubic(images, size)
        pixels = ((images - self.pixel_mean) / self.pixel_std).to(self.backbone.pos_embed.dtype)
        tokens = self.backbone.forward_features(pixels)[:, self.backbone.num_prefix_tokens :]
        return tokens.float().transpose(1, 2).unflatten(2, self.config.latent_shape[1:])


def load_encoder(config: EncoderConfig, path: str, key: str) -> Encoder:
    """The encoder with the weights of a file: timm's, a transformers port's, or an encoder trained here.

    What features do not need is left out; positions of another grid are resampled.

    Raises:
        UserError: the file is unreadable or of another model; names ``key``, the file and the difference.
    """
    encoder = on_meta(lambda: Encoder(config))
    if not values_wanted():
        return encoder.requires_grad_(False)
    tensors = read_weight_file(path, key).tensors
    try:
        tensors = timm_from_port(tensors) if is_port(tensors) else tensors
        tensors = _fitted(tensors, encoder)
    except ValueError as error:
        raise UserError(f"{key}: {path}: {error}") from error
    assign_weights(encoder, tensors, path, key)
    return encoder.requires_grad_(False)


def _fitted(tensors: Mapping[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    kept = features_only(tensors, with_norm=encoder.config.row.affine_norm)
    if "pos_embed" in kept:
        model, config = encoder.backbone, encoder.config
        num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        grid, antialias = config.latent_shape[1], config.row.antialias_positions
        kept["pos_embed"] = resample_positions(kept["pos_embed"], grid, num_prefix, antialias)
    return {f"backbone.{name}": value for name, value in kept.items()}


def resample_positions(positions: Tensor, grid: int, num_prefix: int, antialias: bool) -> Tensor:
    """Position embeddings [1, P + n * n, D] -> [1, P + grid * grid, D]; the P prefix positions stay as they are.

    Raises:
        ValueError: the positions do not form a square.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"pos_embed: {patches.shape[1]} positions do not form a square; is it another encoder's?")
    if side == grid:
        return positions
    square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    square = functional.interpolate(
        square, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    ).to(positions.dtype)
    return torch.cat([prefix, square.flatten(2).transpose(1, 2)], dim=1)
