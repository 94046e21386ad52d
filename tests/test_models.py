"""Sizes, counts and construction of the named models and of every recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from rae_xla.data.sources import SOURCES
from rae_xla.errors import UserError
from rae_xla.models.autoencoder import AutoencoderConfig, LatentDecoder
from rae_xla.models.classifier import LinearProbe, create_classifier
from rae_xla.models.diffusion import create_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.dit_dh import DiTDHConfig
from rae_xla.models.encoders import Encoder, EncoderConfig
from rae_xla.models.flops import ModelCost, model_costs, parameters_millions
from rae_xla.models.inception import Inception
from rae_xla.models.loading import initialised, on_meta
from rae_xla.recipe import load_recipe

# Millions of parameters of what each recipe trains or samples with; the frozen encoder not counted.
RECIPES = {
    "quickstart/encoder": 0.2449,
    "quickstart/judge": 0.1903,
    "quickstart/decoder": 0.4362,
    "quickstart/guide": 0.4831,
    "quickstart/diffusion": 1.0704,
    "quickstart/sample_unguided": 1.0704,
    "quickstart/sample_classifier_free": 1.0704,
    "quickstart/sample_autoguidance": 1.0704,
    "quickstart/overfit": 0.4338,
    "quickstart/linear_probe": 0.00097,
    "quickstart/latent_stats": 0.0,
    "quickstart/evaluation": 0.4362,
    # Without an autoencoder, the network whose features are compared: Inception with the logits of its score.
    "evaluation/inception": 23.87,
    "evaluation/imagenet_val_256_rfid": 23.87,
    "evaluation/dinov2_l": 303.2,
    "evaluation/reconstruction": 415.4,
    "photographs/decoder": 0.2410,
    "linear_probe/dinov2_b": 0.769,
    "decoders/dinov2_b": 415.4,
    "decoders/dinov2_s": 414.9,
    "decoders/dinov2_l": 415.7,
    "decoders/siglip2_b": 415.4,
    "decoders/mae_b": 415.4,
    "decoders/dinov2_b_512": 416.2,
    "decoders/dinov2_b_512_upsampled": 418.0,
    "released/dinov2_b": 415.4,
    "released/dinov2_b_512": 416.2,
    "released/siglip2_b": 415.4,
    "released/mae_b": 415.4,
    "released/imagenet256": 838.7,
    "released/imagenet256_autoguidance": 838.7,
    "released/imagenet512": 839.6,
    "released/imagenet512_autoguidance": 839.6,
    **{f"diffusion/dit_dh_{size}": count for size, count in {"s": 196.5, "b": 294.3, "l": 621.7, "xl": 838.7}.items()},
    **{f"diffusion/dit_{size}": count for size, count in {"s": 33.65, "b": 131.9, "l": 459.9, "xl": 677.2}.items()},
    **{f"diffusion/dit_dh_xl_{kind}": 838.7 for kind in ("800", "unconditional", "512_upsampled")},
    "diffusion/dit_dh_xl_512": 839.6,
    "diffusion/dit_xl_dinov2_s": 676.4,
    "diffusion/guide_256": 196.5,
    "diffusion/guide_512": 196.7,
    "synthetic/dit_dh_xl": 838.7,
    "synthetic/decoder": 415.4,
}
BASES = {"quickstart/latents", "quickstart/autoencoder", "decoders/imagenet256"}
BASES |= {f"diffusion/{name}" for name in ("imagenet256", "dit", "dit_dh")}


@pytest.fixture(scope="module")
def costs() -> dict[str, ModelCost]:
    return {cost.name: cost for cost in model_costs()}


def test_parameters_are_those_of_the_paper(costs: dict[str, ModelCost]) -> None:
    compared = {name: cost for name, cost in costs.items() if cost.paper_params_millions is not None}
    assert compared.keys() == {"vit_b", "vit_l", "vit_xl", "dit_xl", "dit_dh_xl"}
    for name, cost in compared.items():
        # The paper says 676 M of DiT-XL; with the released keys and shapes it is 677.2.
        allowed = 1.3 if name == "dit_xl" else 0.06
        assert abs(cost.params_millions - cost.paper_params_millions) < allowed, (name, cost)


def test_multiply_adds_are_those_of_the_paper(costs: dict[str, ModelCost]) -> None:
    compared = [cost for cost in costs.values() if cost.paper_gflops is not None]
    assert len(compared) == 6
    for cost in compared:
        assert cost.gflops_as_paper == pytest.approx(cost.paper_gflops, rel=0.005), cost
        assert cost.gflops > cost.gflops_as_paper


def num_classes_of(recipe: Any) -> int:
    """ImageNet's if the recipe names a manifest, which is not here."""
    return SOURCES[recipe.data.source].num_classes if recipe.data.source in SOURCES else 1000


