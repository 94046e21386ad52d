"""The quickstart's steps in order, through the same functions as the tools, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rae_xla import runtime, storage
from rae_xla.config import override
from rae_xla.errors import UserError
from rae_xla.evaluation.latent_stats import write_latent_stats
from rae_xla.evaluation.reconstruction_scores import evaluate_reconstruction
from rae_xla.evaluation.sample_set import write_sample_set
from rae_xla.evaluation.scoring import evaluate_generation
from rae_xla.recipe import load_recipe
from rae_xla.report import write_report
from rae_xla.training.tasks import train

RECIPES = Path(__file__).parent.parent / "recipes" / "quickstart"
TRAININGS = ("encoder", "judge", "decoder", "guide", "diffusion")
GUIDANCE = ("unguided", "classifier_free", "autoguidance")


def run_quickstart(root: str, overrides: list[str], num_images: int) -> dict[str, Any]:
    """Everything, into ``root``; returns scores, seconds of each step and the report's path.

    ``overrides`` are laid over every recipe, so they can only be keys that all recipes have.

    Raises:
        UserError: an override does not fit a recipe.
    """
    if num_images < 20:
        raise UserError(f"--num-images: must be at least 20, two of each class, got {num_images}")
    taken = [override for override in overrides if override.partition("=")[0] in ("root", "run_dir", "task", "data")]
    if taken:
        raise UserError(f"{taken[0]}: the quickstart's steps need each their own; --out says where everything goes")
    laid_over = [*overrides, override("root", root)]
    names = (*TRAININGS, "latent_stats", *[f"sample_{mode}" for mode in GUIDANCE], "evaluation")
    recipes = {name: load_recipe(str(RECIPES / f"{name}.yaml"), laid_over) for name in names}
    common = recipes["diffusion"]
    made = runtime.create(common.runtime, common.mesh, common.precision)
    timings: dict[str, float] = {}

    def timed(name: str, step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = step(*arguments, **options)
        timings[name] = round(time.perf_counter() - started, 2)
        return result

    for name in ("encoder", "judge", "decoder"):
        timings[f"train {name}"] = train(recipes[name], made)["seconds"]
    timed("latent statistics", write_latent_stats, recipes["latent_stats"], made)
    for name in ("guide", "diffusion"):
        timings[f"train {name}"] = train(recipes[name], made)["seconds"]
    reconstruction = timed("reconstruct", evaluate_reconstruction, recipes["evaluation"], made)
    scores = []
    for mode in GUIDANCE:
        recipe, directory = recipes[f"sample_{mode}"], storage.join(root, "samples", mode)
        timed(f"sample {mode}", write_sample_set, recipe, made, directory, num_images=num_images, seed=recipe.seed)
        samples = storage.join(directory, "samples.npz")
        scored = timed(f"score {mode}", evaluate_generation, recipes["evaluation"], made, samples, None)
        scores.append({"mode": mode, **scored})
    result = {"scores": scores, **reconstruction, "seconds": timings, "runtime": made.describe()}
    if made.process_index == 0:
        result["report"] = write_report(
            root,
            title="rae_xla quickstart",
            summary=f"Handwritten digits, {num_images} samples for each guidance. Computed with "
            + ", ".join(f"{name} {value}" for name, value in made.describe().items() if name != "mesh")
            + ".",
            scores=scores,
            psnr=reconstruction["psnr"],
            sheets={mode: storage.join(root, "samples", mode, "contact_sheet.png") for mode in GUIDANCE},
            reconstructions=storage.join(root, "evaluation", "reconstructions.png"),
            metrics={name: storage.join(root, name, "metrics.jsonl") for name in TRAININGS},
            timings=timings,
        )
        storage.write_json(storage.join(root, "report.json"), result)
    return result
