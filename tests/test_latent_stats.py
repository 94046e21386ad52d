"""Latent statistics against float64 numpy, in batches of any size, on one device and on eight, killed or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import latent_stats_cases as cases
import numpy as np
import pytest
import torch
from conftest import run_python
from photos import Rows, write_manifest_of, write_shards
from safetensors.torch import load_file

from rae_xla.data.loader import images_in_order
from rae_xla.data.sources import open_in_memory, open_source
from rae_xla.data.transforms import to_unit
from rae_xla.errors import UserError
from rae_xla.evaluation import latent_stats
from rae_xla.evaluation.latent_stats import PROGRESS_FILE, STATS_FILE, Moments, Progress, reduce_batch
from rae_xla.models.autoencoder import STATS_EPS, load_latent_encoder


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stats_one")
    cases.write_encoder(root)
    cases.passes(root)
    cases.far_from_zero(root)
    return root


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where what was found is, and what was logged."""
    root = tmp_path_factory.mktemp("stats_eight")
    cases.write_encoder(root)
    done = run_python("tests/latent_stats_cases.py", str(root), CPU_NUM_DEVICES="8", PJRT_DEVICE="CPU")
    assert done.returncode == 0, done.stderr[-4000:]
    return root, done.stderr


@pytest.fixture(scope="module")
def features(on_one: Path) -> np.ndarray:
    """Of the digits, in plain PyTorch; float64 [N, C, h, w]."""
    recipe = cases.recipe_of(on_one, "", 1)
    images = open_in_memory(recipe.data, "train").images
    with torch.no_grad():
        encoder = load_latent_encoder(recipe.autoencoder, recipe.root)
        return encoder(to_unit(torch.from_numpy(images))).double().numpy()


def assert_statistics_of(file: Path, rows: np.ndarray, atol: float = 1e-6) -> None:
    """Those in the file are what numpy finds in float64."""
    found = load_file(file)
    np.testing.assert_allclose(found["mean"], rows.mean(axis=0), rtol=0, atol=atol)
    np.testing.assert_allclose(found["variance"], rows.var(axis=0), rtol=0, atol=atol)


@pytest.mark.parametrize("batch_size", cases.BATCH_SIZES)
@pytest.mark.parametrize("num_devices", [1, 8])
def test_statistics_are_those_of_numpy_in_batches_of_any_size_on_any_number_of_devices(
    batch_size: int, num_devices: int, on_one: Path, on_eight: tuple[Path, str], features: np.ndarray
) -> None:
    run_dir = (on_one if num_devices == 1 else on_eight[0]) / f"batch_{batch_size}"
    assert_statistics_of(run_dir / STATS_FILE, features)
    report = json.loads((run_dir / "report.json").read_text())
    assert report["num_images"] == cases.NUM_IMAGES and report["runtime"]["num_devices"] == num_devices
    assert sorted(path.name for path in run_dir.iterdir()) == [STATS_FILE, "recipe.yaml", "report.json"]


def test_a_mean_far_above_the_deviation_costs_no_digits(on_one: Path, on_eight: tuple[Path, str]) -> None:
    rows = cases.far_rows().astype(np.float64)
    for root in (on_one, on_eight[0]):
        assert_statistics_of(root / "far_from_zero.safetensors", rows, atol=1e-8)


def test_features_that_never_change_have_no_variance() -> None:
    reduced = reduce_batch(torch.full((7, 1, 2, 2), 0.1), torch.arange(7) < 5)
    moments = Moments.of_batch(5, {name: value.numpy() for name, value in reduced.items()})
    assert (moments.squares >= 0).all() and (moments.squares < 1e-12).all()


def test_a_killed_pass_goes_on_to_the_same_bytes(on_eight: tuple[Path, str]) -> None:
    root, logged = on_eight
    assert f"goes on after {cases.KILLED_AFTER_SAVES * 64} of {cases.NUM_IMAGES} images" in logged
    whole, killed = [(root / name / STATS_FILE).read_bytes() for name in ("batch_64", "killed")]
    assert killed == whole and not (root / "killed" / PROGRESS_FILE).exists()


