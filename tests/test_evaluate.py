"""Scores from files to files: tools/evaluate.py and tools/reference_stats.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_python, run_tool
from inception_weights import blotches
from PIL import Image
from test_inception import features_of
from test_scores import exact_distance_of_few, inception_score_by_hand, precision_and_recall_by_hand

from rae_xla import storage
from rae_xla.data.sources import open_source
from rae_xla.errors import UserError
from rae_xla.evaluation import reference
from rae_xla.evaluation.measured import Measuring
from rae_xla.evaluation.reference import NamedReference, open_reference
from rae_xla.evaluation.scoring import evaluate_generation
from rae_xla.evaluation.stored_images import ImagesInMemory, images_at, open_stored
from rae_xla.hosts import Hosts
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.xla.step import num_compilations

JUDGED = "recipes/quickstart/evaluation.yaml"
INCEPTION = "recipes/evaluation/inception.yaml"
NUM_SAMPLES = 150


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than two batches of 64, and a rest."""
    path = tmp_path_factory.mktemp("scored") / "samples.npz"
    np.savez(path, blotches(NUM_SAMPLES, 32, 0), np.arange(NUM_SAMPLES) % 10)
    return path


@pytest.fixture(scope="module")
def judged(samples: Path, one_device_run: Path) -> dict:
    return score(one_device_run, samples, "eager", 64)


def score(root: Path, samples: Path, runtime: str, batch_size: int) -> dict:
    recipe = load_recipe(JUDGED, [f"root={root}", f"batch_size={batch_size}"])
    return evaluate_generation(recipe, create(runtime, MeshConfig(), "fp32"), str(samples), None)


def check_same(found: dict, expected: dict) -> None:
    assert found == {name: value and pytest.approx(value, rel=1e-6) for name, value in expected.items()}


@pytest.mark.parametrize("batch_size", [7, 32, 64])
def test_scores_are_those_of_any_batches(batch_size: int, samples: Path, one_device_run: Path, judged: dict) -> None:
    assert judged["num_samples"] == NUM_SAMPLES and judged["judge_frechet_distance"] > 0.1
    check_same(score(one_device_run, samples, "eager", batch_size), judged)
    check_same(score(one_device_run, samples, "xla", batch_size), judged)


@pytest.mark.parametrize("num_hosts", [2, 3, 4])
def test_scores_are_those_of_any_hosts(
    num_hosts: int, samples: Path, one_device_run: Path, judged: dict, tmp_path: Path
) -> None:
    arguments = [str(num_hosts), str(samples), str(tmp_path / "scores"), JUDGED, f"root={one_device_run}"]
    done = run_python("tests/score_hosts.py", *arguments, "batch_size=32")
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == num_hosts
    for of_host in found:
        check_same(of_host, judged)
    assert json.loads((tmp_path / "scores" / "manifest.json").read_text())["scores"] == pytest.approx(found[0])


