"""Decoder training on a frozen encoder (arXiv 2510.11690, sections 3 and 4.3): L1, LPIPS and an adversarial loss."""

from __future__ import annotations

from typing import Any

from rae_xla.data.sources import ImageSet, ShardedImages, open_images
from rae_xla.errors import UserError
from rae_xla.losses.perceptual import load_perceptual_distance, perceptual_weights_path
from rae_xla.models.autoencoder import LatentDecoder, encoder_weights_path, load_latent_decoder, load_latent_encoder
from rae_xla.models.convert.released import layout_of
from rae_xla.models.discriminator import DiscriminatorHeads, discriminator_weights_path, load_features
from rae_xla.models.functional import buffers_of, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.recipe import AutoencoderRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.adversarial import (
    Begin,
    discriminator_state,
    make_adversarial_update,
    phases_of,
    used_discriminator,
)
from rae_xla.training.blocks import ComputeConfig
from rae_xla.training.decoder_losses import DecoderLosses
from rae_xla.training.diagnosis import make_diagnosis
from rae_xla.training.heldout import HeldoutReconstruction
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.phases import Phase
from rae_xla.training.update import Loss, initial_state, make_mean_gradients, make_update

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
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    if recipe.autoencoder.decoder.weights is None:
        module = initialised(lambda: LatentDecoder(recipe.autoencoder), recipe.seed)
    else:
        module = load_latent_decoder(recipe.autoencoder, recipe.root)
    inputs = {
        "autoencoder.encoder.weights": encoder_weights_path(recipe.autoencoder, recipe.root),
        **recipe.paths({"autoencoder.decoder.weights": recipe.autoencoder.decoder.weights}),
    }
    state, frozen = initial_state(module), {"buffers": buffers_of(module), "encoder": tensors_of(encoder)}
    losses = DecoderLosses(recipe, runtime, encoder, module)
    if recipe.perceptual is not None:
        path = perceptual_weights_path(recipe.perceptual, recipe.root, PERCEPTUAL_KEY, runtime.process_index)
        losses.perceptual = load_perceptual_distance(path, PERCEPTUAL_KEY)
        inputs[PERCEPTUAL_KEY], frozen["perceptual"] = path, tensors_of(losses.perceptual)
    if recipe.adversarial is not None:
        config = recipe.adversarial.discriminator
        path = discriminator_weights_path(config, recipe.root, DISCRIMINATOR_KEY, runtime.process_index)
        losses.dino = load_features(config, path, DISCRIMINATOR_KEY)
        losses.heads = initialised(lambda: DiscriminatorHeads(config), recipe.seed + HEADS_SEED_OFFSET)
        inputs[DISCRIMINATOR_KEY], frozen["dino"] = path, tensors_of(losses.dino)
        state["discriminator"] = discriminator_state(losses.heads)
    heldout = None
    if recipe.heldout is not None:
        data, root = recipe.data, recipe.root
        heldout = HeldoutReconstruction(recipe.heldout, data, root, runtime, encoder, module, losses.perceptual)
    return TrainingTask(
        name="decoder",
        images=images,
        num_steps=total_steps(recipe.train, len(images) / recipe.data.batch_size),
        module=module,
        state=state,
        frozen=frozen,
        phases=tuple(_phase(begin, phases, recipe, runtime, losses, len(images)) for begin in phases),
        heldout=heldout,
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


def _phase(
    begin: Begin,
    phases: list[Begin],
    recipe: AutoencoderRecipe,
    runtime: Runtime,
    losses: DecoderLosses,
    num_images: int,
) -> Phase:
    steps_per_epoch = num_images / recipe.data.batch_size
    module, compute = losses.decoder, recipe.compute
    loss: Loss = losses.adversarial if begin.name == "adversarial" else losses.reconstruction
    diagnosed: Loss = losses.unweighed if begin.name == "adversarial" else losses.reconstruction
    if begin.name == "reconstruction":
        update = make_update(module, loss, recipe.train, compute, steps_per_epoch, runtime)
    else:
        assert losses.heads is not None
        parts = ComputeConfig(num_microbatches=compute.num_microbatches)
        update = make_adversarial_update(
            make_mean_gradients(module, loss, compute, runtime),
            make_mean_gradients(losses.heads, losses.discriminator, parts, runtime),
            recipe.train,
            next(phase.after for phase in phases if phase.name != "reconstruction"),
            steps_per_epoch,
        )
    return Phase(
        name=f"decoder_{begin.name}",
        begins_after=begin.after,
        update=update,
        diagnosis=make_diagnosis(module, diagnosed, compute, runtime),
        diagnosed=_diagnosed if begin.name == "adversarial" else Phase.diagnosed,
        untouched=("discriminator",) if begin.name == "reconstruction" else (),
    )


def _diagnosed(state: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": state["parameters"], "discriminator": used_discriminator(state)}
