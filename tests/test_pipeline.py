"""The whole pipeline, shortened, on eight virtual devices and on one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from short_quickstart import load_short_recipe

from rae_xla.data.sources import DataConfig, open_in_memory
from rae_xla.data.transforms import to_unit
from rae_xla.evaluation.generation import Sampler
from rae_xla.models.autoencoder import STATS_EPS, load_latent_encoder
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train

TRAININGS = ("encoder", "judge", "decoder", "guide", "diffusion")
GUIDANCE = ("unguided", "classifier_free", "autoguidance")


def test_leaves_a_run_that_people_can_look_at(eight_device_run: tuple[Path, str]) -> None:
    root, printed = eight_device_run
    assert printed.strip().endswith("report.html")
    html = (root / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(GUIDANCE) + 2
    for name in TRAININGS:
        assert (root / name / "recipe.yaml").exists()
        assert [line["step"] for line in read_metrics(str(root / name / "metrics.jsonl"))] == list(range(1, 25))
        assert json.loads((root / name / "report.json").read_text())["runtime"]["num_devices"] == 8
    for mode in GUIDANCE:
        with np.load(root / "samples" / mode / "samples.npz") as samples:
            images, labels = samples["arr_0"], samples["arr_1"]
        assert images.shape == (30, 32, 32, 3) and images.dtype == np.uint8
        assert labels.dtype == np.int64 and np.bincount(labels).tolist() == [3] * 10
        manifest = json.loads((root / "samples" / mode / "manifest.json").read_text())
        assert manifest["shift"] == pytest.approx((96 * 16 / 4096) ** 0.5) and len(manifest["times"]) == 50


def test_a_saved_recipe_loads_as_it_was(eight_device_run: tuple[Path, str]) -> None:
    root, _ = eight_device_run
    saved = load_recipe(str(root / "diffusion" / "recipe.yaml"), [])
    assert saved.train.learning_rate == load_recipe("recipes/quickstart/diffusion.yaml", []).train.learning_rate


@pytest.mark.parametrize("name", TRAININGS)
def test_loss_curve_of_eight_devices_equals_that_of_one(
    name: str, eight_device_run: tuple[Path, str], one_device_run: Path
) -> None:
    curves = [
        [line["loss"] for line in read_metrics(str(root / name / "metrics.jsonl"))][:20]
        for root in (eight_device_run[0], one_device_run)
    ]
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_latent_statistics_normalise_the_features(one_device_run: Path, eight_device_run: tuple[Path, str]) -> None:
    recipe = load_recipe("recipes/quickstart/diffusion.yaml", [f"root={one_device_run}"])
    images = open_in_memory(DataConfig(source="digits", image_size=32, batch_size=1), "train").images
    with torch.no_grad():
        encoder = load_latent_encoder(recipe.autoencoder, recipe.root)
        latents = encoder(to_unit(torch.from_numpy(images))).double()
    assert latents.mean(dim=0).abs().max() < 1e-4
    one = load_file(one_device_run / "latent_stats" / "latent_stats.safetensors")
    # Where a feature hardly varies, the eps of the released normalisation shows.
    expected = one["variance"] / (one["variance"] + STATS_EPS)
    np.testing.assert_allclose(latents.var(dim=0, unbiased=False), expected, atol=1e-4)
    eight = load_file(eight_device_run[0] / "latent_stats" / "latent_stats.safetensors")
    np.testing.assert_allclose(one["mean"], eight["mean"], atol=2e-3)


def test_same_seed_same_weights(one_device_run: Path, tmp_path: Path) -> None:
    """Byte for byte, in another process than the first."""
    recipe = load_short_recipe("recipes/quickstart/judge.yaml", [f"root={tmp_path}"])
    train(recipe, create("xla", recipe.mesh, recipe.precision))
    first, again = [(root / "judge" / "weights.safetensors").read_bytes() for root in (one_device_run, tmp_path)]
    assert first == again


def test_same_seed_same_samples(one_device_run: Path) -> None:
    with np.load(one_device_run / "samples" / "unguided" / "samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    runtime = create("xla", MeshConfig(), "fp32")
    recipe = load_recipe("recipes/quickstart/sample_unguided.yaml", [f"root={one_device_run}"])
    np.testing.assert_array_equal(Sampler(recipe, runtime).sample(labels, recipe.seed)["images"], images)
    smaller = load_recipe("recipes/quickstart/sample_unguided.yaml", [f"root={one_device_run}", "sampler.batch_size=7"])
    other = Sampler(smaller, runtime).sample(labels, recipe.seed)["images"]
    # Another batch size may add in another order: the last digit of float32, at most one grey level.
    assert np.abs(other.astype(int) - images.astype(int)).max() <= 1
