"""A small decoder trained on photographs in all phases, and what noise in training costs and gains (arXiv 2510.11690).

Encoder, VGG and DINO have random weights unless their files are in the root already: what is shown is that everything
learns together, and the trade-off of the paper's table 5, not published figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn

from rae_xla import runtime, storage, tensor_files
from rae_xla.config import override
from rae_xla.data.sources import open_in_memory
from rae_xla.data.transforms import to_unit
from rae_xla.evaluation.files import figure_png
from rae_xla.evaluation.similarity import psnr
from rae_xla.losses.perceptual import LAYERS
from rae_xla.models.autoencoder import load_latent_decoder, load_latent_encoder
from rae_xla.models.discriminator import DinoFeatures
from rae_xla.models.encoders import Encoder
from rae_xla.models.loading import initialised, on_meta
from rae_xla.recipe import AutoencoderRecipe, load_recipe
from rae_xla.training.decoder_losses import latent_noise
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "photographs" / "decoder.yaml"


def decoder_phases(root: str, overrides: list[str]) -> dict[str, Any]:
    """Train `RECIPE` in ``root``; its curves, and the phases' first steps."""
    recipe = load_recipe(str(RECIPE), [*overrides, override("root", root)])
    write_untrained(recipe)
    train(recipe, runtime.create(recipe.runtime, recipe.mesh, recipe.precision))
    lines = read_metrics(recipe.path(storage.join(recipe.run_dir, "metrics.jsonl")))
    heldout = [line for line in lines if "heldout_psnr" in line]
    trained = [line for line in lines if "loss" in line]
    return {
        "heldout": [{name: line[name] for name in line if name == "step" or "heldout" in name} for line in heldout],
        "first": heldout[0],
        "last": heldout[-1],
        "discriminator_accuracy": _curve(trained, "discriminator_accuracy"),
        "adaptive_weight": _curve(trained, "adaptive_weight"),
        "lpips": _curve(trained, "lpips"),
        "steps": int(lines[-1]["step"]),
    }


def noise_trade_off(root: str, overrides: list[str]) -> dict[str, Any]:
    """PSNR of held-out images from latents with and without noise, of decoders trained with and without; L1 only."""
    found = {}
    for name, scale in (("without", 0.0), ("with", 0.8)):
        settings = ["adversarial=null", "perceptual=null", "heldout=null"]
        own = [f"latent_noise.scale={scale}", f"run_dir=noise/{name}", override("root", root)]
        recipe = load_recipe(str(RECIPE), [*settings, *overrides, *own])
        write_untrained(recipe)
        train(recipe, runtime.create(recipe.runtime, recipe.mesh, recipe.precision))
        found[name] = _psnr_of_latents(recipe)
    return found


def _psnr_of_latents(recipe: AutoencoderRecipe) -> dict[str, float]:
    trained = recipe.autoencoder.decoder.model_copy(update={"weights": recipe.weights_file})
    autoencoder = recipe.autoencoder.model_copy(update={"decoder": trained})
    encoder, decoder = load_latent_encoder(autoencoder, recipe.root), load_latent_decoder(autoencoder, recipe.root)
    images = to_unit(torch.from_numpy(open_in_memory(recipe.data, "heldout").images))
    # Noise as in training, but other draws.
    rows = torch.arange(len(images), dtype=torch.int32)
    config = load_recipe(str(RECIPE), []).latent_noise
    with torch.no_grad():
        latents = encoder(images)
        noisy = latents + latent_noise(config, recipe.seed + 1, rows, latents.shape)
        return {
            name: float(psnr(decoder(given).clamp(0, 1), images).mean())
            for name, given in (("clean", latents), ("noisy", noisy))
        }


def _curve(lines: list[dict[str, float]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), line[name]) for line in lines if name in line]


def write_untrained(recipe: AutoencoderRecipe) -> None:
    """Random weights where the recipe names files that are not there."""
    encoder = recipe.autoencoder.encoder
    _write(recipe, encoder.weights, lambda: Encoder(encoder).backbone)
    if recipe.perceptual is not None:
        _write(recipe, recipe.perceptual.weights, _untrained_vgg)
    if recipe.adversarial is not None:
        discriminator = recipe.adversarial.discriminator
        _write(recipe, discriminator.weights, lambda: DinoFeatures(discriminator).backbone)


def _write(recipe: AutoencoderRecipe, file: str | None, make: Any) -> None:
    if file is not None and not storage.exists(recipe.path(file)):
        tensor_files.write_tensors(recipe.path(file), initialised(make, 0).state_dict())


def _untrained_vgg() -> nn.Module:
    """VGG-16 up to what LPIPS looks at, under the names of its file."""
    features = on_meta(torchvision.models.vgg16).features[: LAYERS[-1] + 1].to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.ModuleDict({"features": features})


def draw(result: dict[str, Any], path: str) -> None:
    """Curves of a `decoder_phases` as a PNG."""
    figure = Figure(figsize=(9.0, 5.2))
    axes = figure.subplots(2, 2)
    steps = [line["step"] for line in result["heldout"]]
    axes[0, 0].plot(steps, [line["heldout_psnr"] for line in result["heldout"]], "o-")
    axes[0, 0].set(ylabel="PSNR of held-out images, dB")
    axes[0, 1].plot(steps, [line["heldout_lpips"] for line in result["heldout"]], "o-")
    axes[0, 1].set(ylabel="LPIPS of held-out images", ylim=(0, None))
    for axis, name in ((axes[1, 0], "discriminator_accuracy"), (axes[1, 1], "adaptive_weight")):
        axis.plot(*zip(*result[name], strict=True))
        axis.set(xlabel="step", ylabel=name.replace("_", " "), xlim=axes[0, 0].get_xlim())
    axes[1, 0].set(ylim=(0, 1))
    figure.tight_layout()
    storage.write_bytes(path, figure_png(figure))
