"""Theorem 1 of arXiv 2510.11690 measured: one image learnt by heart at several widths (table 3 in small)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from rae_xla import runtime, storage
from rae_xla.config import override
from rae_xla.data.sources import open_in_memory
from rae_xla.data.transforms import to_unit
from rae_xla.evaluation.files import figure_png
from rae_xla.flow.objective import narrow_width_bound
from rae_xla.models.autoencoder import load_latent_encoder
from rae_xla.recipe import load_recipe
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "quickstart" / "overfit.yaml"
WIDTHS = (32, 48, 64, 80, 96, 128)
# Lines of the log that are averaged at the end of a run.
LAST_LINES = 10


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Losses and bounds over the width as a PNG."""
    figure = Figure(figsize=(5.5, 3.4))
    axis = figure.subplots()
    widths, channels = [row["width"] for row in rows], rows[0]["token_width"]
    axis.plot(widths, [row["bound"] for row in rows], "--", color="grey", label="Theorem 1: not below this")
    axis.plot(widths, [row["loss"] for row in rows], "o-", label=f"loss after {rows[0]['steps']} steps")
    axis.axvline(channels, color="grey", linewidth=0.8)
    axis.text(channels, rows[0]["loss"], " token width", va="center")
    axis.set(xlabel="width of the DiT", ylabel="flow-matching loss", ylim=(0, None))
    axis.legend(loc="lower left")
    storage.write_bytes(path, figure_png(figure))


def loss_by_width(root: str, widths: tuple[int, ...], overrides: list[str]) -> list[dict[str, Any]]:
    """For each width the final loss of ``overfit.yaml`` at equal steps, and the bound below which it cannot fall.

    ``root`` holds the quickstart's encoder and statistics; runs go to ``root/overfit``.
    """
    common = [*overrides, override("root", root)]
    recipe = load_recipe(str(RECIPE), common)
    with torch.no_grad():
        images = to_unit(torch.from_numpy(open_in_memory(recipe.data, "train").images))
        latents = load_latent_encoder(recipe.autoencoder, recipe.root)(images)
    rows = []
    for width in widths:
        recipe = load_recipe(str(RECIPE), [*common, f"model.width={width}", f"run_dir=overfit/width_{width}"])
        train(recipe, runtime.create(recipe.runtime, recipe.mesh, recipe.precision))
        lines = read_metrics(storage.join(recipe.path(recipe.run_dir), "metrics.jsonl"))
        rows.append(
            {
                "width": width,
                "token_width": latents.shape[1],
                "loss": float(np.mean([line["loss"] for line in lines[-LAST_LINES:]])),
                "bound": narrow_width_bound(latents, width),
                "steps": int(lines[-1]["step"]),
            }
        )
    return rows
