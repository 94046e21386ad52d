"""The linear probe on real digits, against scikit-learn's logistic regression on the same features."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import run_tool
from photos import encoded
from PIL import Image
from sklearn.linear_model import LogisticRegression

from rae_xla import storage, tensor_files
from rae_xla.data.shards import parquet_of
from rae_xla.data.sources import Split, open_in_memory
from rae_xla.data.transforms import to_unit
from rae_xla.models.autoencoder import load_latent_encoder
from rae_xla.models.encoders import Encoder
from rae_xla.models.loading import initialised
from rae_xla.recipe import LinearProbeRecipe, load_recipe

PROBE = "recipes/quickstart/linear_probe.yaml"
IMAGENET = "recipes/linear_probe/dinov2_b.yaml"
SMALL = ["runtime=eager", "autoencoder.encoder.depth=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights, which is a representation too, and its statistics."""
    root = tmp_path_factory.mktemp("probe")
    encoder = initialised(lambda: Encoder(load_recipe(PROBE, SMALL).autoencoder.encoder), 0)
    tensor_files.write_tensors(str(root / "encoder" / "weights.safetensors"), encoder.state_dict())
    code, _, errors = run_tool("latent_stats", "recipes/quickstart/latent_stats.yaml", *SMALL, f"root={root}")
    assert code == 0, errors
    return root


def evaluated(root: Path, *overrides: str) -> dict:
    written = root / "scores.json"
    code, printed, errors = run_tool(
        "evaluate", "linear-probe", PROBE, *SMALL, f"root={root}", *overrides, "--json", str(written)
    )
    assert code == 0 and "top1_accuracy" in printed, errors
    return json.loads(written.read_text())


def test_reaches_what_logistic_regression_reaches(root: Path) -> None:
    recipe: LinearProbeRecipe = load_recipe(PROBE, [*SMALL, f"root={root}"])
    encoder = load_latent_encoder(recipe.autoencoder, recipe.root)

    def features(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        digits = open_in_memory(recipe.data, split)
        with torch.no_grad():
            latents = encoder(to_unit(torch.from_numpy(digits.images)))
        return latents.flatten(2).mean(dim=2), torch.from_numpy(digits.labels)

    expected = LogisticRegression(C=100.0, max_iter=3000).fit(*features("train")).score(*features("heldout"))
    weights = root / "encoder" / "weights.safetensors"
    before = weights.read_bytes()
    # Means of random features differ little from image to image: the weights have far to go.
    far = ["data.batch_size=128", "train.learning_rate=0.3"]
    scores = evaluated(root, *far)
    assert abs(scores["top1_accuracy"] - expected) <= 0.02, expected
    assert scores["top1_accuracy"] < scores["top5_accuracy"] <= 1
    assert scores["num_images"] == 360 and scores["pooling"] == "mean of tokens"
    assert weights.read_bytes() == before
    assert scores["autoencoder.encoder.weights"] == storage.content_hash(str(weights))
    # All that was trained is the linear layer, and it is not trained a second time.
    trained = root / "linear_probe" / "weights.safetensors"
    assert set(tensor_files.read_tensors(str(trained), "weights")) == {"head.weight", "head.bias"}
    written = trained.stat().st_mtime_ns
    assert evaluated(root, *far) == scores and trained.stat().st_mtime_ns == written


def test_held_out_images_of_a_manifest(root: Path) -> None:
    recipe = load_recipe(PROBE, [])
    for split, num_classes in (("train", 10), ("heldout", 10), ("heldout", 4)):
        digits = open_in_memory(recipe.data, split)
        kept = digits.labels < num_classes
        rows = [
            (encoded(Image.fromarray(image), "PNG"), int(label))
            for image, label in zip(digits.images[kept][:150], digits.labels[kept][:150], strict=True)
        ]
        name = f"{split}_{num_classes}"
        storage.write_bytes(str(root / f"{name}.parquet"), parquet_of(rows, 64))
        code, _, errors = run_tool("prepare_data", str(root / f"{name}.parquet"), "--out", str(root / f"{name}.json"))
        assert code == 0, errors
    shards = ["data.source=train_10.json", "data.flip=true", "data.stream.num_workers=0", "run_dir=shards"]
    short = [*shards, "data.batch_size=50", "train.num_epochs=2"]
    scores = evaluated(root, *short, "heldout_source=heldout_10.json")
    assert scores["num_images"] == 150 and scores["num_classes"] == 10
    # Another set may be held out later.
    assert evaluated(root, *short, "heldout_source=train_10.json")["num_images"] == 150
    for heldout, message in (
        ("heldout_4.json", r"heldout_source: heldout_4.json has 4 classes, data.source has 10"),
        ("none.json", "heldout_source: .*none.json.*prepare_data.py makes manifests"),
    ):
        code, _, errors = run_tool(
            "evaluate", "linear-probe", PROBE, *SMALL, *short, f"root={root}", f"heldout_source={heldout}"
        )
        assert code == 2 and errors.count("\n") == 1 and re.search(message, errors), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["linear-probe", PROBE, "heldout_source=x.json"],
            "heldout_source: must be null here, digits holds out a part",
        ),
        (["linear-probe", IMAGENET, "heldout_source=null"], "heldout_source: required here, imagenet/train.json is"),
        (["linear-probe", IMAGENET], "heldout_source: .*imagenet/validation.json"),
        (["linear-probe", PROBE, "runtime=eager"], "autoencoder.encoder.weights: .* cannot be read"),
        (["linear-probe", PROBE, "autoencoder.decoder=null"], "autoencoder.decoder: unknown key"),
        (["linear-probe", PROBE, "--samples", "x"], "--samples: not for linear-probe"),
        (["linear-probe", "recipes/quickstart/evaluation.yaml"], "takes a recipe with task linear_probe"),
        (["reconstruction", PROBE], "takes a recipe with task evaluation"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, errors = run_tool("evaluate", *arguments, f"root={out}")
    assert code == 2 and re.search(message, errors) and errors.count("\n") == 1, errors
    assert not out.exists()
