"""A user's mistake: one clear line that names the key or file and the remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from conftest import run_tool
from safetensors.torch import load_file, save_file

from rae_xla import storage
from rae_xla.config import apply_overrides
from rae_xla.eager import EagerRuntime
from rae_xla.errors import UserError
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training.tasks import train

DIFFUSION = "recipes/quickstart/diffusion.yaml"


def complaint(*overrides: str, recipe: str = DIFFUSION) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


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


class EightDevices(EagerRuntime):
    """Eager, but with as many devices as a slice of eight chips says it has."""

    num_devices = 8


def test_batch_that_does_not_divide_over_the_mesh(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/quickstart/judge.yaml", [f"root={tmp_path / 'root'}", "data.batch_size=100"])
    with pytest.raises(UserError, match=r"data.batch_size: 100 does not divide over the 8 devices; use 96 or 104"):
        train(recipe, EightDevices(MeshConfig(), "fp32"))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=0", "data.batch_size: input should be greater than 0"),
        ("data.image_size=-1", "data.image_size"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("model.width=0", "model.width"),
        ("model.num_heads=5", "model: width 96 does not divide over 5 heads"),
        ("model.head_num_heads=3", "model: width 128 does not divide over 3 heads"),
        ("autoencoder.decoder.num_heads=3", "autoencoder.decoder: width 128 does not divide over 3 heads"),
        ("autoencoder.encoder.num_heads=5", "autoencoder.encoder: .* cannot be built with these sizes"),
        ("autoencoder.encoder.patch_size=7", "input_size: 32 is not a multiple of the patch size 7"),
        ("train.clip_norm=-1.0", "train.clip_norm: input should be greater than 0"),
        ("train.learning_rate=.inf", "train.learning_rate: input should be a finite number"),
        ("flow.label_dropout=7.0", "flow.label_dropout: input should be less than or equal to 1"),
        ("flow.shift=-1.0", "flow.shift: input should be"),
        ("model.widht=3", "model.widht: unknown key; did you mean width"),
        ("guidance={method: autoguid}", "guidance.method: 'autoguid' is not known; use 'none', 'classifier_free'"),
        ("guidance={method: classifier_free, scalee: 1.0}", "guidance.scalee: unknown key; did you mean scale"),
        ("train=3", "train: should be a mapping of keys to values, got 3"),
        ("task=null", "task: missing; is this a base of other recipes"),
    ],
)
def test_values_that_cannot_be(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(DIFFUSION, [override])


def test_sizes_that_do_not_fit_each_other() -> None:
    with pytest.raises(
        UserError, match=r"autoencoder.decoder.patch_size: 16 makes images of 64 pixels, data.image_size"
    ):
        load_recipe("recipes/quickstart/decoder.yaml", ["autoencoder.decoder.patch_size=16"])
    with pytest.raises(UserError, match=r"autoencoder.latent_stats: must be null here"):
        load_recipe("recipes/quickstart/latent_stats.yaml", ["autoencoder.latent_stats=x.safetensors"])
    with pytest.raises(UserError, match=r"model.weights: must be null here"):
        load_recipe("recipes/quickstart/judge.yaml", ["model.weights=x.safetensors"])


def test_another_choice_replaces_what_was_said_of_the_old_one() -> None:
    guided = "recipes/quickstart/sample_autoguidance.yaml"
    assert load_recipe(guided, ["guidance={method: none}"]).guidance.method == "none"
    free = load_recipe(guided, ["guidance.method=classifier_free", "guidance.scale=2.0"]).guidance
    assert (free.method, free.scale) == ("classifier_free", 2.0)
    assert load_recipe(guided, ["guidance.scale=2.0"]).guidance.model.width == 64
    assert load_recipe(DIFFUSION, ["model={name: dit_s}"]).model.width == 384


def test_a_recipe_that_is_its_own_base(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    assert "is its own base, by way of" in complaint(recipe=str(tmp_path / "a.yaml"))


def test_mesh_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="mesh: data: 2, fsdp: 2 does not fit 8 devices"):
        MeshConfig(data=2, fsdp=2).shape_for(8)


def test_model_narrower_than_the_tokens_is_warned_of_and_trained(
    one_device_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_step = [f"train.num_epochs={32 / 1437}", f"run_dir={tmp_path}", "runtime=eager"]
    recipe = load_recipe(DIFFUSION, [f"root={one_device_run}", "model.head_width=64", *one_step])
    with caplog.at_level(logging.WARNING):
        report = train(recipe, create("eager", recipe.mesh, recipe.precision))
    assert report["steps"] == 1
    assert "Theorem 1" in caplog.text and "model.head_width: 64" in caplog.text and "below 0.333" in caplog.text


def test_missing_weights_leave_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "root"
    recipe = load_recipe(DIFFUSION, [f"root={root}", "runtime=eager"])
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: .*encoder/weights.safetensors cannot be read"):
        train(recipe, create("eager", recipe.mesh, recipe.precision))
    assert not root.exists()


def test_weights_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    save_file({"backbone.foreign": torch.zeros(1)}, tmp_path / "encoder" / "weights.safetensors")
    recipe = load_recipe("recipes/quickstart/decoder.yaml", [f"root={tmp_path}", "runtime=eager"])
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: .* does not fit this model: .* is missing"):
        train(recipe, create("eager", recipe.mesh, recipe.precision))
    (tmp_path / "encoder" / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="not a safetensors file, or is cut short"):
        train(recipe, create("eager", recipe.mesh, recipe.precision))


JUDGE = "recipes/quickstart/judge.yaml"


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("train", [DIFFUSION, "train.lerning_rate=1"], "train.lerning_rate: unknown key"),
        ("train", [DIFFUSION, "runtime=eager"], "autoencoder.encoder.weights: .* cannot be read"),
        ("train", [JUDGE, "runtime=eager", "mesh.fsdp=2"], "mesh: data: -1, fsdp: 2 does not fit 1 devices"),
        ("train", [JUDGE, "runtime=eager", "root=nope://x"], "nope://x/.*: cannot be reached"),
        ("train", [JUDGE, "runtime=eager", "root=README.md"], "cannot be written .*; give another path"),
        ("train", [JUDGE, "--seed=3"], "unrecognized arguments: --seed=3 .*a key of the recipe is written without --"),
        ("train", [], "required: RECIPE; see --help"),
        ("train", [JUDGE, "--json", "tests"], "--json: tests is a directory"),
        (
            "sample",
            ["recipes/quickstart/sample_unguided.yaml", "runtime=eager", "--out", "OUT"],
            "weights: .* cannot be",
        ),
        ("evaluate", ["generation", "recipes/quickstart/evaluation.yaml"], "--samples: required for generation"),
        (
            "evaluate",
            ["reconstruction", "recipes/quickstart/evaluation.yaml", "--samples", "x"],
            "--samples: not for reconstruction",
        ),
        ("benchmark", ["step-overhead", "--model", "dit_xxl"], "--model: 'dit_xxl' is not known; use dit_dh_s"),
        ("latent_stats", ["recipes/quickstart/diffusion.yaml"], "task: 'diffusion' does not fit this command"),
        ("quickstart", ["--out", "OUT", "run_dir=x"], "run_dir=x: the quickstart's steps need each their own"),
        ("quickstart", ["--out", "OUT", "--num-images", "5"], "--num-images: must be at least 20"),
    ],
)
def test_tools_exit_with_2_and_one_line(tool: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(out) if argument == "OUT" else argument for argument in arguments]
    if (
        tool not in ("quickstart", "benchmark")
        and arguments
        and not any(argument.startswith("root=") for argument in arguments)
    ):
        arguments.append(f"root={out}")
    code, _, errors = run_tool(tool, *arguments)
    assert code == 2 and re.search(message, errors), errors
    assert errors.count("\n") == 1 and errors.startswith(f"{tool}.py: ")
    assert not out.exists()


def test_a_run_directory_belongs_to_one_recipe(tmp_path: Path) -> None:
    def run(*overrides: str) -> dict:
        short = [f"root={tmp_path}", "runtime=eager", "data.batch_size=16", f"train.num_epochs={3 * 16 / 1437}"]
        recipe = load_recipe(JUDGE, [*short, *overrides])
        return train(recipe, create("eager", MeshConfig(), "fp32"))

    run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "judge").iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"was made with train.learning_rate: 0.002, the recipe now says 0.5; give"):
        run("train.learning_rate=0.5")
    with pytest.raises(UserError, match=r"step_00000003 was made with model.width: 32, the recipe now says 16; give"):
        run("model.width=16")
    assert {path.name: path.read_bytes() for path in (tmp_path / "judge").iterdir() if path.is_file()} == before
    assert run("log.every_steps=1")["steps"] == 3
    assert run(f"train.num_epochs={5 * 16 / 1437}")["resumed_from_step"] == 3


def test_a_run_directory_belongs_to_its_inputs(one_device_run: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.safetensors"
    encoder.write_bytes((one_device_run / "encoder" / "weights.safetensors").read_bytes())
    own = [f"root={tmp_path}", "runtime=eager", f"train.num_epochs={64 / 1437}"]
    recipe = load_recipe("recipes/quickstart/decoder.yaml", [*own, f"autoencoder.encoder.weights={encoder}"])
    train(recipe, create("eager", MeshConfig(), "fp32"))
    encoder.write_bytes((tmp_path / "decoder" / "weights.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit this model"):
        train(recipe, create("eager", MeshConfig(), "fp32"))
    tensors = load_file(one_device_run / "encoder" / "weights.safetensors")
    save_file({name: value * 1.01 for name, value in tensors.items()}, encoder)
    with pytest.raises(UserError, match=r"autoencoder.encoder.weights: .*encoder.safetensors is not what .* made with"):
        train(recipe, create("eager", MeshConfig(), "fp32"))


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match="directory: cannot be written"):
        storage.write_text(str(tmp_path / "directory"), "x")
    assert list(tmp_path.rglob("*")) == [tmp_path / "directory"]
    with pytest.raises(ValueError, match="Out of range float"):
        storage.write_json(str(tmp_path / "report.json"), {"distance": float("inf")})
    assert not (tmp_path / "report.json").exists()


def test_json_is_one_object(eight_device_run: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = eight_device_run
    written = tmp_path / "scores.json"
    samples = str(root / "samples" / "unguided" / "samples.npz")
    arguments = ["generation", "recipes/quickstart/evaluation.yaml", f"root={root}", "runtime=eager"]
    code, _, errors = run_tool("evaluate", *arguments, "--samples", samples, "--json", str(written))
    assert code == 0, errors
    scores = json.loads(written.read_text())
    assert scores["num_samples"] == 30 and 0 <= scores["recognised_share"] <= 1
