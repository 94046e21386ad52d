"""A user's mistake: one clear line that names the key or file and the remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python

from rae_xla.config import apply_overrides
from rae_xla.errors import UserError
from rae_xla.recipe import load_recipe
from rae_xla.runtime import MeshConfig, check_batch_size, create
from rae_xla.training.diffusion import warn_if_narrow
from rae_xla.training.tasks import train

DIFFUSION = "recipes/quickstart/diffusion.yaml"


def complaint(*overrides: str, recipe: str = DIFFUSION) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def tool(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(f"tools/{name}.py", *arguments, **environment)


def test_unknown_key_is_named_with_the_nearest_known_one() -> None:
    message = complaint("train.lerning_rate=1.0")
    assert "train.lerning_rate: unknown key" in message and "learning_rate" in message and DIFFUSION in message


def test_wrong_type_names_key_and_value() -> None:
    assert "data.batch_size" in complaint("data.batch_size=many") and "many" in complaint("data.batch_size=many")


def test_number_that_yaml_reads_as_text() -> None:
    assert "write 2.0e-04 with a dot" in complaint("train.learning_rate=2e-4")


def test_missing_required_key(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: classifier\nrun_dir: x\n")
    assert "seed: required key is missing" in complaint(recipe=str(recipe))


def test_unknown_task_and_missing_file_and_no_mapping(tmp_path: Path) -> None:
    assert "task: 'cook'" in complaint("task=cook")
    assert "cannot be read" in complaint(recipe="recipes/nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    assert "not valid YAML" in complaint(recipe=str(broken))
    broken.write_text("- 1")
    assert "mapping" in complaint(recipe=str(broken))


def test_override_without_value() -> None:
    with pytest.raises(UserError, match=r"key\.sub=value"):
        apply_overrides({}, ["seed"])


def test_guidance_interval_is_checked() -> None:
    message = complaint("guidance={method: classifier_free, scale: 2.0, t_min: 0.8, t_max: 0.2}")
    assert "t_min 0.8 is above t_max 0.2" in message


def test_batch_that_does_not_divide_over_the_mesh() -> None:
    class Eight:
        num_devices = 8

    with pytest.raises(UserError, match=r"data.batch_size: 100 does not divide over the 8 devices; use 96 or 104"):
        check_batch_size(100, Eight(), "data.batch_size")  # type: ignore[arg-type]


def test_mesh_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="mesh: data: 2, fsdp: 2 does not fit 8 devices"):
        MeshConfig(data=2, fsdp=2).shape_for(8)


def test_model_narrower_than_the_tokens_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(DIFFUSION, ["model.head_width=64"])
    with caplog.at_level(logging.WARNING):
        warn_if_narrow(recipe.model, 96, "model")
    assert "Theorem 1" in caplog.text and "model.head_width: 64" in caplog.text


def test_missing_weights_leave_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "root"
    recipe = load_recipe(DIFFUSION, [f"root={root}", "runtime=eager"])
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: .*encoder/weights.safetensors cannot be read"):
        train(recipe, create("eager", recipe.mesh, recipe.precision))
    assert not root.exists()


def test_weights_of_another_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    (tmp_path / "encoder").mkdir()
    save_file({"backbone.foreign": zeros(1)}, tmp_path / "encoder" / "weights.safetensors")
    recipe = load_recipe("recipes/quickstart/decoder.yaml", [f"root={tmp_path}", "runtime=eager"])
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: .* does not fit this model: .* is missing"):
        train(recipe, create("eager", recipe.mesh, recipe.precision))
    (tmp_path / "encoder" / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="not a safetensors file, or is cut short"):
        train(recipe, create("eager", recipe.mesh, recipe.precision))


def test_samples_that_are_none(tmp_path: Path) -> None:
    from rae_xla.evaluation.files import read_samples

    with pytest.raises(UserError, match=r"tools/sample.py"):
        read_samples(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
    with pytest.raises(UserError, match="arr_0"):
        read_samples(str(tmp_path / "other.npz"))


def test_tools_exit_with_2_and_one_line(tmp_path: Path) -> None:
    done = tool("train", DIFFUSION, f"root={tmp_path / 'root'}", "train.lerning_rate=1")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and "train.lerning_rate" in done.stderr
    assert not (tmp_path / "root").exists()


def test_json_is_one_object(eight_device_run: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = eight_device_run
    written = tmp_path / "scores.json"
    samples = str(root / "samples" / "unguided" / "samples.npz")
    arguments = ["generation", "recipes/quickstart/evaluation.yaml", f"root={root}", "runtime=eager"]
    done = tool("evaluate", *arguments, "--samples", samples, "--json", str(written))
    assert done.returncode == 0, done.stderr
    scores = json.loads(written.read_text())
    assert scores["num_samples"] == 30 and 0 <= scores["recognised_share"] <= 1
