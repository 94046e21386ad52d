"""Previews and scores of a diffusion model while it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python, run_tool
from look_hosts import looked
from PIL import Image

from rae_xla.evaluation.files import write_samples
from rae_xla.evaluation.generation import Sampler, labels_of
from rae_xla.evaluation.scoring import evaluate_generation
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train

RECIPE = "recipes/quickstart/diffusion.yaml"
JUDGE = "{name: convnet, width: 32, feature_width: 128, weights: judge/weights.safetensors}"
# Ten steps of the 45 that an epoch has.
LOOKS = [
    "runtime=eager", "train.num_epochs=0.223", "train.warmup_epochs=0", "checkpoint.every_steps=5",
    "preview={every_epochs: 0.09, num_images: 12}",
    f"scoring={{every_epochs: 0.112, num_images: 50, features: {JUDGE}}}",
    "sampler.batch_size=16", "log.trackers=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def looked_at(one_device_run: Path) -> Path:
    train(load_recipe(RECIPE, [f"root={one_device_run}", *LOOKS, "run_dir=looked_at"]), eager())
    return one_device_run


def eager():
    return create("eager", MeshConfig(), "fp32")


def test_lines_and_pictures_are_there_when_they_are_due(looked_at: Path) -> None:
    lines = read_metrics(str(looked_at / "looked_at" / "metrics.jsonl"))
    scored = [line for line in lines if "recognised_share_50" in line]
    assert [line["step"] for line in scored] == [5, 10] and "judge_frechet_distance_50" in scored[0]
    pictures = sorted(path.name for path in (looked_at / "looked_at" / "samples").iterdir())
    assert pictures == [f"samples_{step:08d}.png" for step in (4, 8, 10)]
    # Two rows, ten and two, of 32 pixels with a gap of two.
    assert Image.open(looked_at / "looked_at" / "samples" / pictures[0]).size == (10 * 34 + 2, 2 * 34 + 2)


def test_scores_are_those_of_the_exported_weights(looked_at: Path) -> None:
    recipe = load_recipe(RECIPE, [f"root={looked_at}", *LOOKS, "run_dir=looked_at"])
    labels = labels_of("balanced", recipe.seed, 50, 10)
    images = Sampler(recipe, eager()).sample(labels, recipe.seed)["images"]
    write_samples(str(looked_at / "looked.npz"), [images], images.shape, labels)
    evaluation = load_recipe("recipes/quickstart/evaluation.yaml", [f"root={looked_at}"])
    expected = evaluate_generation(evaluation, eager(), str(looked_at / "looked.npz"), None)
    found = read_metrics(str(looked_at / "looked_at" / "metrics.jsonl"))[-1]
    assert found["judge_frechet_distance_50"] == pytest.approx(expected["judge_frechet_distance"], rel=1e-3)
    assert found["recognised_share_50"] == pytest.approx(expected["recognised_share"])
    sheet = np.asarray(Image.open(looked_at / "looked_at" / "samples" / "samples_00000010.png")).astype(int)
    assert np.abs(sheet[2:34, 2:34] - images[0].astype(int)).max() <= 1


def test_a_run_is_the_same_whether_it_is_looked_at_or_not(looked_at: Path) -> None:
    plain = [*LOOKS, "preview=null", "scoring=null", "run_dir=not_looked_at"]
    train(load_recipe(RECIPE, [f"root={looked_at}", *plain]), eager())
    first, second = [(looked_at / name / "weights.safetensors").read_bytes() for name in ("looked_at", "not_looked_at")]
    # But for the recipe in the header.
    assert first[-100_000:] == second[-100_000:]


def test_on_xla_nothing_is_compiled_twice(looked_at: Path) -> None:
    """A second compilation of either program is an error of its own; see `rae_xla.xla.step`."""
    overrides = [f"root={looked_at}", *LOOKS, "runtime=xla", "run_dir=on_xla", "model.depth=1", "model.head_depth=1"]
    report = train(load_recipe(RECIPE, overrides), create("xla", MeshConfig(), "fp32"))
    assert report["steps"] == 10
    lines = read_metrics(str(looked_at / "on_xla" / "metrics.jsonl"))
    assert [line["step"] for line in lines if "recognised_share_50" in line] == [5, 10]


def test_three_hosts_see_what_one_sees(looked_at: Path, tmp_path: Path) -> None:
    overrides = [f"root={looked_at}", *LOOKS, "data.batch_size=33"]
    done = run_python("tests/look_hosts.py", str(tmp_path), RECIPE, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    of_hosts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    seen = looked(load_recipe(RECIPE, overrides), eager())
    sheet = seen.pictures["samples"].astype(int)
    # The samples differ, so that some in another order would be seen.
    assert np.abs(sheet[2:34, 2:34] - sheet[2:34, 36:68]).max() > 20
    assert len(of_hosts) == 3
    for rank, found in enumerate(of_hosts):
        assert found == pytest.approx(seen.values, rel=1e-3)
        assert np.abs(np.load(tmp_path / f"{rank}.npy").astype(int) - sheet).max() <= 1


def test_looks_may_change_on_resume(looked_at: Path, exact_programs: dict[str, bool]) -> None:
    overrides = [f"root={looked_at}", *LOOKS, "run_dir=looked_at", "preview=null", "scoring.num_images=20"]
    assert train(load_recipe(RECIPE, overrides), eager())["steps"] == 10
    assert exact_programs["features"] and not exact_programs["samples"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["scoring.features.weights=null"], "scoring.features.weights: required here"),
        (["scoring.features.weights=none.safetensors"], "scoring.features.weights: .*cannot be read"),
        (["scoring.features.width=16"], "scoring.features.weights: .*does not fit"),
        (["autoencoder.decoder.weights=null"], "autoencoder.decoder.weights: required here"),
        (
            ["guidance={method: classifier_free, scale: 2.0}", "flow.label_dropout=0.0"],
            "guidance.method: classifier_free",
        ),
        (["flow.label_dropout=1.0"], "sampler.labels: must be unconditional"),
        (["data.source=train.json"], "scoring.reference: required here"),
        (["train.decay_end_epoch=0.1", "train.decay_start_epoch=0.2"], "decay_end_epoch: 0.1 must be after 0.2"),
    ],
)
def test_mistakes_are_told_before_training(changed: list[str], message: str, looked_at: Path) -> None:
    code, _, errors = run_tool("train", RECIPE, f"root={looked_at}", *LOOKS, "run_dir=mistaken", *changed)
    assert code == 2 and re.search(message, errors), errors
    assert not (looked_at / "mistaken").exists()
