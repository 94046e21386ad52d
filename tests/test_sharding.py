"""Partitions from names and shapes, and what the compiled programs on eight devices make of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_python, run_tool

from rae_xla.errors import UserError
from rae_xla.models.classifier import create_classifier
from rae_xla.models.dit_dh import DiTDH, DiTDHConfig
from rae_xla.models.functional import parameters_of
from rae_xla.models.loading import on_meta
from rae_xla.recipe import load_recipe
from rae_xla.sharding import MeshConfig, Sharding, devices_in_groups, explained
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.stored_index import StoredIndex
from rae_xla.training.update import initial_state

QKV = "backbone.*.attention.qkv.weight"


@pytest.fixture(scope="module")
def largest() -> dict[str, torch.Size]:
    module = on_meta(lambda: DiTDH(DiTDHConfig(name="dit_dh_xl"), channels=768, grid=16, num_classes=1000))
    return {name: value.shape for name, value in parameters_of(module).items()}


@pytest.mark.parametrize("shape", [(1, 8), (8, 8), (2, 128), (128, 1), (4, 16)])
def test_automatic_rule_splits_nearly_all_of_the_largest_model(shape: tuple[int, int], largest: dict) -> None:
    sharding = Sharding(shape)
    held, total = 0.0, 0
    for name, size in largest.items():
        own, split = sharding.parameter(name, size), sharding.between_steps(name, size)
        assert split[0] is None or "*" not in name, "blocks are used one by one"
        for entry, length in zip(split, size, strict=True):
            assert entry is None or length % sharding.parts((entry,)) == 0
        assert sharding.parts(split) >= sharding.parts(own)
        total += size.numel()
        held += size.numel() / sharding.parts(split)
    assert held / total < 1.3 / min(128, shape[0] * shape[1]) + 0.01


@pytest.mark.parametrize(
    ("grid", "shape", "sides"),
    [
        ((8, 8), (8, 8), (4, 2)),
        ((8, 8), (32, 2), (2, 1)),
        ((16, 16), (16, 16), (4, 4)),
        ((4, 4, 4), (8, 8), (2, 2, 2)),
        ((2, 4), (1, 8), (2, 4)),
        ((2, 4), (8, 1), (1, 1)),
        ((8,), (2, 4), (4,)),
    ],
)
def test_an_fsdp_group_is_a_block_of_chips(
    grid: tuple[int, ...], shape: tuple[int, int], sides: tuple[int, ...]
) -> None:
    devices = devices_in_groups(grid, shape)
    assert sorted(devices.flatten()) == list(range(math.prod(grid)))
    # The first axis is counted fastest.
    places = np.stack(np.unravel_index(devices, grid[::-1])[::-1])
    assert (sides == np.ptp(places, axis=2).T + 1).all()
    # A host has 2x2 chips, in order.
    of_host = np.arange(math.prod(grid)).reshape(grid[::-1])[..., :2, :2] if len(grid) > 1 else np.arange(4)
    positions = np.argsort(devices.flatten())
    for hosts_chips in of_host.reshape(-1, 4):
        assert (np.diff(positions[hosts_chips]) > 0).all()
    # And so it is in what a program is told.
    told = Sharding(shape, devices=tuple(devices.flatten().tolist())).as_hlo(("fsdp",))
    assert shape[1] == 1 or ",".join(map(str, devices.T.flatten())) in told


def test_fsdp_never_makes_the_state_larger(largest: dict) -> None:
    def held(shape: tuple[int, int]) -> float:
        sharding = Sharding(shape)
        return sum(
            4 * size.numel() / sharding.parts(sharding.between_steps(name, size)) for name, size in largest.items()
        )

    for devices in (8, 64, 128):
        sizes = [held((devices // fsdp, fsdp)) for fsdp in (1, 2, 4, 8)]
        assert sizes == sorted(sizes, reverse=True), (devices, sizes)


def test_the_state_is_split_where_parameters_are_whole_in_a_step(largest: dict) -> None:
    sharding = Sharding((8, 1))
    assert not any(sharding.parameter(QKV, largest[QKV]))
    assert sharding.between_steps(QKV, largest[QKV]) == (None, ("data", "fsdp"), None)
    assert sharding.parts(sharding.between_steps(QKV, largest[QKV])) == 8
    assert sharding.of_state(("ema", QKV), largest[QKV]) == sharding.between_steps(QKV, largest[QKV])
    assert sharding.of_state(("step",), ()) == ()
    # A rule about an axis of one device leaves a parameter whole.
    rules = MeshConfig.model_validate({"rules": [[QKV, ["fsdp", None]]]}).rules
    assert Sharding((8, 1), rules).between_steps(QKV, largest[QKV]) == (None, ("data", "fsdp"), None)
    # 3456 does not divide over 256, but over 8, and 1152 over 32.
    assert Sharding((32, 8)).between_steps(QKV, largest[QKV]) == (None, "fsdp", "data")


def test_the_first_rule_that_matches_decides(largest: dict) -> None:
    rules = MeshConfig.model_validate(
        {"rules": [["backbone.*.qkv.*", [None, "fsdp"]], ["*.qkv.*", ["fsdp", None]]]}
    ).rules
    sharding = Sharding((2, 4), rules)
    assert sharding.parameter(QKV, largest[QKV]) == (None, None, "fsdp")
    head = "head.*.attention.qkv.weight"
    assert sharding.parameter(head, largest[head]) == (None, "fsdp", None)
    assert sharding.parameter("condition.weight", largest["condition.weight"]) == ("fsdp", None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (["backbone.*.kqv.*", ["fsdp", None]], "'backbone.*.kqv.*' matches no parameter; names are such as"),
        (
            ["label_embedder.table.weight", ["fsdp", None]],
            "1001 of label_embedder.table.weight .* does not divide by fsdp",
        ),
        ([QKV, ["fsdp"]], "has 1 dims, backbone.* has 2"),
    ],
)
def test_a_rule_that_does_not_fit_is_named(rule: list, message: str, largest: dict) -> None:
    sharding = Sharding((2, 4), MeshConfig.model_validate({"rules": [rule]}).rules)
    with pytest.raises(UserError, match=message):
        sharding.check_rules({name: torch.empty(size, device="meta") for name, size in largest.items()})


def test_mesh_mistakes() -> None:
    with pytest.raises(UserError, match="data: 3, fsdp: 2 does not fit 8 devices"):
        MeshConfig(data=3, fsdp=2).shape_for(8)
    with pytest.raises(UserError, match="3 do not share data: 4 evenly"):
        MeshConfig(fsdp=2, slices=3).shape_for(8)
    with pytest.raises(UserError, match=r"mesh: rules: \*: an axis splits one dimension"):
        load_recipe("recipes/quickstart/judge.yaml", ['mesh.rules=[["*", [fsdp, fsdp]]]'])
    assert MeshConfig(fsdp=4, slices=2).shape_for(16) == (4, 4)


def test_explained_sums_what_a_chip_holds() -> None:
    module = torch.nn.Linear(256, 128)
    optimizer = OptimizerConfig(num_epochs=1, learning_rate=1e-3, ema_decay=0.9)
    state, frozen = initial_state(module, optimizer), {"encoder": {"table": torch.zeros(1024, 256)}}
    text = explained(Sharding((1, 4)), state, frozen)
    numbers = 4 * (256 * 128 / 4 + 128) + 1024 * 256 / 4
    assert f"in all {4 * numbers / 2**30:.4f} GiB a chip" in text
    assert re.search(r"weight +128x256 +dim 1 over fsdp +0", text)
    assert re.search(r"encoder: table +1024x256 +dim 0 over fsdp", text)


def test_rules_are_not_about_what_is_beside_the_model() -> None:
    rules = MeshConfig.model_validate({"rules": [["*weight", ["fsdp", None]]]}).rules
    state = {"parameters": {"b.*.weight": torch.zeros(2, 256, 128)}}
    beside = {"discriminator": {"parameters": {"conv.weight": torch.zeros(64, 64, 8)}}}
    text = explained(Sharding((1, 4), rules), {**state, **beside}, {})
    assert re.search(r"b.*.weight +2x256x128 +dim 1 over fsdp +dim 1 over fsdp", text)
    assert re.search(r"discriminator: conv.weight +64x64x8 +dim 0 over fsdp", text)


def test_explain_mesh_writes_nothing(tmp_path: Path) -> None:
    code, output, _ = run_tool("train", "recipes/quickstart/judge.yaml", f"root={tmp_path}", "--explain-mesh")
    assert code == 0 and "trunk.hidden.weight" in output and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("eight_devices")
    dump = f"--xla_dump_to={directory / 'dump'} --xla_dump_hlo_as_text"
    done = run_python("tests/eight_devices.py", str(directory), CPU_NUM_DEVICES="8", PJRT_DEVICE="CPU", XLA_FLAGS=dump)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory, json.loads((directory / "found.json").read_text())


def test_a_resumed_run_on_a_mesh_is_the_uninterrupted_one(on_eight: tuple[Path, dict]) -> None:
    _, found = on_eight
    assert found["num_devices"] == 8 and found["resumed_is_whole"] and found["diffusion_resumes"]


def test_rows_of_all_devices_are_multiplied_by_each_ones_part(on_eight: tuple[Path, dict]) -> None:
    assert max(on_eight[1]["multiplied_differs"]) < 1e-4, on_eight[1]["multiplied_differs"]


def test_golden_samples_of_eight_devices_are_those_of_the_released_code(on_eight: tuple[Path, dict]) -> None:
    differences = on_eight[1]["golden"]
    assert len(differences) == 4 and max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_checkpoint_of_eight_devices_is_read_on_fewer(num_devices: int, on_eight: tuple[Path, dict]) -> None:
    directory, found = on_eight
    assert found["restores"] and found["restores_blocks"]
    step = str(directory / "mesh_of_8" / "step_00000003")
    assert len(StoredIndex(step).parts["ema/head.*.attention.qkv.weight"]) == 8
    environment = {"CPU_NUM_DEVICES": str(num_devices), "PJRT_DEVICE": "CPU"}
    done = run_python("tests/mesh_cases.py", "unused", step, **environment)
    assert done.returncode == 0, done.stderr[-4000:]


def test_each_device_gets_its_part_of_a_streamed_batch(on_eight: tuple[Path, dict]) -> None:
    assert on_eight[1]["streamed_in_parts"] and on_eight[1]["rows_in_order"]


def test_another_sharding_is_an_error_that_names_the_input(on_eight: tuple[Path, dict]) -> None:
    _, found = on_eight
    assert re.search(r"total: batch\['x'\] lies as .*replicated.*, traced as .*devices=\[8,1\]", found["complaint"])


def test_all_of_the_state_is_updated_in_place(on_eight: tuple[Path, dict]) -> None:
    """The compiled program gives every state tensor's memory to the tensor that replaces it."""
    directory, _ = on_eight
    aliased = []
    for file in (directory / "dump").glob("*cpu_after_optimizations.txt"):
        header = file.read_text().split("\n", 1)[0]
        aliases = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header)
        aliased.append(len(re.findall(r"-alias\)", aliases[1])) if aliases else 0)
    recipe = load_recipe("recipes/quickstart/judge.yaml", [])
    judge = create_classifier(recipe.model, image_size=recipe.data.image_size, num_classes=10)
    num_leaves = 4 * len(parameters_of(judge)) + 5  # the step, and what is known of skipped ones
    assert num_leaves in aliased, (num_leaves, sorted(aliased))
