"""The linear probe's accuracy on held-out images (arXiv 2510.11690, table 1d); see `rae_xla.training.linear_probe`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import ImageSet, ShardedImages, num_classes_of, open_heldout
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation.batches import check_one_host, map_rows
from rae_xla.models.autoencoder import load_latent_encoder, made_with
from rae_xla.models.classifier import LinearProbe
from rae_xla.models.functional import call, tensors_of
from rae_xla.models.loading import load_weights, on_meta
from rae_xla.recipe import LinearProbeRecipe
from rae_xla.runtime import Runtime
from rae_xla.training.tasks import train

TOP = 5


def evaluate_linear_probe(recipe: LinearProbeRecipe, runtime: Runtime) -> dict[str, Any]:
    """Shares of held-out images whose class the averaged weights rank first, and among the first five.

    A probe that is not trained yet is trained, one that was interrupted is trained to its end. Of a manifest's images
    the centre is taken, whatever ``data.crop`` is, and none is mirrored.

    Raises:
        UserError: held-out images or weights are missing or do not fit.
    """
    # Before the training: it is long, and a wrong path is to be told at once.
    check_one_host(runtime, "linear probe")
    heldout = _open_heldout(recipe)
    steps = train(recipe, runtime)["steps"]
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root, runtime.process_index)
    probe = on_meta(lambda: LinearProbe(recipe.autoencoder.encoder.latent_shape[0], heldout.num_classes))
    load_weights(probe, recipe.path(recipe.weights_file), "run_dir")
    num_ranked = min(TOP, heldout.num_classes)

    def classify(frozen: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = call(encoder, frozen["encoder"], runtime, to_unit(batch["images"]))
        logits = call(probe, frozen["probe"], runtime, latents)
        return {"hits": logits.topk(num_ranked).indices == batch["labels"][:, None]}

    frozen = {"encoder": tensors_of(encoder), "probe": tensors_of(probe)}
    rows, batch_size = images_in_order(heldout, recipe.data), recipe.data.batch_size
    parts = map_rows(classify, frozen, rows, len(heldout), batch_size, runtime, "linear probe")
    hits = np.concatenate([part["hits"] for part in parts])
    scores = {"top1_accuracy": float(hits[:, 0].mean())}
    if heldout.num_classes > TOP:
        scores["top5_accuracy"] = float(hits.any(axis=1).mean())
    return {
        **scores,
        "num_images": len(hits),
        "num_classes": heldout.num_classes,
        "pooling": "mean of tokens",
        "steps": steps,
        **made_with(recipe.autoencoder, recipe.root, recipe.data.image_size),
    }


def _open_heldout(recipe: LinearProbeRecipe) -> ImageSet | ShardedImages:
    heldout = open_heldout(recipe.data, recipe.heldout_source, recipe.root, "heldout_source")
    num_classes = num_classes_of(recipe.data, recipe.root)
    if heldout.num_classes != num_classes:
        raise UserError(
            f"heldout_source: {recipe.heldout_source} has {heldout.num_classes} classes, data.source has "
            f"{num_classes}; name held-out images of the same classes"
        )
    return heldout