def test_eight_devices_score_as_one(samples: Path, one_device_run: Path, judged: dict, tmp_path: Path) -> None:
    arguments = ["generation", JUDGED, f"root={one_device_run}", "batch_size=32", "mesh.fsdp=2"]
    done = run_python(
        "tools/evaluate.py", *arguments, "--samples", str(samples), "--out", str(tmp_path / "out"),
        "--json", str(tmp_path / "scores.json"), CPU_NUM_DEVICES="8", PJRT_DEVICE="CPU",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(json.loads((tmp_path / "scores.json").read_text()), judged)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["runtime"]["num_devices"] == 8


def test_nothing_is_compiled_after_the_first_batch(
    samples: Path, one_device_run: Path, judged: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    stored = open_stored(str(samples), "--samples")
    rows = type(stored).rows

    def counted(self, begin: int, end: int, size: int):
        for part in rows(self, begin, end, size):
            counts.append(num_compilations())
            yield part

    monkeypatch.setattr(type(stored), "rows", counted)
    before = num_compilations()
    # Of a size that no other test has.
    score(one_device_run, samples, "xla", 11)
    # The reference comes first; the report reads some of the samples again.
    assert len(counts) >= -(-NUM_SAMPLES // 11) and set(counts) == {before + 1}


def test_inceptions_scores_from_statistics_and_from_images(
    inception_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reference of digits with some of them kept: FID and sFID are against all, precision and recall those kept."""
    weights, files = ["--inception-weights", str(inception_weights)], tmp_path / "pictures"
    made, other = str(tmp_path / "digits.npz"), str(tmp_path / "scores")
    data = ["runtime=eager", "data={source: digits, image_size: 32}", "batch_size=24"]
    features = f"features={{name: inception, weights: {inception_weights}}}"
    short = ["data.num_images=12", *data, features]
    code, output, errors = run_tool(
        "reference_stats", INCEPTION, *short, "--for", "generation", "--keep-images", "5", "--out", made
    )
    assert code == 0 and "12 images, 5 kept" in output, errors
    with np.load(made) as arrays:
        assert arrays["mu"].shape == (2048,) and arrays["sigma_s"].shape == (2023, 2023)
        assert arrays["arr_0"].shape == (5, 32, 32, 3) and arrays["mu"].dtype == np.float64
    files.mkdir()
    # Some digits that the reference has not kept, and what is no digit.
    heldout = open_source(load_recipe(INCEPTION, short).data, ".", "heldout").images[:6]
    for index, image in enumerate(np.concatenate([heldout, blotches(2, 32, 5)])):
        Image.fromarray(image).save(files / f"{index:02d}.png")
    command = ["generation", "runtime=eager", "batch_size=5", "--samples", str(files), *weights]
    code, output, errors = run_tool(
        "evaluate", *command, "--reference", made, "--json", f"{other}.json", "--out", other
    )
    assert code == 0, errors
    scores = json.loads(Path(f"{other}.json").read_text())
    assert list(scores) == ["num_samples", "fid", "sfid", "inception_score", "precision", "recall"]
    assert scores["num_samples"] == 8 and scores["fid"] > 0 and scores["sfid"] > 0 and scores["inception_score"] >= 1
    assert "8 images are too few for a covariance of 2048 features" in caplog.text
    # The same by hand, of features computed here.
    runtime = create("eager", MeshConfig(), "fp32")
    measuring = Measuring(features_of(inception_weights, 32), 32, 8, runtime, Hosts(runtime))
    seen = measuring.images(open_stored(str(files), "k"), "samples", "k")
    digits = load_recipe(INCEPTION, short).data
    whole = measuring.images(ImagesInMemory("digits", open_source(digits, ".", "train").images), "reference", "k")
    kept = measuring.images(open_stored(made, "k"), "reference", "k")
    assert seen.seen and whole.seen and kept.seen
    for name, column in (("fid", "features"), ("sfid", "spatial")):
        expected = exact_distance_of_few(seen.seen[column], whole.seen[column])
        assert scores[name] == pytest.approx(expected, rel=1e-5)
    pair = precision_and_recall_by_hand(kept.seen["features"], seen.seen["features"], 3)
    assert (scores["precision"], scores["recall"]) == pair and pair[0] != pair[1]
    logits = seen.seen["features"].astype(np.float64) @ measuring.extractor.logits_weight.T
    assert scores["inception_score"] == pytest.approx(inception_score_by_hand(logits, 5000), rel=1e-6)
    assert scores["inception_score"] > 1.001
    html = (tmp_path / "scores" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 and "nobody else" in html
    # Other features than those of the statistics.
    tensors = torch.load(inception_weights, weights_only=True)
    torch.save({**tensors, "fc.bias": tensors["fc.bias"] + 1}, tmp_path / "others.pth")
    others = [*command[:-1], str(tmp_path / "others.pth"), "--reference", made, "--out", other]
    code, _, errors = run_tool("evaluate", *others)
    assert code == 2 and "digits.npz are of features with weights_sha256" in errors
    # Images of another size than those that the statistics are of.
    np.savez(tmp_path / "large.npz", blotches(5, 40, 0))
    large = ["--samples", str(tmp_path / "large.npz"), *weights, "--reference", made]
    code, _, errors = run_tool("evaluate", "generation", "runtime=eager", *large)
    assert code == 2 and "--reference: its images have 32 pixels a side, the samples have 40" in errors


def test_a_manifest_says_what_decides_and_two_say_what_differs(
    samples: Path, one_device_run: Path, judged: dict, tmp_path: Path
) -> None:
    root, first = one_device_run, samples.parent / "scores"
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["samples"]["labels"]["fewest"] == manifest["samples"]["labels"]["most"] == 15
    assert len(manifest["reference"].pop("images_sha256")) == 64
    assert manifest["reference"] == {
        "path": "held-out images", "num_images": 360, "name": None, "purpose": "generation", "split": "heldout",
    }  # fmt: skip
    assert manifest["precision"]["matmul_multiplies"] == "float32" and len(manifest["features"]["weights_sha256"]) == 64
    html = (first / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3 and "This is not FID." in html
    sampled = root / "samples" / "unguided"
    code, _, errors = run_tool(
        "evaluate", "generation", JUDGED, f"root={root}", "runtime=eager", "batch_size=9",
        "--samples", str(sampled), "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, errors
    sampling = json.loads((tmp_path / "manifest.json").read_text())["sampling"]
    assert sampling["sampler"]["num_grid_points"] == 50 and sampling["files"]["model"]["sha256"]
    code, output, errors = run_tool("evaluate", "compare", str(sampled / "scores"), str(tmp_path))
    assert code == 0, errors
    assert "can move a score: nothing differs" in output and "runtime.runtime: xla / eager" in output
    code, output, _ = run_tool("evaluate", "compare", str(first), str(tmp_path / "manifest.json"))
    moving, _, rest = output.partition("may move last digits")
    assert "samples.num_images: 150 / 30" in moving and "samples.images_sha256" in moving
    assert "sampling.guidance.method: - / none" in moving
    assert "batch_size" not in output and "judge_frechet_distance" in rest
    for path, found in ((tmp_path / "none", "no manifest of scores is there"), (sampled, "is no manifest of scores")):
        code, _, errors = run_tool("evaluate", "compare", str(path), str(tmp_path))
        assert code == 2 and found in errors


def test_references_are_known_by_name_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "pretrained" / "adm.npz", tmp_path / "other.npz"
    file.parent.mkdir()
    np.savez(file, mu=np.zeros(3))
    np.savez(other, mu=np.ones(3))
    sha256 = storage.content_hash(str(file))
    monkeypatch.setitem(reference.NAMED, "adm", NamedReference("generation", "https://nowhere/adm.npz", sha256))
    path, about = open_reference("adm", "generation", str(tmp_path))
    assert (path, about["name"], about["sha256"]) == (str(file), "adm", sha256)
    assert open_reference(str(file), "generation", ".")[1]["name"] == "adm", "by its content"
    assert open_reference(str(other), "reconstruction", ".")[1] == {
        "name": None, "path": str(other), "sha256": storage.content_hash(str(other)), "purpose": None,
    }  # fmt: skip
    for given in ("adm", str(file)):
        with pytest.raises(
            UserError,
            match="--reference: adm is a reference for generation, and these are scores of reconstruction; name one",
        ):
            open_reference(given, "reconstruction", str(tmp_path))
    file.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=rf"adm.npz is not the file that was published \(SHA-256 {sha256}\); remove it"):
        open_reference("adm", "generation", str(tmp_path))
    with pytest.raises(UserError, match=r"imagenet_val_256_rfid is not there; make .* with tools/reference_stats.py"):
        open_reference("imagenet_val_256_rfid", "reconstruction", str(tmp_path))
    with pytest.raises(UserError, match=r"none\.npz is not there; correct the path, or name one of adm_imagenet256"):
        open_reference("none.npz", "generation", str(tmp_path))


def test_an_autoencoder_is_scored_with_its_features(
    one_device_run: Path, tmp_path: Path, exact_programs: dict[str, bool]
) -> None:
    out = str(tmp_path / "scores")
    code, _, errors = run_tool(
        "evaluate", "reconstruction", JUDGED, f"root={one_device_run}", "runtime=eager", "--out", out
    )
    assert code == 0, errors
    scores = json.loads((tmp_path / "scores" / "manifest.json").read_text())["scores"]
    assert list(scores) == ["judge_reconstruction_frechet_distance", "psnr", "ssim", "lpips", "num_images"]
    assert scores["num_images"] == 360 and scores["lpips"] is None and 0 < scores["ssim"] < 1
    assert scores["judge_reconstruction_frechet_distance"] > 0
    # Against a file of the same images it is the same.
    made = str(tmp_path / "heldout.npz")
    reference_of = ["reference_stats", JUDGED, f"root={one_device_run}", "runtime=eager", "--out", made, "--for"]
    assert run_tool(*reference_of, "reconstruction")[0] == 0
    again = ["evaluate", "reconstruction", JUDGED, f"root={one_device_run}", "runtime=eager", "--reference", made]
    code, _, errors = run_tool(*again, "--out", out, "--json", f"{out}.json")
    assert code == 0, errors
    check_same(json.loads(Path(f"{out}.json").read_text()), scores)
    assert run_tool(*reference_of, "generation")[0] == 0
    assert exact_programs["reference"] and exact_programs["comparing"] and not exact_programs["reconstructing"]
    html = (tmp_path / "scores" / "report.html").read_text()
    assert "<h2>Reconstructions</h2>" in html and html.count("data:image/png;base64,") == 1
    code, _, errors = run_tool(*again, "--out", out)
    assert code == 2 and "heldout.npz is a reference for generation, and these are scores of reconstruction" in errors


def test_files_that_are_no_samples(tmp_path: Path) -> None:
    images = np.full((9, 4, 4, 3), 77, np.uint8)
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    np.savez_compressed(tmp_path / "whole.npz", np.arange(432, dtype=np.uint8).reshape(9, 4, 4, 3), np.arange(9))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "uneven.npz", images, np.arange(8))
    np.savez(tmp_path / "nothing.npz", images[:0])
    np.savez(tmp_path / "named.npz", images, np.array([f"{index}.png" for index in range(9)]))
    np.savez(tmp_path / "float.npz", images / 255.0)
    np.savez(tmp_path / "first.npz", images.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(images))
    (tmp_path / "folder").mkdir()
    for name, found in {
        "none.npz": "cannot be read; make it first",
        "other.npz": r"holds no images \(arr_0\), but pixels",
        "empty.npz": "is not an .npz file",
        "cut.npz": "is not an .npz file",
        "uneven.npz": r"has 9 images, and labels \(arr_1\) of shape \[8\]",
        "nothing.npz": r"are uint8 \[0, 4, 4, 3\], should be",
        "float.npz": r"are float64 \[9, 4, 4, 3\], should be uint8 \[n, S, S, 3\] in 0..255",
        "first.npz": r"are uint8 \[9, 3, 4, 4\], should be",
        "fortran.npz": "Fortran's order",
        "folder": "holds neither samples.npz nor pictures",
    }.items():
        with pytest.raises(UserError, match=rf"^--samples: .*{found}"):
            open_stored(str(tmp_path / name), "--samples")
    assert open_stored(str(tmp_path / "named.npz"), "--samples").labels is None
    stored = open_stored(str(tmp_path / "whole.npz"), "--samples")
    everything = np.arange(432, dtype=np.uint8).reshape(9, 4, 4, 3)
    np.testing.assert_array_equal(np.concatenate(list(stored.rows(2, 9, 4))), everything[2:])
    np.testing.assert_array_equal(images_at(stored, np.array([7, 0, 7]), 4), everything[[7, 0, 7]])
    # A member whose bytes do not inflate is found when it is read.
    damaged = bytearray(whole)
    damaged[80:140] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.npz is not an .npz file, or is damaged"):
        list(open_stored(str(tmp_path / "damaged.npz"), "--samples").rows(0, 9, 4))
    for size in (4, 5):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(tmp_path / "folder" / f"{size}.png")
    with pytest.raises(UserError, match=r"5\.png has 5 pixels a side, the first picture has 4"):
        list(open_stored(str(tmp_path / "folder"), "--samples").rows(0, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--samples: required for generation"),
        (["--samples", "dark.npz"], "no pixel of .*dark.npz is above 1; images are to be in 0..255"),
        (["--samples", "few.npz"], "samples: 3 images are too few for scores; 4 are the least"),
        (["--samples", "large.npz"], "--reference: its images have 32 pixels a side, the samples have 40"),
        (
            ["--samples", "nan.npz", "--reference", "nan.npz"],
            "--reference: .*nan.npz: mu has values that are no finite",
        ),
        (
            ["--samples", "odd.npz", "--reference", "odd.npz"],
            r"mu and sigma are \[3\] and \[3, 2\], should be \[2048\]",
        ),
        (
            ["--samples", "five.npz", "--reference", "gone.npz"],
            "--reference: .*gone.npz is not there; correct",
        ),
        (
            ["--samples", "few.npz", "--inception-weights", "w"],
            "--inception-weights: the recipe's features are convnet",
        ),
        (["features.weights=null", "--samples", "five.npz"], "features.weights: required here; train the judge"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, one_device_run: Path, tmp_path: Path, inception_weights: Path
) -> None:
    np.savez(tmp_path / "dark.npz", np.ones((9, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "few.npz", blotches(3, 32, 0), np.arange(3))
    np.savez(tmp_path / "five.npz", blotches(5, 32, 0))
    np.savez(tmp_path / "large.npz", blotches(9, 40, 0))
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez(tmp_path / "odd.npz", mu=np.ones(3), sigma=np.ones((3, 2)))
    given = [str(tmp_path / part) if part.endswith(".npz") else part for part in arguments]
    recipe = [JUDGED, f"root={one_device_run}"]
    if "nan.npz" in arguments or "odd.npz" in arguments:
        recipe = [INCEPTION, "--inception-weights", str(inception_weights)]
    code, _, errors = run_tool("evaluate", "generation", *recipe, "runtime=eager", *given)
    assert code == 2 and re.search(message, errors.splitlines()[-1]), errors
    assert not (tmp_path / "scores").exists()


def test_a_default_recipe_wants_a_reference(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", blotches(5, 32, 0))
    code, _, errors = run_tool("evaluate", "generation", "runtime=eager", "--samples", str(tmp_path / "few.npz"))
    assert code == 2 and "--reference: required, unless data names a set in memory" in errors
    code, _, errors = run_tool("evaluate", "reconstruction", INCEPTION, "runtime=eager")
    assert code == 2 and "autoencoder: required for reconstruction" in errors
    for what in ("compare", "linear-probe"):
        code, _, errors = run_tool("evaluate", what, "x", "--samples", "s.npz")
        assert code == 2 and f"--samples: not for {what}" in errors
