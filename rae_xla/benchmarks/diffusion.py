"""What the paper's choices do for a small DiT^DH on digits (arXiv 2510.11690, tables 3 and 4): shift, width, average.

The latents, 8x8 tokens of 128 channels, have more values than the 4,096 at which there is no shift, so that it is above
1 as it is at full size. Scores are the judge's: recognised digits, and the Fréchet distance in its features. Losses of
runs with and without the shift are of other times, and cannot be compared with each other. Averaged weights are
compared with those that are trained where the rate stays what it is: a rate that falls to nothing averages by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rae_xla import runtime, storage
from rae_xla.config import override
from rae_xla.data.sources import open_in_memory
from rae_xla.evaluation.features import load_extractor
from rae_xla.evaluation.files import figure_png
from rae_xla.evaluation.generation import Sampler, labels_of
from rae_xla.evaluation.latent_stats import write_latent_stats
from rae_xla.evaluation.measured import Measured, Measuring
from rae_xla.evaluation.scores import recognised_share, scores_of
from rae_xla.evaluation.stored_images import ImagesInMemory
from rae_xla.hosts import Hosts
from rae_xla.recipe import load_recipe
from rae_xla.runtime import Runtime
from rae_xla.training.export import RAW, export_run
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train

RECIPES = Path(__file__).parent.parent.parent / "recipes" / "quickstart"
ENCODER = {"patch_size": 4, "width": 128, "num_heads": 4}
LATENTS = {f"autoencoder.encoder.{key}": value for key, value in ENCODER.items()} | {
    "autoencoder.decoder.patch_size": 4
}
JUDGE = {"name": "convnet", "width": 32, "feature_width": 128, "weights": "judge/weights.safetensors"}
RUNS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "without the shift": {"flow.shift": 1.0},
    "narrower than the tokens": {"model.head_width": 64},
}
STEADY = {"train.schedule": "constant"}
# In 10 epochs averaged weights are still behind those that are trained, and with the cosine they never are ahead.
NUM_EPOCHS, NUM_LOOKS, NUM_SAMPLES = 40, 8, 500
# Lines of the log that are averaged at the end of a run.
LAST_LINES = 10


def diffusion_choices(root: str) -> dict[str, Any]:
    """Train everything in ``root``; for each of `RUNS` its curves, and what averaging and guidance do for the first."""

    def recipe_of(name: str, changed: dict[str, Any]) -> Any:
        overrides = [override(key, value) for key, value in {**changed, "root": root}.items()]
        return load_recipe(str(RECIPES / f"{name}.yaml"), overrides)

    common = recipe_of("encoder", {f"model.{key}": value for key, value in ENCODER.items()})
    made = runtime.create(common.runtime, common.mesh, common.precision)
    for recipe in (common, recipe_of("judge", {}), recipe_of("decoder", LATENTS)):
        train(recipe, made)
    write_latent_stats(recipe_of("latent_stats", LATENTS), made)
    scoring = {"every_epochs": NUM_EPOCHS / NUM_LOOKS, "num_images": NUM_SAMPLES, "features": JUDGE}
    settings = {**LATENTS, "train.num_epochs": NUM_EPOCHS, "scoring": scoring}
    rows, recipes = [], {}
    for number, (name, changed) in enumerate(RUNS.items()):
        recipe = recipes[name] = recipe_of("diffusion", {**settings, **changed, "run_dir": f"choices/{number}"})
        train(recipe, made)
        rows.append({"name": name, **_curves(recipe)})
    judge = _Judge(recipe_of("evaluation", LATENTS), made)
    first = recipes["as in the paper"]
    steady = recipe_of("diffusion", {**settings, "scoring": None, **STEADY, "run_dir": "choices/steady"})
    train(steady, made)
    raw = "choices/raw.safetensors"
    export_run(steady.path(steady.run_dir), None, RAW, steady.path(raw))
    guided = {**settings, "run_dir": first.run_dir, "guidance": {"method": "classifier_free", "scale": 1.5}}
    return {
        "rows": rows,
        "latent_shape": list(first.autoencoder.encoder.latent_shape),
        "averaged": _scores(steady, None, judge, made),
        "not_averaged": _scores(steady, raw, judge, made),
        "guided": _scores(recipe_of("diffusion", guided), None, judge, made),
    }


class _Judge:
    """The quickstart's, and what it sees of held-out digits."""

    def __init__(self, recipe: Any, made: Runtime) -> None:
        heldout = open_in_memory(recipe.data, "heldout")
        size, num_classes = recipe.data.image_size, heldout.num_classes
        extractor = load_extractor(recipe.features, size, num_classes, recipe.root, "features.weights")
        self._measuring = Measuring(extractor, size, recipe.batch_size, made, Hosts(made))
        self._real = self._measured(heldout.images)

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Of samples."""
        measured = self._measured(images)
        assert measured.seen is not None
        distance = scores_of(self._measuring.extractor, measured, self._real)
        return {**distance, "recognised_share": recognised_share(measured.seen, labels)}

    def _measured(self, images: np.ndarray) -> Measured:
        return self._measuring.images(ImagesInMemory("images", images), "judging", "images")


def _curves(recipe: Any) -> dict[str, Any]:
    lines = read_metrics(storage.join(recipe.path(recipe.run_dir), "metrics.jsonl"))
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scored = [line for line in lines if f"judge_frechet_distance_{NUM_SAMPLES}" in line]
    return {
        "losses": losses,
        "last_loss": float(np.mean([loss for _, loss in losses[-LAST_LINES:]])),
        "scored": [
            {
                "step": line["step"],
                "judge_frechet_distance": line[f"judge_frechet_distance_{NUM_SAMPLES}"],
                "recognised_share": line[f"recognised_share_{NUM_SAMPLES}"],
            }
            for line in scored
        ],
    }


def _scores(recipe: Any, weights: str | None, judge: _Judge, made: Runtime) -> dict[str, Any]:
    """Of samples with these weights in place of the run's averaged ones."""
    sampler = Sampler(recipe, made, weights=weights)
    labels = labels_of("balanced", recipe.seed, NUM_SAMPLES, sampler.num_classes)
    return judge.scores(sampler.sample(labels, recipe.seed)["images"], labels)


def draw(result: dict[str, Any], path: str) -> None:
    """Losses and Fréchet distances over the steps as a PNG."""
    figure = Figure(figsize=(9.0, 3.4))
    losses, distances = figure.subplots(1, 2)
    for row in result["rows"]:
        steps = [line["step"] for line in row["scored"]]
        losses.plot(*zip(*row["losses"], strict=True), label=row["name"], linewidth=1)
        distances.plot(steps, [line["judge_frechet_distance"] for line in row["scored"]], "o-", label=row["name"])
    losses.set(xlabel="step", ylabel="flow-matching loss, at each run's times", ylim=(0, None))
    distances.set(xlabel="step", ylabel="Fréchet distance (judge)", ylim=(0, None))
    distances.legend()
    storage.write_bytes(path, figure_png(figure))
