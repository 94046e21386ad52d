"""Classification, which only the quickstart needs: it has no pretrained encoder and no pretrained judge."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from rae_xla.data.sources import open_images
from rae_xla.data.transforms import to_unit
from rae_xla.models.classifier import ConvNet, EncoderClassifier, create_classifier
from rae_xla.models.functional import buffers_of
from rae_xla.models.loading import initialised
from rae_xla.recipe import ClassifierRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.loop import TrainingTask
from rae_xla.training.optimizer import total_steps
from rae_xla.training.phases import plain_phase
from rae_xla.training.update import Model, initial_state


def _create(recipe: ClassifierRecipe, num_classes: int) -> EncoderClassifier | ConvNet:
    size = recipe.data.image_size
    return create_classifier(recipe.model, image_size=size, num_classes=num_classes)


def classifier_task(recipe: ClassifierRecipe, runtime: Runtime) -> TrainingTask:
    """Cross-entropy on the source's labels. What is exported of an encoder is the encoder without its head."""
    images = open_images(recipe.data, recipe.root, "train")
    module = initialised(lambda: _create(recipe, images.num_classes), recipe.seed)
    steps_per_epoch = len(images) / recipe.data.batch_size

    def loss(model: Model, _: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(to_unit(batch["images"]))
        labels = batch["labels"].long()
        value = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        return value, {"accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def export(ema: Any) -> dict[str, Any]:
        if isinstance(module, EncoderClassifier):
            prefix = "encoder."
            return {name.removeprefix(prefix): value for name, value in ema.items() if name.startswith(prefix)}
        return dict(ema)

    return TrainingTask(
        name="encoder" if isinstance(module, EncoderClassifier) else "judge",
        images=images,
        num_steps=total_steps(recipe.train, steps_per_epoch),
        module=module,
        state=initial_state(module, recipe.train),
        frozen={"buffers": buffers_of(module)},
        phases=(plain_phase(module, loss, recipe, steps_per_epoch, runtime),),
        export=export,
    )