def interrupted(root: Path, run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass in batches of 64 that ends after three of them."""
    recipe = cases.recipe_of(root, run_dir, 64)
    monkeypatch.setattr(latent_stats, "SECONDS_BETWEEN_SAVES", 0.0)
    with monkeypatch.context() as patched:
        whole = latent_stats.statistics_so_far

        def short(*arguments: object) -> Iterator[Progress]:
            yield from islice(whole(*arguments), 3)
            raise KeyboardInterrupt

        patched.setattr(latent_stats, "statistics_so_far", short)
        with pytest.raises(KeyboardInterrupt):
            latent_stats.write_latent_stats(recipe, cases.runtime_of(recipe))


def test_an_interrupted_pass_goes_on_in_other_batches(
    on_one: Path, features: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(on_one, "other_batches", monkeypatch)
    recipe = cases.recipe_of(on_one, "other_batches", 500)
    caplog.set_level("INFO")
    latent_stats.write_latent_stats(recipe, cases.runtime_of(recipe))
    assert f"goes on after 192 of {cases.NUM_IMAGES} images" in caplog.text
    assert_statistics_of(on_one / "other_batches" / STATS_FILE, features)


def test_a_pass_is_not_mixed_with_another(on_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(on_one / "encoder.safetensors", tmp_path)
    interrupted(tmp_path, "stats", monkeypatch)
    cases.write_encoder(tmp_path, seed=1)
    recipe = cases.recipe_of(tmp_path, "stats", 64, num_images=900)
    with pytest.raises(UserError) as found:
        latent_stats.write_latent_stats(recipe, cases.runtime_of(recipe))
    told = f"{PROGRESS_FILE}: the pass that it is of had another autoencoder.encoder.weights, data.num_images; remove"
    assert told in str(found.value)


def test_images_in_shards_are_read_from_any_one_on(tmp_path: Path, rows: Rows) -> None:
    """And one that cannot be decoded keeps its number, so that the others keep theirs."""
    damaged = [(b"nothing", 0) if number == 21 else row for number, row in enumerate(rows)]
    write_shards(tmp_path, "parquet", damaged, num_shards=3, images_per_block=8)
    config = cases.recipe_of(tmp_path, "", 16, source=write_manifest_of(tmp_path), num_images=None).data
    config = config.model_copy(update={"stream": config.stream.model_copy(update={"num_workers": 0})})
    images = open_source(config, ".", "train")

    def column(name: str, begin: int) -> np.ndarray:
        return np.concatenate([part[name] for part in images_in_order(images, config, begin)(16)])

    assert column("positions", 0).tolist() == [number for number in range(100) if number != 21]
    whole = column("images", 0)
    for begin in (0, 5, 21, 22, 33, 40, 99):
        missing = len(range(begin)) - (begin > 21)
        assert column("positions", begin)[0] == (22 if begin == 21 else begin)
        assert np.array_equal(column("images", begin), whole[missing:])
    assert list(images_in_order(images, config, 100)(16)) == []


@pytest.mark.parametrize("has_mean", [True, False])
def test_a_released_file_of_statistics_normalises_as_ours(has_mean: bool, on_one: Path) -> None:
    ours = load_file(on_one / "batch_64" / STATS_FILE)
    released = {"mean": ours["mean"], "var": ours["variance"]} if has_mean else {"var": ours["variance"]}
    torch.save(released, on_one / "stat.pt")
    config = cases.recipe_of(on_one, "", 1).autoencoder
    files = (f"batch_64/{STATS_FILE}", "stat.pt")
    read = [load_latent_encoder(config.model_copy(update={"latent_stats": file}), str(on_one)) for file in files]
    assert torch.equal(read[0].latent_shift, ours["mean"])
    assert torch.equal(read[1].latent_shift, ours["mean"] if has_mean else torch.zeros_like(ours["mean"]))
    for encoder in read:
        assert torch.equal(encoder.latent_scale, (ours["variance"] + STATS_EPS).sqrt())


def test_a_finished_pass_is_not_repeated_and_not_written_over(on_one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = cases.recipe_of(on_one, "batch_64", 64)
    file = on_one / "batch_64" / STATS_FILE
    before = file.read_bytes()
    monkeypatch.setattr(latent_stats, "statistics_so_far", lambda *_: pytest.fail("computed again"))
    report = latent_stats.write_latent_stats(recipe, cases.runtime_of(recipe))
    assert report["num_images"] == cases.NUM_IMAGES
    other = recipe.model_copy(update={"precision": "bf16"})
    with pytest.raises(UserError, match="the pass that it is of had another precision; remove it to begin anew"):
        latent_stats.write_latent_stats(other, cases.runtime_of(recipe))
    assert file.read_bytes() == before
