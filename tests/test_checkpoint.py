"""Checkpoints: whole or not there, told when damaged, written by any number of hosts; and runs that go on from them."""

from __future__ import annotations

import json
import logging
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import run_python, run_tool
from faulty_bucket import BUCKET, FaultyProxy
from photos import Rows, write_manifest_of, write_shards
from safetensors.torch import load_file

from rae_xla import tensor_files
from rae_xla.errors import StoppedError, UserError
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training import checkpoint
from rae_xla.training.stored_index import DamagedError, StoredIndex
from rae_xla.training.tasks import train

JUDGE = "recipes/quickstart/judge.yaml"
# Saved at every step, so that a good part of the moments are within a save.
KILLED = """
task: classifier
seed: 1
runtime: {runtime}
run_dir: run
data:
  source: {source}
  image_size: 32
  batch_size: 10
  flip: true
  stream: {{shuffle_images: 8, num_workers: 0}}
model: {{name: convnet, width: 24, feature_width: 96}}
train: {{num_epochs: 4, learning_rate: 1.0e-3, schedule: linear, clip_norm: 1.0, ema_decay: 0.9}}
log: {{every_steps: 1}}
checkpoint: {{every_steps: 1}}
"""


def run(root: Path | str, steps: int, *overrides: str) -> dict:
    short = [f"root={root}", "runtime=eager", "data.batch_size=16", f"train.num_epochs={steps * 16 / 1437}"]
    recipe = load_recipe(JUDGE, [*short, "train.schedule=constant", "checkpoint.every_steps=1", *overrides])
    return train(recipe, create("eager", MeshConfig(), "fp32"))


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, of which checkpoints 3 and 4 are kept."""
    root = tmp_path_factory.mktemp("four_steps")
    run(root, 4)
    return root


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("six_steps")
    run(root, 6)
    return (root / "judge" / "weights.safetensors").read_bytes()


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("part_00000_000.safetensors", _flip_a_byte, "step_00000004/part_00000_000.safetensors is damaged"),
        ("part_00000_000.safetensors", _cut_short, "step_00000004/part_00000_000.safetensors is cut short"),
        ("part_00000_000.safetensors", Path.unlink, "step_00000004/part_00000_000.safetensors is not there"),
        ("index.json", _flip_a_byte, "step_00000004/index.json: it is not what was written"),
        ("index.json", _cut_short, "step_00000004/index.json: it is not what was written"),
        ("complete.json", Path.unlink, "step 4 was not written to its end and is removed"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    name: str, damage: object, told: str, four_steps: Path, six_steps: bytes, tmp_path: Path, caplog: object
) -> None:
    caplog.set_level(logging.INFO)
    shutil.copytree(four_steps, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "judge" / "checkpoints" / "step_00000004" / name)
    assert run(tmp_path, 6)["resumed_from_step"] == 3
    assert told in caplog.text and "resuming from step 3" in caplog.text
    assert (tmp_path / "judge" / "weights.safetensors").read_bytes() == six_steps


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(four_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(four_steps, tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        _flip_a_byte(tmp_path / "judge" / "checkpoints" / f"step_0000000{step}" / "part_00000_000.safetensors")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(UserError, match="judge/checkpoints: none of its checkpoints can be read; restore one, or"):
        run(tmp_path, 6)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """As on a disk that is full, the kernel refuses what is written beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    asynchronous: bool, four_steps: Path, six_steps: bytes, tmp_path: Path
) -> None:
    shutil.copytree(four_steps, tmp_path, dirs_exist_ok=True)
    override = f"checkpoint.asynchronous={str(asynchronous).lower()}"
    message = r"step 5 could not be saved \(.*step_00000005/.*: cannot be written \(.*\), step 4 is; the same command"
    with largest_file(50_000), pytest.raises(StoppedError, match=message):
        run(tmp_path, 6, override)
    assert checkpoint.complete_steps(str(tmp_path / "judge" / "checkpoints")) == [3, 4]
    assert not list(tmp_path.rglob("*.partial"))
    assert run(tmp_path, 6, override)["resumed_from_step"] == 4
    assert (tmp_path / "judge" / "weights.safetensors").read_bytes() == six_steps


