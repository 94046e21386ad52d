"""The diffusion transformers as one choice in a recipe: a DiT, or a DiT^DH, by name or by sizes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from rae_xla.models.dit import DiT, DiTConfig
from rae_xla.models.dit_dh import DiTDH, DiTDHConfig
from rae_xla.models.loading import load_weights, on_meta

DiffusionModel = DiT | DiTDH


def _kind(content: Any) -> str:
    if not isinstance(content, dict):
        return "dit_dh" if isinstance(content, DiTDHConfig) else "dit"
    has_head = any(key.startswith("head_") for key in content) or str(content.get("name")).startswith("dit_dh")
    return "dit_dh" if has_head else "dit"


DiffusionModelConfig = Annotated[
    Annotated[DiTConfig, Tag("dit")] | Annotated[DiTDHConfig, Tag("dit_dh")], Discriminator(_kind)
]


def create_diffusion_model(
    config: DiTConfig | DiTDHConfig, latent_shape: tuple[int, int, int], num_classes: int
) -> DiffusionModel:
    """The model that this configuration describes, for latents of this [C, h, w]; one class means unconditional."""
    channels, grid, _ = latent_shape
    if isinstance(config, DiTDHConfig):
        return DiTDH(config, channels=channels, grid=grid, num_classes=num_classes)
    return DiT(config, channels=channels, grid=grid, num_classes=num_classes)


def load_diffusion_model(
    config: DiTConfig | DiTDHConfig, latent_shape: tuple[int, int, int], num_classes: int, path: str, key: str
) -> DiffusionModel:
    """The model with the weights of a file, ours or released.

    Raises:
        UserError: the file is unreadable or of another model; names ``key``, the file and the difference.
    """
    model = on_meta(lambda: create_diffusion_model(config, latent_shape, num_classes))
    load_weights(model, path, key, backbone_depth=config.depth)
    return model
