"""Diffusion training on latents (arXiv 2510.11690, sections 4 and 5): flow matching with the shift."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from rae_xla.data.manifest import StoredLatents
from rae_xla.data.sources import open_source
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.flow.objective import flow_matching_loss, interpolate
from rae_xla.flow.schedule import training_times
from rae_xla.models.autoencoder import encoder_weights_path, load_latent_encoder, made_with
from rae_xla.models.convert.released import layout_of
from rae_xla.models.diffusion import DiffusionModel, create_diffusion_model, load_diffusion_model
from rae_xla.models.dit import DiTConfig
from rae_xla.models.dit_dh import DiTDHConfig
from rae_xla.models.functional import buffers_of, call, tensors_of
from rae_xla.models.loading import initialised, values_wanted
from rae_xla.random import Purpose, normal, uniform
from rae_xla.recipe import DiffusionRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.looks import Look
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.phases import plain_phase
from rae_xla.training.samples import SampleLook
from rae_xla.training.update import Model, initial_state

logger = logging.getLogger(__name__)


def diffusion_task(recipe: DiffusionRecipe, runtime: Runtime) -> TrainingTask:
    """The frozen encoder is part of the step: images in, a velocity loss out. Stored latents take its place."""
    latent_shape = recipe.autoencoder.encoder.latent_shape
    warn_if_narrow(recipe.model, latent_shape[0], "model")
    images = open_source(recipe.data, recipe.root, "train")
    encoder = None
    if images.latents is None:
        encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    elif values_wanted():
        _check_made_alike(images.latents, recipe)
    module = _starting_model(recipe, latent_shape, images.num_classes)
    steps_per_epoch = len(images) / recipe.data.batch_size
    num_steps = total_steps(recipe.train, steps_per_epoch)
    looks: tuple[Look, ...] = ()
    if recipe.preview is not None or recipe.scoring is not None:
        looks = (SampleLook(recipe, runtime, module, steps_per_epoch, num_steps),)
    shift = recipe.flow.shift_for(latent_shape)
    logger.info("latents %s, time shift %.4f", list(latent_shape), shift)

    def loss(model: Model, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch["positions"]
        with torch.no_grad():
            if encoder is None:
                latents = batch["latents"].float()
            else:
                latents = call(encoder, frozen["encoder"], runtime, to_unit(batch["images"]))
            times = training_times(recipe.flow, shift, recipe.seed, rows)
            noise = normal(recipe.seed, Purpose.FLOW_NOISE, rows, latent_shape)
            dropped = uniform(recipe.seed, Purpose.LABEL_DROPOUT, rows) < recipe.flow.label_dropout
            labels = torch.where(dropped, module.num_classes, batch["labels"])
        predicted = model(interpolate(latents, noise, times), times, labels)
        return flow_matching_loss(predicted, latents, noise).mean(), {}

    return TrainingTask(
        name="diffusion",
        images=images,
        num_steps=num_steps,
        module=module,
        state=initial_state(module, recipe.train),
        frozen={"buffers": buffers_of(module), **({} if encoder is None else {"encoder": tensors_of(encoder)})},
        phases=(plain_phase(module, loss, recipe, steps_per_epoch, runtime),),
        looks=looks,
        export=lambda ema: {**module.state_dict(), **ema},
        inputs={
            "autoencoder.encoder.weights": encoder_weights_path(recipe.autoencoder, recipe.root),
            **recipe.paths(
                {"autoencoder.latent_stats": recipe.autoencoder.latent_stats, "model.weights": recipe.model.weights}
            ),
        },
        about={"layout": layout_of(module).as_json()},
    )


def _check_made_alike(stored: StoredLatents, recipe: DiffusionRecipe) -> None:
    """Raises a `UserError` that names the first key by which the recipe would make other latents than are stored."""
    now = made_with(recipe.autoencoder, recipe.root, recipe.data.image_size)
    for key in sorted({*now, *stored.made_with}):
        if now.get(key) != stored.made_with.get(key):
            raise UserError(
                f"{key}: the latents of {recipe.data.source} were made with another one; encode them again, or name "
                "what they were made with"
            )
    if recipe.data.flip and not stored.mirrored:
        raise UserError(
            f"data.flip: {recipe.data.source} has no latents of mirrored images; encode them with data.flip"
        )


def _starting_model(recipe: DiffusionRecipe, latent_shape: tuple[int, int, int], num_classes: int) -> DiffusionModel:
    if recipe.model.weights is None:
        return initialised(lambda: create_diffusion_model(recipe.model, latent_shape, num_classes), recipe.seed)
    path = recipe.path(recipe.model.weights)
    return load_diffusion_model(recipe.model, latent_shape, num_classes, path, "model.weights")


def warn_if_narrow(config: DiTConfig, channels: int, key: str) -> None:
    """Theorem 1: a width below the token width puts a floor under the loss, see `narrow_width_bound`."""
    width = config.narrowest_width
    if width < channels:
        logger.warning(
            "%s: %d is below the token width %d; by Theorem 1 of the RAE paper the loss cannot then fall below %.3f, "
            "or a little more (the sum of the smallest %d eigenvalues of Cov(eps - x), each at least 1, over %d); "
            "use %d or more",
            f"{key}.{'head_width' if isinstance(config, DiTDHConfig) else 'width'}",
            width,
            channels,
            (channels - width) / channels,
            channels - width,
            channels,
            channels,
        )
