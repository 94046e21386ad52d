"""Decoder training on a frozen encoder (arXiv 2510.11690, sections 3 and 4.3): L1, LPIPS and an adversarial loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rae_xla.data.sources import ImageSet, ShardedImages, open_images
from rae_xla.errors import UserError
from rae_xla.losses.perceptual import TIMM_MODEL, load_perceptual_distance
from rae_xla.models.autoencoder import LatentDecoder, encoder_weights_path, load_latent_decoder, load_latent_encoder
from rae_xla.models.convert.released import layout_of
from rae_xla.models.discriminator import DinoFeatures, DiscriminatorHeads, load_features
from rae_xla.models.functional import Tensors, buffers_of, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.models.pretrained import weights_path
from rae_xla.recipe import AutoencoderRecipe
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import Runtime
from rae_xla.training.adversarial import (
    Begin,
    PhaseName,
    discriminator_state,
    make_adversarial_update,
    phases_of,
    used_discriminator,
)
from rae_xla.training.decoder_losses import DecoderLosses
from rae_xla.training.diagnosis import make_diagnosis
from rae_xla.training.heldout import HeldoutReconstruction
from rae_xla.training.looks import Look
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.phases import Phase, plain_phase
from rae_xla.training.update import Loss, StepFunction, initial_state, make_mean_gradients

logger = logging.getLogger(__name__)

PERCEPTUAL_KEY = "perceptual.weights"
DISCRIMINATOR_KEY = "adversarial.discriminator.weights"
# The untrained heads are of another random state than the untrained decoder.
HEADS_SEED_OFFSET = 1


def autoencoder_task(recipe: AutoencoderRecipe, runtime: Runtime) -> TrainingTask:
    """The decoder learns to undo the encoder, from features with noise of random size added.

    Where the recipe names weights of the decoder, training starts from them.
    """
    images = open_images(recipe.data, recipe.root, "train")
    phases = decoder_phases(recipe, images)
    if recipe.adversarial is not None and phases[-1].name != "adversarial":
        logger.warning("adversarial.loss_from: the run ends before it; the decoder never learns from the discriminator")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    if recipe.autoencoder.decoder.weights is None:
        module = initialised(lambda: LatentDecoder(recipe.autoencoder), recipe.seed)
    else:
        module = load_latent_decoder(recipe.autoencoder, recipe.root)
    inputs = {
        "autoencoder.encoder.weights": encoder_weights_path(recipe.autoencoder, recipe.root),
        **recipe.paths({"autoencoder.decoder.weights": recipe.autoencoder.decoder.weights}),
    }
    state, frozen = initial_state(module, recipe.train), {"buffers": buffers_of(module), "encoder": tensors_of(encoder)}
    perceptual = discriminator = None
    looks: tuple[Look, ...] = ()
    if recipe.perceptual is not None:
        path = weights_path(recipe.perceptual.weights, TIMM_MODEL, recipe.root, PERCEPTUAL_KEY, runtime.process_index)
        perceptual = load_perceptual_distance(path, PERCEPTUAL_KEY)
        inputs[PERCEPTUAL_KEY], frozen["perceptual"] = path, tensors_of(perceptual)
    if recipe.adversarial is not None:
        config = recipe.adversarial.discriminator
        unpublished = "a discriminator with sizes of its own" if config.has_own_sizes else None
        key, host = DISCRIMINATOR_KEY, runtime.process_index
        path = weights_path(config.weights, config.timm_model, recipe.root, key, host, unpublished=unpublished)
        dino = load_features(config, path, DISCRIMINATOR_KEY)
        heads = initialised(lambda: DiscriminatorHeads(config), recipe.seed + HEADS_SEED_OFFSET)
        discriminator = dino, heads
        inputs[DISCRIMINATOR_KEY], frozen["dino"] = path, tensors_of(dino)
        state["discriminator"] = discriminator_state(heads)
    steps_per_epoch = len(images) / recipe.data.batch_size
    num_steps = total_steps(recipe.train, steps_per_epoch)
    losses = DecoderLosses(recipe, runtime, encoder, module, perceptual, discriminator)
    if recipe.heldout is not None:
        data, root = recipe.data, recipe.root
        looks = (HeldoutReconstruction(recipe.heldout, data, root, runtime, encoder, module, perceptual, num_steps),)
    make = _Phases(recipe, runtime, losses, module, discriminator, steps_per_epoch)
    return TrainingTask(
        name="decoder",
        images=images,
        num_steps=num_steps,
        module=module,
        state=state,
        frozen=frozen,
        phases=tuple(make.phase(begin) for begin in phases),
        looks=looks,
        export=lambda ema: {name.removeprefix("decoder."): value for name, value in ema.items()},
        inputs=inputs,
        about={"layout": layout_of(module.decoder).as_json()},
    )


def decoder_phases(recipe: AutoencoderRecipe, images: ImageSet | ShardedImages) -> list[Begin]:
    """The phases of the recipe's run on these images.

    Raises:
        UserError: they are out of order.
    """
    steps_per_epoch = len(images) / recipe.data.batch_size
    try:
        return phases_of(recipe.adversarial, steps_per_epoch, total_steps(recipe.train, steps_per_epoch))
    except ValueError as error:
        raise UserError(f"adversarial.{error}") from error


@dataclass(frozen=True)
class _Phases:
    """What phases of a run are made of."""

    recipe: AutoencoderRecipe
    runtime: Runtime
    losses: DecoderLosses
    module: LatentDecoder
    discriminator: tuple[DinoFeatures, DiscriminatorHeads] | None
    steps_per_epoch: float

    def phase(self, begin: Begin) -> Phase:
        """Of a decoder by itself, or beside its discriminator."""
        name = f"decoder_{begin.name}"
        phase = replace(
            plain_phase(self.module, self.losses.reconstruction, self.recipe, self.steps_per_epoch, self.runtime),
            name=name,
            begins_after=begin.after,
            untouched=() if self.discriminator is None else ("discriminator",),
        )
        if self.discriminator is None or begin.name == "reconstruction":
            return phase
        _, heads = self.discriminator
        return replace(
            phase,
            update=self._adversarial_update(begin.name, heads),
            diagnosis=self._diagnosis(begin.name, phase.diagnosis, heads),
            diagnosed=lambda state: {"parameters": state["parameters"], "discriminator": state["discriminator"]},
            untouched=(),
        )

    def _adversarial_update(self, phase: PhaseName, heads: DiscriminatorHeads) -> StepFunction:
        recipe, losses, runtime = self.recipe, self.losses, self.runtime
        assert recipe.adversarial is not None
        loss: Loss = losses.adversarial if phase == "adversarial" else losses.reconstruction
        return make_adversarial_update(
            losses.with_features,
            make_mean_gradients(self.module, loss, recipe.compute, runtime),
            make_mean_gradients(heads, losses.discriminator, self._of_heads, runtime),
            recipe.train,
            recipe.adversarial.discriminator_from.in_steps(self.steps_per_epoch),
            self.steps_per_epoch,
        )

    def _diagnosis(self, phase: PhaseName, of_decoder: StepFunction, heads: DiscriminatorHeads) -> StepFunction:
        """The decoder, then the discriminator, then the decoder with the discriminator's loss."""
        recipe, losses, runtime = self.recipe, self.losses, self.runtime
        of_discriminator = make_diagnosis(heads, losses.discriminator, self._of_heads, runtime)
        of_both = make_diagnosis(self.module, losses.unweighed, recipe.compute, runtime)

        def diagnosis(state: Any, frozen: Any, batch: dict[str, Tensor]) -> tuple[Any, Tensors]:
            found = of_decoder(state, frozen, batch)[1]
            own = frozen["discriminator"]
            decoder = {**frozen["buffers"], **frozen["parameters"]}
            given = {**frozen, "buffers": own["vectors"], "parameters": own["parameters"], "decoder": decoder}
            named = of_discriminator(state, given, batch)[1]
            found |= {f"discriminator's {name}": value for name, value in named.items()}
            if phase == "adversarial":
                given = {**frozen, "discriminator": used_discriminator({"discriminator": own})}
                named = of_both(state, given, batch)[1]
                found |= {f"{name}, with the adversarial loss": value for name, value in named.items()}
            return state, found

        return diagnosis

    @property
    def _of_heads(self) -> ComputeConfig:
        # Heads have no blocks.
        return ComputeConfig(num_microbatches=self.recipe.compute.num_microbatches)
