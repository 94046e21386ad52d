"""A linear classifier on frozen latents (arXiv 2510.11690, table 1d): what the representation says of an image's class.

The feature is the mean of a latent's tokens. The published protocols read more than a latent has: DINOv2's evaluation
(arXiv 2304.07193) joins the class token with that mean and takes the best of many rates and layers, MAE's (arXiv
2111.06377) reads the class token; an RAE's latents have none. MAE also puts a BatchNorm without scale and shift before
the linear layer; here features are brought to a common scale by the stored latent statistics, where the recipe names
them. Both train with SGD or LARS on random resized crops, this with AdamW on what ``data`` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rae_xla.data.sources import open_images
from rae_xla.data.transforms import to_unit
from rae_xla.models.autoencoder import encoder_weights_path, load_latent_encoder
from rae_xla.models.classifier import LinearProbe
from rae_xla.models.functional import buffers_of, call, tensors_of
from rae_xla.models.loading import initialised
from rae_xla.recipe import LinearProbeRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.phases import plain_phase
from rae_xla.training.update import Model, initial_state


def linear_probe_task(recipe: LinearProbeRecipe, runtime: Runtime) -> TrainingTask:
    """Cross-entropy of the source's labels; the encoder is part of the step and stays as it is."""
    images = open_images(recipe.data, recipe.root, "train")
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    channels = recipe.autoencoder.encoder.latent_shape[0]
    module = initialised(lambda: LinearProbe(channels, images.num_classes), recipe.seed)
    steps_per_epoch = len(images) / recipe.data.batch_size

    def loss(model: Model, frozen: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            latents = call(encoder, frozen["encoder"], runtime, to_unit(batch["images"]))
        logits, labels = model(latents), batch["labels"].long()
        return functional.cross_entropy(logits, labels), {"accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    return TrainingTask(
        name="linear_probe",
        images=images,
        num_steps=total_steps(recipe.train, steps_per_epoch),
        module=module,
        state=initial_state(module, recipe.train),
        frozen={"buffers": buffers_of(module), "encoder": tensors_of(encoder)},
        phases=(plain_phase(module, loss, recipe, steps_per_epoch, runtime),),
        export=dict,
        inputs={
            "autoencoder.encoder.weights": encoder_weights_path(recipe.autoencoder, recipe.root),
            **recipe.paths({"autoencoder.latent_stats": recipe.autoencoder.latent_stats}),
        },
    )