def test_a_bucket_that_refuses_writes_ends_the_run(bucket: FaultyProxy) -> None:
    root = f"gs://{BUCKET}/project"
    bucket.refuses = "step_00000003"
    with pytest.raises(StoppedError, match=r"step 3 could not be saved \(.*\), step 2 is; the same command"):
        run(root, 4, "log.every_steps=100")
    bucket.refuses = None
    # What cannot be seen is not taken for nothing.
    bucket.forbids_listing = True
    with pytest.raises(StoppedError, match=r"project/judge/checkpoints cannot be listed \(.*\); try again when it can"):
        run(root, 4)
    bucket.forbids_listing = False
    assert run(root, 4)["resumed_from_step"] == 2


def test_what_is_kept(tmp_path: Path) -> None:
    run(tmp_path, 9, "checkpoint.keep=1", "checkpoint.keep_every_steps=4")
    assert checkpoint.complete_steps(str(tmp_path / "judge" / "checkpoints")) == [4, 8, 9]


def test_another_run_to_begin_from(four_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = four_steps / "judge"
    changes = ["train.learning_rate=0.001", "model.width=32", "log.every_steps=2", "train.clip_norm=0.5"]
    message = r"was made with train.learning_rate: 0.002, the recipe now says 0.001; train.clip_norm: 1.0, .* 0.5; give"
    with pytest.raises(UserError, match=message):
        run(tmp_path, 6, f"resume.from={source}", *changes)
    assert not list(tmp_path.iterdir())
    allowed = "resume.allow=[train.learning_rate, train.clip_norm]"
    assert run(tmp_path, 6, f"resume.from={source}", allowed, *changes)["resumed_from_step"] == 4
    assert "train.learning_rate: was 0.002, is 0.001 from now on" in caplog.text
    elsewhere = [f"resume.from={source}", "run_dir=elsewhere"]
    assert run(tmp_path / "fourth", 4, *elsewhere)["steps"] == 4
    weights = (tmp_path / "fourth" / "elsewhere" / "weights.safetensors").read_bytes()
    assert weights == (source / "weights.safetensors").read_bytes()
    # Its own checkpoints come first from then on; one step can be named too.
    assert run(tmp_path, 7, f"resume.from={source}", *changes)["resumed_from_step"] == 6
    step = source / "checkpoints" / "step_00000003"
    assert run(tmp_path / "other", 4, f"resume.from={step}")["resumed_from_step"] == 3
    with pytest.raises(UserError, match=r"resume.from: .*nowhere has no complete checkpoint; give a run directory"):
        run(tmp_path / "third", 4, f"resume.from={tmp_path}/nowhere")


def test_weights_are_exported_from_any_checkpoint(four_steps: Path, tmp_path: Path) -> None:
    code, output, errors = run_tool("export", str(four_steps / "judge"), "--out", str(tmp_path / "w.safetensors"))
    assert code == 0 and "averaged weights of step 4" in output, errors
    assert (tmp_path / "w.safetensors").read_bytes() == (four_steps / "judge" / "weights.safetensors").read_bytes()
    raw = str(tmp_path / "raw.safetensors")
    code, _, errors = run_tool("export", str(four_steps / "judge"), "--out", raw, "--raw", "--step", "3")
    assert code == 0, errors
    about = tensor_files.read_about(raw)
    assert about["kind"] == "raw" and about["step"] == 3 and about["recipe"]["model"]["name"] == "convnet"
    found = load_file(raw)
    stored = StoredIndex(str(four_steps / "judge" / "checkpoints" / "step_00000003"))
    assert torch.equal(found["trunk.hidden.weight"], stored.whole("parameters/trunk.hidden.weight"))
    vectors = torch.cat([value for value in found.values() if value.ndim == 1])
    assert torch.equal(vectors.sort().values, stored.whole("parameters/vectors").sort().values)
    judge = str(four_steps / "judge")
    for arguments, message in (
        ([str(tmp_path), "--out", raw], "has no complete checkpoint"),
        ([judge, "--out", raw, "--ema-decay", "0.5"], "--ema-decay: 0.5 was not kept by .*, which has 0.98"),
        ([str(four_steps / "judge"), "--out", raw, "--step", "2"], "--step: 2 is not there; .* has 3, 4"),
    ):
        code, _, errors = run_tool("export", *arguments)
        assert code == 2 and errors.count("\n") == 1, errors
        assert re.search(message, errors), errors


def test_a_finished_run_has_its_weights_and_says_its_step(four_steps: Path, tmp_path: Path, caplog: object) -> None:
    caplog.set_level(logging.INFO)
    shutil.copytree(four_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "judge" / "weights.safetensors").unlink()
    run(tmp_path, 2)
    assert "already trained to step 4" in caplog.text and "averaged weights of step 4" in caplog.text
    weights = [(root / "judge" / "weights.safetensors").read_bytes() for root in (four_steps, tmp_path)]
    assert weights[0] == weights[1]
    with pytest.raises(
        UserError, match=r"resume.allow: no key train.learningrate here; did you mean train.learning_rate\?"
    ):
        run(tmp_path, 6, "resume.allow=[train.learningrate]")


def test_several_averages_are_kept_and_exported(tmp_path: Path) -> None:
    run(tmp_path, 2, "train.ema_decay=0.9", "train.more_ema_decays=[0.5, 0.0]", "checkpoint.every_steps=1")
    found = {}
    for name, options in {
        "first": ["--raw", "--step", "1"],
        "second": ["--raw"],
        "half": ["--ema-decay", "0.5"],
        "nothing": ["--ema-decay", "0"],
        "first_average": ["--ema-decay", "0.5", "--step", "1"],
        "default": ["--ema-decay", "0.9"],
    }.items():
        file = str(tmp_path / f"{name}.safetensors")
        code, _, errors = run_tool("export", str(tmp_path / "judge"), "--out", file, *options)
        assert code == 0, errors
        found[name] = load_file(file)
    weight = {name: tensors["trunk.hidden.weight"] for name, tensors in found.items()}
    torch.testing.assert_close(weight["nothing"], weight["second"])
    assert (weight["first"] - weight["second"]).abs().max() > 1e-5
    torch.testing.assert_close(weight["half"], 0.5 * weight["first_average"] + 0.5 * weight["second"])
    weights = load_file(tmp_path / "judge" / "weights.safetensors")
    assert torch.equal(weights["trunk.hidden.weight"], weight["default"])


def test_several_processes_write_and_read_their_parts(tmp_path: Path) -> None:
    done = run_python("tests/three_processes.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    stored = StoredIndex(str(tmp_path / "step"))
    assert {part.file for part in stored.parts["w"]} == {f"part_{n:05d}_000.safetensors" for n in range(3)}
    assert torch.equal(stored.whole("w"), torch.arange(24.0).reshape(6, 4))
    assert json.loads((tmp_path / "complaints.json").read_text()) == ["No space left on device"] * 3
    with pytest.raises(DamagedError, match=r"failed/index.json: .*No such file"):
        StoredIndex(str(tmp_path / "failed"))


def _killed(root: str, recipe: Path, runtime: str, kills: int, rows: Rows, tmp_path: Path) -> dict:
    write_shards(tmp_path / "shards", "parquet", rows, num_shards=4, images_per_block=5)
    recipe.write_text(KILLED.format(runtime=runtime, source=write_manifest_of(tmp_path / "shards")))
    done = run_python("tests/killed_runs.py", str(recipe), root, str(kills), PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path, rows: Rows) -> None:
    found = _killed(str(tmp_path / "runs"), tmp_path / "recipe.yaml", "eager", 4, rows, tmp_path)
    assert found["equal"] and found["resumed"]


@pytest.mark.nightly
@pytest.mark.parametrize(("where", "runtime"), [("disk", "eager"), ("disk", "xla"), ("bucket", "eager")])
def test_fifty_killed_runs(where: str, runtime: str, tmp_path: Path, rows: Rows, request: object) -> None:
    root = str(tmp_path / "runs")
    if where == "bucket":
        request.getfixturevalue("bucket")
        root = f"gs://{BUCKET}/killed"
    found = _killed(root, tmp_path / "recipe.yaml", runtime, 50, rows, tmp_path)
    # A run that is killed before its first checkpoint begins anew.
    assert found["equal"] and found["resumed"] >= 5 and found["half_written"]
