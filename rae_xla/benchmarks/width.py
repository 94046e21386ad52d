"""Theorem 1 of arXiv 2510.11690 measured: one image learnt by heart at several widths (table 3 in small)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rae_xla import runtime, storage
from rae_xla.data.sources import open_source
from rae_xla.data.transforms import to_unit
from rae_xla.flow.objective import narrow_width_bound
from rae_xla.models.autoencoder import load_latent_encoder
from rae_xla.recipe import load_recipe
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "quickstart" / "overfit.yaml"
WIDTHS = (32, 48, 64, 80, 96, 128)
# Lines of the log that are averaged at the end of a run.
LAST_LINES = 10


def loss_by_width(root: str, widths: tuple[int, ...], overrides: list[str]) -> list[dict[str, Any]]:
    """For each width the final loss of ``overfit.yaml`` at equal steps, and the bound below which it cannot fall.

    ``root`` holds the quickstart's encoder and statistics; runs go to ``root/overfit``.
    """
    rows = []
    for width in widths:
        own = [f"model.width={width}", f"run_dir=overfit/width_{width}"]
        recipe = load_recipe(str(RECIPE), [*overrides, f"root={root}", *own])
        encoder = load_latent_encoder(recipe.autoencoder, recipe.root)
        images = open_source(recipe.data, "train").images
        with torch.no_grad():
            latents = encoder(to_unit(torch.from_numpy(images)))
        train(recipe, runtime.create(recipe.runtime, recipe.mesh, recipe.precision))
        lines = read_metrics(storage.join(recipe.path(recipe.run_dir), "metrics.jsonl"))
        rows.append(
            {
                "width": width,
                "loss": float(np.mean([line["loss"] for line in lines[-LAST_LINES:]])),
                "bound": narrow_width_bound(latents, width),
                "steps": int(lines[-1]["step"]),
            }
        )
    return rows
