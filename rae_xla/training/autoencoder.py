"""Decoder training on a frozen encoder (arXiv 2510.11690, sections 3 and 4.3): L1, LPIPS and an adversarial loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.data.sources import ImageSet, ShardedImages, open_images
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.losses.adversarial import (
    adaptive_weight,
    decoder_loss,
    discriminator_accuracy,
    discriminator_loss,
    quantised,
)
from rae_xla.losses.augmentation import augmented, drawn
from rae_xla.losses.perceptual import PerceptualDistance, load_perceptual_distance, perceptual_weights_path
from rae_xla.models.autoencoder import LatentDecoder, encoder_weights_path, load_latent_decoder, load_latent_encoder
from rae_xla.models.convert.released import layout_of
from rae_xla.models.discriminator import DinoFeatures, DiscriminatorHeads, discriminator_weights_path, load_features
from rae_xla.models.functional import buffers_of, call, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.random import Purpose, normal, uniform
from rae_xla.recipe import AutoencoderRecipe, LatentNoiseConfig
from rae_xla.runtime import Runtime
from rae_xla.training.adversarial import (
    Begin,
    discriminator_state,
    make_adversarial_update,
    phases_of,
    used_discriminator,
)
from rae_xla.training.blocks import ComputeConfig, make_run_blocks
from rae_xla.training.diagnosis import make_diagnosis
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.phases import Phase
from rae_xla.training.update import Loss, Model, initial_state, make_mean_gradients, make_update

PERCEPTUAL_KEY = "perceptual.weights"
DISCRIMINATOR_KEY = "adversarial.discriminator.weights"
# Whose gradients the two losses are weighed by.
LAST_LAYER = "decoder.output.weight"
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
    losses = _Losses(recipe, runtime, encoder, module)
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
    return TrainingTask(
        name="decoder",
        images=images,
        num_steps=total_steps(recipe.train, len(images) / recipe.data.batch_size),
        module=module,
        state=state,
        frozen=frozen,
        phases=tuple(_phase(begin, phases, recipe, runtime, losses, len(images)) for begin in phases),
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


class _Losses:
    """What decoder and discriminator make small; all are `rae_xla.training.update.Loss`."""

    def __init__(self, recipe: AutoencoderRecipe, runtime: Runtime, encoder: nn.Module, decoder: LatentDecoder) -> None:
        self._recipe, self._runtime = recipe, runtime
        self._encoder, self.decoder = encoder, decoder
        self._run_blocks = make_run_blocks(recipe.compute, runtime)
        self.perceptual: PerceptualDistance | None = None
        self.dino: DinoFeatures | None = None
        self.heads: DiscriminatorHeads | None = None

    def reconstruction(self, model: Model, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 and LPIPS."""
        return self._difference(self._decoded(model, frozen, batch), frozen, batch)

    def adversarial(self, model: Model, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 and LPIPS, and what the discriminator says, weighed by their gradients at the last layer.

        Those need no backward pass of their own: each loss goes back to the images once, from there to the last
        layer's weight is one product, and the weighed sum goes back through the decoder.
        """
        assert self._recipe.adversarial is not None
        images = self._decoded(model, frozen, batch)
        seen = images.detach().requires_grad_()
        difference, metrics = self._difference(seen, frozen, batch)
        judged = self._judged(seen, frozen, batch)
        at_images = [torch.autograd.grad(loss, seen)[0] for loss in (difference, judged)]
        last = model.parameters[LAST_LAYER]
        at_layer = [torch.autograd.grad(images, last, gradient, retain_graph=True)[0] for gradient in at_images]
        adaptive = adaptive_weight(at_layer[0], at_layer[1], self._recipe.adversarial.largest_adaptive_weight)
        weight = self._recipe.adversarial.weight * adaptive
        total = difference + weight * judged
        # A number whose gradient at the images is the total's.
        value = (images * (at_images[0] + weight * at_images[1])).sum()
        return value, {"loss": total, **metrics, "adversarial_loss": judged, "adaptive_weight": adaptive}

    def unweighed(self, model: Model, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `adversarial`, without the adaptive weight, and so without gradients inside: to look for bad numbers."""
        images = self._decoded(model, frozen, batch)
        difference, metrics = self._difference(images, frozen, batch)
        return difference + self._judged(images, frozen, batch), metrics

    def discriminator(self, model: Model, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss of the heads; they see as many images as reconstructions, augmented each by itself."""
        assert self.dino is not None
        runtime, seed, rows = self._runtime, self._recipe.seed, batch["positions"]
        with torch.no_grad():
            original = to_unit(batch["images"])
            features = call(self._encoder, frozen["encoder"], runtime, original)
            decoded = call(self.decoder, frozen["decoder"], runtime, features, run_blocks=self._run_blocks)
            real = augmented(_signed(original), drawn(seed, Purpose.AUGMENT_REAL, rows))
            fake = augmented(quantised(_signed(decoded)), drawn(seed, Purpose.AUGMENT_FAKE, rows))
            # Side by side, so that every device has as many of both without moving any.
            both = torch.stack([real, fake], dim=1).flatten(0, 1)
            tokens = call(self.dino, frozen["dino"], runtime, both)
        logits_real, logits_fake = model(tokens).unflatten(0, (-1, 2)).unbind(dim=1)
        return discriminator_loss(logits_real, logits_fake), {
            "accuracy": discriminator_accuracy(logits_real, logits_fake),
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }

    def _decoded(self, model: Model, frozen: Any, batch: dict[str, Tensor]) -> Tensor:
        recipe = self._recipe
        with torch.no_grad():
            features = call(self._encoder, frozen["encoder"], self._runtime, to_unit(batch["images"]))
            noise = latent_noise(recipe.latent_noise, recipe.seed, batch["positions"], features.shape)
        return model(features + noise)

    def _difference(self, images: Tensor, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        original = to_unit(batch["images"])
        difference = images - original
        loss = difference.abs().mean()
        metrics = {"l1": loss, "mean_squared_error": difference.square().mean()}
        if self.perceptual is not None and self._recipe.perceptual is not None:
            seen = _signed(images), _signed(original)
            metrics["lpips"] = call(self.perceptual, frozen["perceptual"], self._runtime, *seen).mean()
            loss = loss + self._recipe.perceptual.weight * metrics["lpips"]
        return loss, metrics

    def _judged(self, images: Tensor, frozen: Any, batch: dict[str, Tensor]) -> Tensor:
        assert self.dino is not None and self.heads is not None
        numbers = drawn(self._recipe.seed, Purpose.AUGMENT_DECODED, batch["positions"])
        tokens = call(self.dino, frozen["dino"], self._runtime, augmented(_signed(images), numbers))
        return decoder_loss(call(self.heads, frozen["discriminator"], self._runtime, tokens))


def _phase(
    begin: Begin, phases: list[Begin], recipe: AutoencoderRecipe, runtime: Runtime, losses: _Losses, num_images: int
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


def _signed(images: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]."""
    return 2.0 * images - 1.0


def latent_noise(config: LatentNoiseConfig, seed: int, rows: Tensor, shape: torch.Size) -> Tensor:
    """sigma * n for features of ``shape`` [B, C, h, w], one sigma an image; ``rows`` int32 [B]."""
    if config.distribution == "half_normal":
        sigma = normal(seed, Purpose.LATENT_NOISE_SCALE, rows).abs()
    else:
        sigma = uniform(seed, Purpose.LATENT_NOISE_SCALE, rows)
    noise = normal(seed, Purpose.LATENT_NOISE, rows, tuple(shape[1:]))
    return config.scale * sigma.reshape(-1, 1, 1, 1) * noise
