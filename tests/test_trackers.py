"""What trackers are shown is what metrics.jsonl says, each step once, and none of them ends a training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python, run_tool
from faulty_bucket import BUCKET, FaultyProxy

from rae_xla import storage
from rae_xla.errors import UserError
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training import trackers
from rae_xla.training.metrics import read_metrics
from rae_xla.training.tasks import train
from rae_xla.training.trackers import Trackers

JUDGE = "recipes/quickstart/judge.yaml"
SHORT = ["runtime=eager", "data.batch_size=16", "log.every_steps=1", "train.schedule=constant"]


def run(root: Path | str, steps: int, *overrides: str) -> dict:
    recipe = load_recipe(JUDGE, [f"root={root}", f"train.num_epochs={steps * 16 / 1437}", *SHORT, *overrides])
    return train(recipe, create("eager", MeshConfig(), "fp32"))


def events(folder: Path) -> object:
    """Everything there, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def assert_shows(folder: Path, metrics_path: str, steps: int) -> None:
    """Each value of each line, and nothing else."""
    lines, shown = read_metrics(metrics_path), events(folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert set(shown.Tags()["scalars"]) == set(lines[0]) - {"step"}
    for name in shown.Tags()["scalars"]:
        expected = [(line["step"], np.float32(line[name])) for line in lines]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == expected, name


def test_tensorboard_shows_what_the_lines_say(tmp_path: Path) -> None:
    run(tmp_path, 4)
    folder = tmp_path / "judge" / "tensorboard"
    assert_shows(folder, str(tmp_path / "judge" / "metrics.jsonl"), 4)
    assert len(list(folder.iterdir())) == 1


def test_an_interrupted_run_shows_each_step_once(tmp_path: Path) -> None:
    # Steps 5 and 6 are shown, and lost: the only checkpoint is of step 4.
    run(tmp_path, 6, "checkpoint.every_steps=4")
    judge = tmp_path / "judge"
    storage.remove(str(judge / "checkpoints" / "step_00000006"))
    assert run(tmp_path, 8, "checkpoint.every_steps=4")["resumed_from_step"] == 4
    assert_shows(judge / "tensorboard", str(judge / "metrics.jsonl"), 8)
    hyperparameters = [name for name in events(judge / "tensorboard").summary_metadata if "hparams" in name]
    assert len(hyperparameters) == len(set(hyperparameters)) == 3
    # Begun anew, nothing of before is left to be seen.
    storage.remove(str(judge / "checkpoints"))
    run(tmp_path, 2)
    assert_shows(judge / "tensorboard", str(judge / "metrics.jsonl"), 2)


def fetched(root: str, to: Path) -> Path:
    """A bucket's event files."""
    for name in storage.list_names(storage.join(root, "judge", "tensorboard")):
        storage.write_bytes(str(to / name), storage.read_bytes(storage.join(root, "judge", "tensorboard", name)))
    return to


def test_a_run_in_a_bucket(bucket: FaultyProxy, tmp_path: Path) -> None:
    root = f"gs://{BUCKET}/shown"
    run(root, 3, "checkpoint.every_steps=3")
    run(root, 5, "checkpoint.every_steps=3")
    assert_shows(fetched(root, tmp_path / "five"), f"{root}/judge/metrics.jsonl", 5)


def test_a_bucket_gets_large_files_once(bucket: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_LARGEST_OBJECT_BYTES", 2000)
    root = f"gs://{BUCKET}/large"
    shown = Trackers(("tensorboard",), f"{root}/judge", {"seed": 1}, 0)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for step in range(1, 4):
        shown.log(step, {"loss": 1.0 / step})
        shown.log_images(step, {"samples": noise})
        shown.write()
    shown.close()
    found = events(fetched(root, tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    assert (
        [event.step for event in found.Scalars("loss")]
        == [event.step for event in found.Images("samples")]
        == [1, 2, 3]
    )


def test_a_bucket_that_refuses_is_told_once(bucket: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    bucket.refuses = "tfevents"
    run(f"gs://{BUCKET}/refused", 3, "checkpoint.every_steps=1")
    assert caplog.text.count("tensorboard does not get all that it should") == 1


def test_images_and_hyperparameters(tmp_path: Path) -> None:
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)
    shown = Trackers(("tensorboard",), str(tmp_path), {"data": {"source": "digits", "size": 8}, "steps": [1, 2]}, 0)
    shown.log_images(7, {"reconstructions": images, "sheet": images[0]})
    shown.log(7, {"psnr": 26.5})
    shown.close()
    found = events(tmp_path / "tensorboard")
    [sheet] = found.Images("sheet")
    assert sheet.step == 7 and (sheet.height, sheet.width) == (8, 6)
    (tmp_path / "sheet.png").write_bytes(sheet.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), images[0])
    # Several are laid side by side.
    [several] = found.Images("reconstructions")
    assert (several.height, several.width) == (8, 12)
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {key: value.string_value or value.number_value for key, value in values.items()} == {
        "data.source": "digits",
        "data.size": 8,
        "steps": "[1, 2]",
    }


def test_a_tracker_that_fails_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of order\nfor long")

    with monkeypatch.context() as patched:
        for name in ("log", "write", "close"):
            patched.setattr(trackers._TensorBoard, name, fail)
        run(tmp_path / "late", 3)
    assert caplog.text.count("tensorboard does not get all that it should (out of order); training goes on") == 1
    (tmp_path / "early" / "judge").mkdir(parents=True)
    (tmp_path / "early" / "judge" / "tensorboard").write_text("in the way")
    caplog.clear()
    run(tmp_path / "early", 3)
    assert caplog.text.count("tensorboard does not get all that it should") == 1
    for root in ("late", "early"):
        assert len(read_metrics(str(tmp_path / root / "judge" / "metrics.jsonl"))) == 3


def test_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    run(tmp_path, 1, "log.trackers=[]")
    assert not (tmp_path / "judge" / "tensorboard").exists() and not (tmp_path / "judge" / "wandb.json").exists()


def test_which_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorboard", "wandb"}
    monkeypatch.setattr(trackers, "_is_installed", installed.__contains__)
    assert trackers.chosen_trackers(("tensorboard",)) == ("tensorboard",)
    with pytest.raises(
        UserError, match=r"log\.trackers: wandb has no key; set WANDB_API_KEY, or WANDB_MODE=offline, or"
    ):
        trackers.chosen_trackers(("wandb",))
    with monkeypatch.context() as patched:
        patched.setenv("WANDB_MODE", "offline")
        assert trackers.chosen_trackers(("wandb",)) == ("wandb",)
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    assert trackers.chosen_trackers(("tensorboard",)) == ("tensorboard", "wandb")
    assert trackers.chosen_trackers(("wandb",)) == ("wandb",)
    assert trackers.chosen_trackers(()) == ()
    installed.remove("wandb")
    assert trackers.chosen_trackers(("tensorboard",)) == ("tensorboard",)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tensorbord", "log.trackers.0: input should be 'tensorboard' or 'wandb', got 'tensorbord'"),
        (
            "wandb",
            "log.trackers: wandb is not installed; pip install wandb, or leave it out (log.trackers=[] for none)",
        ),
    ],
)
def test_a_tracker_that_is_not_there(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package == "tensorboard")
    code, _, errors = run_tool("train", JUDGE, f"root={tmp_path}", *SHORT, f"log.trackers=[{name}]")
    assert code == 2 and told in errors and not list(tmp_path.iterdir())


IN_A_NEW_PROCESS = """
import os, sys
from rae_xla.training import trackers
assert "accelerate" not in sys.modules
shown = trackers.Trackers(trackers.chosen_trackers(("tensorboard",)), sys.argv[1], {"seed": 1}, 0)
shown.log(1, {"loss": 1.0})
shown.close()
from accelerate.state import PartialState
import torch
assert PartialState._shared_state == {} and not torch.distributed.is_initialized()
assert "USE_TORCH_XLA" not in os.environ and "PJRT_DEVICE" not in os.environ
for name in ("wandb", "torch_xla", "tensorflow"):
    assert name not in sys.modules, name
"""


def test_nothing_else_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PJRT_DEVICE")
    # As a launcher of several processes would set them.
    done = run_python("-c", IN_A_NEW_PROCESS, str(tmp_path), WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: object) -> None:
    pytest.importorskip("wandb")
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Of its form, and nobody's.
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    run(tmp_path, 2)
    judge = tmp_path / "judge"
    identity = json.loads((judge / "wandb.json").read_text())["id"]
    run(tmp_path, 4)
    assert json.loads((judge / "wandb.json").read_text())["id"] == identity
    shown = Trackers(("wandb",), str(judge), {"seed": 1}, 4)
    shown.log_images(4, {"sheet": np.zeros((8, 8, 3), np.uint8)})
    shown.log(4, {"psnr": 26.5})
    shown.close()
    folders = [folder for folder in (judge / "wandb").iterdir() if folder.name.endswith(identity)]
    assert all(list(folder.glob("*.wandb")) for folder in folders) and folders
    assert "does not get all that it should" not in caplog.text
    assert_shows(judge / "tensorboard", str(judge / "metrics.jsonl"), 4)
    for file in judge.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file