def built(recipe: Any) -> torch.nn.Module | None:
    if recipe.task == "classifier":
        return create_classifier(recipe.model, image_size=recipe.data.image_size, num_classes=10)
    if recipe.task == "linear_probe":
        return LinearProbe(recipe.autoencoder.encoder.latent_shape[0], num_classes_of(recipe))
    if recipe.task in ("diffusion", "sampling"):
        num_classes = recipe.num_classes if recipe.task == "sampling" else num_classes_of(recipe)
        return create_diffusion_model(recipe.model, recipe.autoencoder.encoder.latent_shape, num_classes)
    if recipe.autoencoder is None:
        return Encoder(recipe.features) if isinstance(recipe.features, EncoderConfig) else Inception(256)
    return None if recipe.task == "latent_stats" else LatentDecoder(recipe.autoencoder).decoder


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_builds_on_the_meta_device(path: Path) -> None:
    name = str(path.relative_to(ROOT / "recipes").with_suffix(""))
    if name in BASES:
        with pytest.raises(UserError, match="task: missing"):
            load_recipe(str(path), [])
        return
    recipe = load_recipe(str(path), [])
    module = on_meta(lambda: built(recipe) or torch.nn.Identity())
    assert parameters_millions(module) == pytest.approx(RECIPES[name], rel=1e-3)
    if getattr(recipe, "autoencoder", None) is not None:
        encoder = on_meta(lambda: Encoder(recipe.autoencoder.encoder))
        assert all(parameter.is_meta for parameter in encoder.parameters())
        # The latents that the recipe's sizes promise are those the encoder gives.
        side = recipe.autoencoder.encoder.input_size
        with torch.no_grad():
            features = encoder.to("meta")(torch.empty(2, 3, side, side, device="meta"))
        assert features.shape[1:] == recipe.autoencoder.encoder.latent_shape


def test_an_explicit_size_wins_over_the_name() -> None:
    config = DiTDHConfig.model_validate({"name": "dit_dh_xl", "head_depth": 6, "head_width": 1152})
    assert (config.width, config.depth, config.head_depth, config.head_width) == (1152, 28, 6, 1152)
    with pytest.raises(ValueError, match="name 'dit_xxl' is not known; use dit_s, dit_b, dit_l, dit_xl"):
        DiTConfig.model_validate({"name": "dit_xxl"})


@pytest.mark.parametrize("config", [DiTConfig(width=32, depth=1, num_heads=2), None], ids=["dit", "dit_dh"])
def test_unconditional_is_one_class(config: DiTConfig | None) -> None:
    config = config or DiTDHConfig(width=32, depth=1, num_heads=2, head_width=32, head_depth=1, head_num_heads=2)
    model = initialised(lambda: create_diffusion_model(config, (8, 4, 4), num_classes=1), 0)
    assert model.label_embedder.table.weight.shape[0] == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        x, t = torch.randn(3, 8, 4, 4), torch.rand(3)
        velocity, null = (model(x, t, torch.full((3,), label)) for label in (0, 1))
    assert velocity.shape == x.shape and (velocity - null).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("input_size", "patch_size", "image_size"), [(224, 16, 256), (224, 32, 512), (448, 16, 512)], ids=str
)
def test_decoders_make_the_pixels_of_the_paper(input_size: int, patch_size: int, image_size: int) -> None:
    """256 px; 512 px from 256 tokens by patch 32; 512 px from 1,024 tokens."""
    content = {
        "encoder": {"name": "dinov2_b", "input_size": input_size},
        "decoder": {"name": "vit_b", "patch_size": patch_size, "depth": 1},
    }
    config = AutoencoderConfig.model_validate(content)
    assert config.image_size == image_size
    decoder = on_meta(lambda: LatentDecoder(config)).to("meta")
    with torch.no_grad():
        images = decoder(torch.empty(2, *config.encoder.latent_shape, device="meta"))
    assert images.shape == (2, 3, image_size, image_size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "dinov3"}, "name 'dinov3' is not known; use dinov2_s"),
        ({"name": "timm_vit", "timm_model": "vit_base_patch32_224.foo", "input_size": 224}, "timm has no"),
        ({"name": "timm_vit", "timm_model": "vit_base_r50_s16_224", "input_size": 224}, "is not a plain"),
        ({"name": "dinov2_b", "input_size": 230}, "input_size: 230 is not a multiple of the patch size 14"),
        ({"name": "dinov2_b", "timm_model": "vit_tiny_patch16_224"}, "goes with name: timm_vit"),
        ({"name": "timm_vit", "timm_model": "vit_none", "input_size": 224}, "timm has no 'vit_none'"),
        (
            {"name": "timm_vit", "timm_model": "resnet50", "input_size": 224},
            "resnet50 (cannot be built|is not a plain)",
        ),
        ({"name": "timm_vit", "timm_model": "vit_tiny_patch16_224", "input_size": 32, "width": 50}, "cannot be built"),
    ],
)
def test_encoders_that_cannot_be(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig.model_validate(content)
