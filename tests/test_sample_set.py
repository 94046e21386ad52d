"""Sets of samples: made by any number of hosts, gone on with after kills, and what is written about them."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_python, run_tool
from faulty_bucket import BUCKET, FaultyProxy
from inception_weights import blotches
from PIL import Image
from safetensors.torch import load_file, save_file
from test_sampling import RECIPE, sample
from test_sampling import root as root

from rae_xla import storage
from rae_xla.errors import StoppedError, UserError
from rae_xla.evaluation import sample_set
from rae_xla.evaluation.generation import Sampler, labels_of
from rae_xla.evaluation.sample_set import write_sample_set
from rae_xla.evaluation.scoring import evaluate_generation
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig


def read_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(storage.read_bytes(path))) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def made_by(root: Path, out: Path, num_images: int, batch_size: int, hosts: list[int], kills: int) -> tuple:
    """(images, labels, what tests/sampling_jobs.py says)"""
    recipe = {**yaml.safe_load((root / "recipe.yaml").read_text()), "sampler": {"num_grid_points": 8}}
    recipe["sampler"]["batch_size"] = batch_size
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    arguments = [str(path), str(out), str(num_images), *map(str, hosts), str(kills)]
    done = run_python("tests/sampling_jobs.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (out / "parts").exists()
    return *read_samples(str(out / "samples.npz")), json.loads(done.stdout.splitlines()[-1])


def check_same_on_all_hosts(root: Path, directory: Path, num_images: int, kills: int) -> None:
    whole, labels, _ = made_by(root, directory / "one", num_images, 32, [1], 0)
    assert np.bincount(labels).tolist() == [num_images // 5] * 5
    for hosts, batch_size in (([3], 100), ([8, 3], 125)):
        images, again, found = made_by(root, directory / f"{hosts[0]}", num_images, batch_size, hosts, kills)
        print(hosts, batch_size, found)
        assert found["jobs"] == kills + 1
        np.testing.assert_array_equal(again, labels)
        difference = np.abs(images.astype(int) - whole.astype(int))
        # Other batches may add in another order: at most a grey level, and hardly ever that.
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, (difference.max(), (difference > 0).mean())
    assert len({image.tobytes() for image in whole}) == num_images


def test_any_number_of_hosts_makes_the_same_samples(root: Path, tmp_path: Path) -> None:
    check_same_on_all_hosts(root, tmp_path, 1000, 1)


@pytest.mark.nightly
def test_50_000_samples_of_hosts_that_are_killed(root: Path, tmp_path: Path) -> None:
    check_same_on_all_hosts(root, tmp_path, 50_000, 8)


def test_a_killed_job_goes_on_where_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_set, "IMAGES_PER_PART", 10)
    recipe = load_recipe(str(root / "recipe.yaml"), ["sampler.batch_size=8"])
    runtime = create("eager", MeshConfig(), "fp32")
    whole = write_sample_set(recipe, runtime, str(tmp_path / "whole"), seed=3, num_images=60)
    assert whole["made_now"] == 60
    run = Sampler.run

    def ends_early(self, *arguments):
        for number, made in enumerate(run(self, *arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(Sampler, "run", ends_early)
    with pytest.raises(KeyboardInterrupt):
        write_sample_set(recipe, runtime, str(tmp_path / "parts"), seed=3, num_images=60)
    monkeypatch.setattr(Sampler, "run", run)
    parts = sorted(path.name for path in (tmp_path / "parts" / "parts").iterdir())
    # What was made before it was told to end is there, though the last is a part cut short.
    assert parts[-1] == "00000030-00000032.safetensors"
    (tmp_path / "parts" / "parts" / parts[0]).unlink()
    resumed = write_sample_set(recipe, runtime, str(tmp_path / "parts"), seed=3, num_images=60)
    assert resumed["made_now"] == 60 - 32 + 10
    for name in ("samples.npz", "contact_sheet.png", "plan.json", "recipe.yaml"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # Once more, and nothing is made.
    before = (tmp_path / "whole" / "samples.npz").stat().st_mtime_ns
    assert write_sample_set(recipe, runtime, str(tmp_path / "whole"), seed=3, num_images=60) == whole
    assert (tmp_path / "whole" / "samples.npz").stat().st_mtime_ns == before


def evaluation_of(root: Path, directory: Path) -> tuple[Path, Path]:
    """A recipe in the features of the released encoder, and a reference of pictures."""
    encoder = {**RECIPE["autoencoder"]["encoder"], "weights": str(root / "encoder.safetensors")}
    content = {"task": "evaluation", "root": str(directory), "seed": 0, "runtime": "eager", "features": encoder}
    recipe, reference = directory / "evaluation.yaml", directory / "reference.npz"
    recipe.write_text(yaml.safe_dump({**content, "batch_size": 17}))
    size = load_recipe(str(root / "recipe.yaml"), []).autoencoder.image_size
    np.savez(reference, blotches(60, size, 1))
    return recipe, reference


def test_a_job_scores_what_it_makes_without_keeping_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_programs: dict[str, bool]
) -> None:
    """The same scores as of stored samples; of one host, and of three that were killed and went on as two."""
    recipe, reference = evaluation_of(root, tmp_path)
    options = ["--num-images", "200", "--seed", "3", "runtime=eager", "--out", str(tmp_path / "kept")]
    scored = ["--evaluation", str(recipe), "--reference", str(reference)]
    code, errors = sample(root, *options)
    assert code == 0, errors
    found = evaluate_generation(
        load_recipe(str(recipe), []), create("eager", MeshConfig(), "fp32"), str(tmp_path / "kept"), str(reference)
    )
    name = "frechet_distance_vit_tiny_patch16_224"
    assert found["num_samples"] == 200 and found[name] > 0.1 and 0 <= found["precision_vit_tiny_patch16_224"] <= 1
    code, errors = sample(root, *options[:-1], str(tmp_path / "both"), *scored)
    assert code == 0, errors
    names = ["contact_sheet.png", "manifest.json", "plan.json", "recipe.yaml", "samples.npz", "scores"]
    assert storage.list_names(str(tmp_path / "both")) == names
    assert storage.read_json(str(tmp_path / "both" / "manifest.json"))["scores"] == pytest.approx(found, rel=1e-6)
    monkeypatch.setenv("SCORED", f"{recipe} {reference}")
    jobs = ["tests/sampling_jobs.py", str(root / "recipe.yaml"), str(tmp_path / "none"), "200", "3", "2", "2"]
    done = run_python(*jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["jobs"] == 3
    names.remove("samples.npz")
    assert storage.list_names(str(tmp_path / "none")) == names
    manifest = storage.read_json(str(tmp_path / "none" / "scores" / "manifest.json"))
    assert manifest["sampling"]["scored"]["images_kept"] is False
    # Its seed is the recipe's: other samples, of the same kind.
    again = load_recipe(str(root / "recipe.yaml"), [])
    assert write_sample_set(
        again, create("eager", MeshConfig(), "fp32"), str(tmp_path / "plain"), seed=again.seed, num_images=200
    )
    expected = evaluate_generation(
        load_recipe(str(recipe), []), create("eager", MeshConfig(), "fp32"), str(tmp_path / "plain"), str(reference)
    )
    assert manifest["scores"] == pytest.approx(expected, rel=1e-4)
    sheets = [np.asarray(Image.open(tmp_path / of / "contact_sheet.png")).astype(int) for of in ("none", "plain")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    with np.load(tmp_path / "none" / "scores" / "statistics.npz") as arrays:
        assert json.loads(str(arrays["about"]))["images_sha256"] == manifest["samples"]["images_sha256"]
    code, errors = sample(root, *options[:-1], str(tmp_path / "both"))
    assert code == 2 and "holds samples made with another scored" in errors
    np.savez(tmp_path / "other.npz", blotches(60, 32, 2))
    changed = ["--evaluation", str(recipe), "--reference", str(tmp_path / "other.npz")]
    code, errors = sample(root, *options[:-1], str(tmp_path / "both"), *changed)
    assert (
        code == 2
        and "was scored against a file of SHA-256" in errors
        and "tools/evaluate.py generation --samples" in errors
    )
    assert exact_programs["features"] and not exact_programs["sampling (autoguidance)"]
    code, errors = sample(root, *options, "--no-images")
    assert code == 2 and "--no-images: goes with --reference or --evaluation" in errors


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (["--seed", "4"], "seed"),
        (["--num-images", "21"], "num_images"),
        (["guidance.scale=2.0"], "guidance.scale"),
        (["model.weights=model2.pt"], "files.model.sha256"),
        (["sampler.num_grid_points=9"], "sampler.num_grid_points"),
        (["autoencoder.encoder.timm_model=deit_tiny_patch16_224"], "encoder.timm_model"),
        (["sampler.labels=random"], "label_mode"),
        (["precision=bf16"], "precision.precision"),
        (["--save-latents", "latents.npy"], "latents"),
    ],
)
def test_a_folder_has_samples_of_one_kind(
    changed: list[str], key: str, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.getbasetemp() / "of_one_kind"
    model = torch.load(root / "model.pt", weights_only=True)
    torch.save({name: value + (name == "x_embedder.proj.bias") for name, value in model.items()}, root / "model2.pt")
    for name, moved in (("model", "moved"), ("guide", "moved_guide")):
        shutil.copy(root / f"{name}.pt", root / f"{moved}.pt")
    arguments = [str(root / "recipe.yaml"), "--out", str(out)]
    if not out.exists():
        assert run_tool("sample", *arguments, "--num-images", "20")[0] == 0
    number = [] if "--num-images" in changed else ["--num-images", "20"]
    code, _, errors = run_tool("sample", *arguments, *number, *changed)
    assert code == 2 and re.search(f"--out: .* holds samples made with another {key} .*give another folder", errors)
    # What changes no image may change.
    for same in ("sampler.batch_size=3", "model.weights=moved.pt", "guidance.model.weights=moved_guide.pt"):
        assert run_tool("sample", *arguments, "--num-images", "20", same)[0] == 0


def test_sample_files_are_as_adm_s_evaluator_reads_them(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(root / "recipe.yaml"), [])
    runtime = create("eager", MeshConfig(), "fp32")
    write_sample_set(recipe, runtime, str(tmp_path), seed=3, num_images=12, save_latents=str(tmp_path / "z.npy"))
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"] and archive.testzip() is None
        # It reads the header, then the rows one by one, from a stream that cannot go back.
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            assert shape == (12, 32, 32, 3) and not fortran and dtype == np.uint8
            assert len(file.read()) == 12 * 32 * 32 * 3
    assert np.load(tmp_path / "z.npy").shape == (12, 24, 4, 4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["label_mode"] == "balanced" and manifest["evaluations"] == 7 and len(manifest["times"]) == 8
    assert manifest["files"]["guide"]["sha256"] and manifest["precision"]["precision"] == "fp32"


def test_what_other_jobs_left_is_looked_at_closely(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(str(root / "recipe.yaml"), [])
    runtime = create("eager", MeshConfig(), "fp32")

    def write(name: str, **options: str) -> dict:
        return write_sample_set(recipe, runtime, str(tmp_path / name), seed=3, num_images=20, **options)

    monkeypatch.setattr(sample_set, "IMAGES_PER_PART", 8)
    monkeypatch.setattr(storage, "remove", lambda _: None)
    write("whole")
    parts = tmp_path / "whole" / "parts"
    monkeypatch.undo()
    # Killed before its parts were removed, the next job does it.
    write("whole")
    assert not parts.exists()
    # A host of a killed job that went on has made samples 2 to 10 once more.
    monkeypatch.setattr(sample_set, "IMAGES_PER_PART", 8)
    monkeypatch.setattr(storage, "remove", lambda _: None)
    write("again")
    monkeypatch.undo()
    parts, rows = tmp_path / "again" / "parts", {}
    for name in ("00000000-00000008", "00000008-00000016"):
        rows |= dict(zip(range(int(name[:8]), 99), load_file(parts / f"{name}.safetensors")["images"], strict=False))
    save_file({"images": torch.stack([rows[i] for i in range(2, 10)])}, parts / "00000002-00000010.safetensors")
    (tmp_path / "again" / "manifest.json").unlink()
    (tmp_path / "again" / "samples.npz").unlink()
    assert write("again")["made_now"] == 0
    assert (tmp_path / "again" / "samples.npz").read_bytes() == (tmp_path / "whole" / "samples.npz").read_bytes()
    # A file that does not hold what its name says is told.
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").unlink()
    (tmp_path / "damaged" / "parts").mkdir()
    save_file(
        {"images": torch.stack([rows[i] for i in range(15)])}, tmp_path / "damaged/parts/00000000-00000016.safetensors"
    )
    with pytest.raises(StoppedError, match=r"00000000-00000016.safetensors is damaged; remove it"):
        write("damaged")
    # Nobody knows what these are.
    (tmp_path / "whole" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"--out: .*whole holds samples and no plan.json"):
        write("whole")
    write("latents", save_latents=str(tmp_path / "z.npy"))
    (tmp_path / "z.npy").unlink()
    with pytest.raises(UserError, match=r"--save-latents: .*z.npy is gone"):
        write("latents", save_latents=str(tmp_path / "z.npy"))


def test_samples_go_to_a_bucket_in_pieces(root: Path, tmp_path: Path, bucket: FaultyProxy) -> None:
    recipe = load_recipe(str(root / "recipe.yaml"), ["sampler.labels=unconditional", "guidance.scale=1.0"])
    runtime, out = create("eager", MeshConfig(), "fp32"), f"gs://{BUCKET}/samples/some"
    local = write_sample_set(recipe, runtime, str(tmp_path), seed=3, num_images=30)
    there = write_sample_set(recipe, runtime, out, seed=3, num_images=30)
    assert storage.read_bytes(f"{out}/samples.npz") == (tmp_path / "samples.npz").read_bytes()
    assert storage.list_names(out) == ["contact_sheet.png", "manifest.json", "plan.json", "recipe.yaml", "samples.npz"]
    assert there["label_mode"] == local["label_mode"] == "unconditional"
    assert (read_samples(f"{out}/samples.npz")[1] == 5).all()
    assert write_sample_set(recipe, runtime, out, seed=3, num_images=30) == there


def test_labels_are_balanced_random_or_none() -> None:
    balanced = labels_of("balanced", 0, 50_000, 1000)
    assert (np.bincount(balanced) == 50).all()
    # A score that takes 5,000 in file order sees all classes.
    assert len(set(balanced[:5000].tolist())) == 1000
    drawn = labels_of("random", 1, 50_000, 1000)
    counts = np.bincount(drawn, minlength=1000)
    # Chi-square of 999 degrees of freedom, five deviations around its mean.
    assert abs(((counts - 50.0) ** 2 / 50.0).sum() - 999) < 5 * np.sqrt(2 * 999)
    np.testing.assert_array_equal(labels_of("random", 1, 100, 1000), drawn[:100])
    assert (labels_of("random", 2, 100, 1000) != drawn[:100]).mean() > 0.9
    assert (labels_of("unconditional", 0, 10, 1000) == 1000).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guidance={method: none}", "guidance={method: autoguidance, scale: 1.4}"], "guidance.model: required"),
        (["guidance.t_max=1.5"], "guidance.*t_max: .*less than or equal to 1"),
        (["guidance.t_min=0.8", "guidance.t_max=0.2"], "guidance.*t_min 0.8 is above t_max 0.2"),
        (["guidance.model.weights=null"], "guidance.model.weights: required here"),
        (["guidance.model.width=16"], "guidance.model.weights: .*does not fit this model"),
        (["sampler.labels=unconditional", "guidance={method: classifier_free, scale: 1.4}"], "guidance.method: "),
        (["sampler.method=rk4"], "sampler.method: .*'euler', 'heun' or 'euler_maruyama'"),
        (["sampler.diffusion=0.0"], "sampler.diffusion: .*greater than 0"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(
    arguments: list[str], message: str, root: Path, tmp_path: Path
) -> None:
    code, _, errors = run_tool("sample", str(root / "recipe.yaml"), "--out", str(tmp_path / "out"), *arguments)
    assert code == 2 and re.search(message, errors), errors
    assert errors.count("\n") == 1 and not (tmp_path / "out").exists()
