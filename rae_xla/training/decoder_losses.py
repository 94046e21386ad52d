"""What a decoder and its discriminator make small (arXiv 2510.11690, section 3): L1, LPIPS and adversarial losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.data.transforms import to_unit
from rae_xla.losses.adversarial import (
    adaptive_weight,
    decoder_loss,
    discriminator_accuracy,
    discriminator_loss,
    quantised,
)
from rae_xla.losses.augmentation import augmented, drawn
from rae_xla.losses.perceptual import PerceptualDistance
from rae_xla.models.autoencoder import LatentDecoder
from rae_xla.models.discriminator import DinoFeatures, DiscriminatorHeads
from rae_xla.models.functional import call
from rae_xla.random import Purpose, normal, uniform
from rae_xla.recipe import AutoencoderRecipe, LatentNoiseConfig
from rae_xla.run_blocks import make_run_blocks
from rae_xla.runtime import Runtime
from rae_xla.training.update import Model

# Whose gradients the two losses are weighed by.
LAST_LAYER = "decoder.output.weight"


class DecoderLosses:
    """What decoder and discriminator make small; all are `rae_xla.training.update.Loss`."""

    def __init__(
        self,
        recipe: AutoencoderRecipe,
        runtime: Runtime,
        encoder: nn.Module,
        decoder: LatentDecoder,
        perceptual: PerceptualDistance | None,
        discriminator: tuple[DinoFeatures, DiscriminatorHeads] | None,
    ) -> None:
        self._recipe, self._runtime = recipe, runtime
        self._encoder, self._decoder = encoder, decoder
        self._run_blocks = make_run_blocks(recipe.compute, runtime)
        self._perceptual = perceptual
        self._discriminator = discriminator

    def with_features(self, frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its images' features, for losses that share them."""
        return {**batch, "features": self._features(frozen, batch)}

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
        assert self._discriminator is not None
        dino, _ = self._discriminator
        runtime, seed, rows = self._runtime, self._recipe.seed, batch["positions"]
        with torch.no_grad():
            original = to_unit(batch["images"])
            features = self._features(frozen, batch)
            decoded = call(self._decoder, frozen["decoder"], runtime, features, run_blocks=self._run_blocks)
            real = augmented(_signed(original), drawn(seed, Purpose.AUGMENT_REAL, rows))
            fake = augmented(quantised(_signed(decoded)), drawn(seed, Purpose.AUGMENT_FAKE, rows))
            # Side by side, so that every device has as many of both without moving any.
            both = runtime.split_batch(torch.stack([real, fake], dim=1).flatten(0, 1))
            tokens = call(dino, frozen["dino"], runtime, both)
        logits_real, logits_fake = model(tokens).unflatten(0, (-1, 2)).unbind(dim=1)
        return discriminator_loss(logits_real, logits_fake), {
            "accuracy": discriminator_accuracy(logits_real, logits_fake),
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }

    def _features(self, frozen: Any, batch: dict[str, Tensor]) -> Tensor:
        if "features" in batch:
            return batch["features"]
        with torch.no_grad():
            return call(self._encoder, frozen["encoder"], self._runtime, to_unit(batch["images"]))

    def _decoded(self, model: Model, frozen: Any, batch: dict[str, Tensor]) -> Tensor:
        recipe = self._recipe
        with torch.no_grad():
            features = self._features(frozen, batch)
            noise = latent_noise(recipe.latent_noise, recipe.seed, batch["positions"], features.shape)
        return model(features + noise)

    def _difference(self, images: Tensor, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        original = to_unit(batch["images"])
        difference = images - original
        loss = difference.abs().mean()
        metrics = {"l1": loss, "mean_squared_error": difference.square().mean()}
        if self._perceptual is not None and self._recipe.perceptual is not None:
            seen = _signed(images), _signed(original)
            metrics["lpips"] = call(self._perceptual, frozen["perceptual"], self._runtime, *seen).mean()
            loss = loss + self._recipe.perceptual.weight * metrics["lpips"]
        return loss, metrics

    def _judged(self, images: Tensor, frozen: Any, batch: dict[str, Tensor]) -> Tensor:
        assert self._discriminator is not None
        dino, heads = self._discriminator
        numbers = drawn(self._recipe.seed, Purpose.AUGMENT_DECODED, batch["positions"])
        tokens = call(dino, frozen["dino"], self._runtime, augmented(_signed(images), numbers))
        return decoder_loss(call(heads, frozen["discriminator"], self._runtime, tokens))


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
