"""Decoder training on a frozen encoder (arXiv 2510.11690, sections 3 and 4.3): L1 loss on noise-augmented features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rae_xla.data.sources import open_images
from rae_xla.data.transforms import to_unit
from rae_xla.models.autoencoder import LatentDecoder, encoder_weights_path, load_latent_decoder, load_latent_encoder
from rae_xla.models.convert.released import layout_of
from rae_xla.models.functional import buffers_of, call, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.random import Purpose, normal, uniform
from rae_xla.recipe import AutoencoderRecipe, LatentNoiseConfig
from rae_xla.runtime import Runtime
from rae_xla.training.diagnosis import make_diagnosis
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.update import initial_state, make_update


def autoencoder_task(recipe: AutoencoderRecipe, runtime: Runtime) -> TrainingTask:
    """The decoder learns to undo the encoder, from features with noise of random size added.

    Where the recipe names weights of the decoder, training starts from them.
    """
    images = open_images(recipe.data, recipe.root, "train")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    if recipe.autoencoder.decoder.weights is None:
        module = initialised(lambda: LatentDecoder(recipe.autoencoder), recipe.seed)
    else:
        module = load_latent_decoder(recipe.autoencoder, recipe.root)
    steps_per_epoch = len(images) / recipe.data.batch_size

    def loss(model: Callable[..., Tensor], frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        original = to_unit(batch["images"])
        with torch.no_grad():
            features = call(encoder, frozen["encoder"], runtime, original)
            noise = latent_noise(recipe.latent_noise, recipe.seed, batch["positions"], features.shape)
        difference = model(features + noise) - original
        return difference.abs().mean(), {"mean_squared_error": difference.square().mean()}

    return TrainingTask(
        name="decoder",
        images=images,
        num_steps=total_steps(recipe.train, steps_per_epoch),
        module=module,
        state=initial_state(module),
        frozen={"buffers": buffers_of(module), "encoder": tensors_of(encoder)},
        update=make_update(module, loss, recipe.train, recipe.compute, steps_per_epoch, runtime),
        diagnosis=make_diagnosis(module, loss, recipe.compute, runtime),
        export=lambda ema: {name.removeprefix("decoder."): value for name, value in ema.items()},
        inputs={
            "autoencoder.encoder.weights": encoder_weights_path(recipe.autoencoder, recipe.root),
            **recipe.paths({"autoencoder.decoder.weights": recipe.autoencoder.decoder.weights}),
        },
        about={"layout": layout_of(module.decoder).as_json()},
    )


def latent_noise(config: LatentNoiseConfig, seed: int, rows: Tensor, shape: torch.Size) -> Tensor:
    """sigma * n for features of ``shape`` [B, C, h, w], one sigma an image; ``rows`` int32 [B]."""
    if config.distribution == "half_normal":
        sigma = normal(seed, Purpose.LATENT_NOISE_SCALE, rows).abs()
    else:
        sigma = uniform(seed, Purpose.LATENT_NOISE_SCALE, rows)
    noise = normal(seed, Purpose.LATENT_NOISE, rows, tuple(shape[1:]))
    return config.scale * sigma.reshape(-1, 1, 1, 1) * noise
