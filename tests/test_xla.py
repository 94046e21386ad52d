"""The XLA runtime on one CPU device: tracing once, donation, the device loop, random numbers, equality with eager."""

from __future__ import annotations

import os
import re
import time

import numpy as np
import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from mesh_cases import batch, loss, small_model
from torch.utils._pytree import tree_leaves

from rae_xla.compiler_flags import VARIABLE, flags_of_torch_xla, our_flags
from rae_xla.errors import UserError
from rae_xla.models.functional import buffers_of
from rae_xla.random import Purpose, normal
from rae_xla.recipe import load_recipe
from rae_xla.run_blocks import ComputeConfig
from rae_xla.runtime import Runtime, create
from rae_xla.sharding import MeshConfig
from rae_xla.training.optimizer import OptimizerConfig
from rae_xla.training.tasks import train
from rae_xla.training.update import initial_state, make_update
from rae_xla.xla.mesh import Mesh
from rae_xla.xla.start import set_compiler


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return create("xla", MeshConfig(), "fp32")


def accumulate(state, frozen, batch):
    return {"sum": state["sum"] + frozen["scale"] * batch["x"].sum(dim=0)}, {"largest": batch["x"].max()}


def test_a_step_is_traced_once_and_consumes_its_state(runtime: Runtime) -> None:
    import torch_xla.debug.metrics as xla_metrics

    step = runtime.compile(accumulate, "accumulate")
    state = runtime.place_state({"sum": torch.zeros(3)})
    frozen = runtime.place_frozen({"scale": torch.tensor(2.0)})
    first = state
    for value in range(1, 6):
        batch = runtime.place_batch({"x": torch.full((4, 3), float(value))})
        state, outputs = step(state, frozen, batch)
        if value == 1:
            compiled = xla_metrics.counter_value("UncachedCompile")
    assert xla_metrics.counter_value("UncachedCompile") == compiled
    assert runtime.to_host(state)["sum"].tolist() == [2.0 * 4 * 15] * 3
    assert runtime.to_host(outputs)["largest"].item() == 5.0
    with pytest.raises(RuntimeError):
        runtime.to_host(first)


def test_another_shape_is_an_error_that_names_the_input(runtime: Runtime) -> None:
    step = runtime.compile(accumulate, "accumulate")
    state, frozen = runtime.place_state({"sum": torch.zeros(3)}), runtime.place_frozen({"scale": torch.tensor(2.0)})
    state, _ = step(state, frozen, runtime.place_batch({"x": torch.ones(4, 3)}))
    with pytest.raises(RuntimeError, match=r"accumulate: batch\['x'\] is torch.float32 \[5, 3\], traced as .*\[4, 3\]"):
        step(state, frozen, runtime.place_batch({"x": torch.ones(5, 3)}))


def test_an_input_may_come_out_as_it_is(runtime: Runtime) -> None:
    def step(state, frozen, batch):
        return state, {"twice": batch["x"] * 2, "labels": batch["labels"]}

    compiled = runtime.compile(step, "labelled")
    state = runtime.place_state({"kept": torch.ones(3)})
    for label in range(3):
        batch = runtime.place_batch({"x": torch.ones(4, 3), "labels": torch.full((4,), label)})
        state, outputs = compiled(state, {}, batch)
        assert runtime.to_host(outputs)["labels"].tolist() == [label] * 4
        assert runtime.to_host(state)["kept"].tolist() == [1.0] * 3


def test_programs_prepared_at_the_start_take_turns_on_one_state(runtime: Runtime) -> None:
    """None takes a tensor that an earlier one was traced with for a constant, or consumes it before its turn."""

    def first(state, frozen, batch):
        return {"sum": state["sum"] + frozen["scale"] * batch["x"].sum(dim=0)}, {}

    def both(state, frozen, batch):
        sums, _ = first({"sum": state["sum"]}, frozen, batch)
        return {**sums, "later": state["later"] * 2 + sums["sum"]}, {"largest": batch["x"].max()}

    def looks(state, frozen, batch):
        return state, {"product": frozen["sum"] * batch["x"][0]}

    programs = {function.__name__: runtime.compile(function, function.__name__) for function in (first, both, looks)}
    state = runtime.place_state({"sum": torch.zeros(3), "later": torch.ones(3)})
    frozen = runtime.place_frozen({"scale": torch.tensor(2.0)})

    def batch(value: float) -> dict:
        return runtime.place_batch({"x": torch.full((4, 3), value)})

    programs["first"].prepare({"sum": state["sum"]}, frozen, batch(0.0))
    programs["both"].prepare(state, frozen, batch(0.0))
    programs["looks"].prepare({}, {"sum": state["sum"]}, batch(0.0))
    assert runtime.to_host(state)["sum"].tolist() == [0.0] * 3
    expected = np.array([0.0, 1.0])
    for value in range(1, 7):
        if value <= 3:
            changed, _ = programs["first"]({"sum": state["sum"]}, frozen, batch(float(value)))
        else:
            changed, outputs = programs["both"](state, frozen, batch(float(value)))
            assert runtime.to_host(outputs)["largest"].item() == value
        state = {**state, **changed}
        expected[0] += 2 * 4 * value
        expected[1] = expected[1] if value <= 3 else 2 * expected[1] + expected[0]
        # What a checkpoint does in between.
        copy = runtime.parts_of(runtime.copied(state))
        assert [part.parts[0,].tolist() for part in copy.values()] == [[number] * 3 for number in expected]
        _, seen = programs["looks"]({}, {"sum": state["sum"]}, batch(float(value)))
        assert runtime.to_host(seen)["product"].tolist() == [value * expected[0]] * 3


def test_a_state_that_comes_out_in_another_order_is_an_error(runtime: Runtime) -> None:
    def swaps(state, frozen, batch):
        return {"b": state["b"] + 1, "a": state["a"] + batch["x"].sum()}, {}

    state = runtime.place_state({"a": torch.zeros(3), "b": torch.ones(3)})
    with pytest.raises(RuntimeError, match="swaps: the state that it returns is built otherwise"):
        runtime.compile(swaps, "swaps")(state, {}, runtime.place_batch({"x": torch.ones(4)}))


def test_the_device_loop_equals_the_python_loop(runtime: Runtime) -> None:
    eager = create("eager", MeshConfig(), "fp32")
    rows = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) / 3
    table = torch.tensor([0.1, 0.2, 0.3])[:, None].expand(3, 3).clone()

    def run(where: Runtime) -> torch.Tensor:
        def program(state, frozen, batch):
            def body(x, row, given):
                moved = (x @ given["weight"]).sin() * row[0] + 0.25 * row[1]
                return moved + given["table"][given["labels"]], ()

            given = {**frozen, "labels": batch["labels"]}
            return state, {"x": where.scan(body, batch["x"], frozen["rows"], given)[0]}

        step = where.compile(program, "loop")
        outputs = []
        # What the body reads is another tensor at every call: the carry, the batch's labels, the weights.
        for value, labels, factor in ((0.5, [0, 1], 1.0), (0.5, [2, 0], 1.0), (0.9, [2, 0], 1.0), (0.9, [2, 0], 2.0)):
            frozen = where.place_frozen({"weight": weight * factor, "rows": rows, "table": table})
            batch = {"x": torch.full((2, 3), value), "labels": torch.tensor(labels, dtype=torch.int32)}
            outputs.append(where.to_host(step({}, frozen, where.place_batch(batch))[1])["x"])
        return torch.stack(outputs)

    found, expected = run(runtime), run(eager)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (expected[0] - expected[1]).abs().max() > 0.01 and (expected[2] - expected[3]).abs().max() > 0.01


def test_scans_stack_outputs_run_backwards_and_nest(runtime: Runtime) -> None:
    eager = create("eager", MeshConfig(), "fp32")
    generator = torch.Generator().manual_seed(0)
    rows = {"a": torch.randn(3, 4, generator=generator), "b": torch.randint(9, (3,), generator=generator)}

    def run(where: Runtime, reverse: bool) -> dict[str, torch.Tensor]:
        def program(state, frozen, batch):
            def inner(total, row, given):
                return total * 0.5 + row * given, total.sum()

            def outer(carry, row, given):
                total, count = carry
                total, sums = where.scan(inner, total, given["inner"], row["a"])
                return (total, count + row["b"]), {"sums": sums, "count": count}

            given = {"inner": frozen["inner"]}
            start = (batch["x"], torch.zeros((), dtype=torch.int64, device=batch["x"].device))
            (total, count), outputs = where.scan(
                outer, start, {"a": frozen["a"], "b": frozen["b"]}, given, reverse=reverse
            )
            return state, {"total": total, "count": count, **outputs}

        frozen = where.place_frozen({**rows, "inner": torch.arange(20.0).reshape(5, 4)})
        batch = where.place_batch({"x": torch.ones(1, 4)})
        return where.to_host(where.compile(program, "nested")({}, frozen, batch)[1])

    for reverse in (False, True):
        found, expected = run(runtime, reverse), run(eager, reverse)
        assert found["sums"].shape == (3, 5) and found["count"].shape == (3,)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
    assert not torch.equal(run(eager, False)["sums"], run(eager, True)["sums"])


def test_the_host_does_not_wait_for_the_step_it_has_started(runtime: Runtime) -> None:
    """Nor do the states that it drops make it wait: a step of long products is started in a fraction of its time."""

    def multiply(state, frozen, batch):
        x = state["x"]
        for _ in range(40):
            x = x @ frozen["w"]
        return {"x": x}, {"sum": x.sum()}

    step = runtime.compile(multiply, "multiply")
    state, frozen = runtime.place_state({"x": torch.eye(1024)}), runtime.place_frozen({"w": torch.eye(1024)})
    state, outputs = step(state, frozen, {})
    runtime.to_host(outputs)
    started = time.perf_counter()
    state, outputs = step(state, frozen, {})
    host = time.perf_counter() - started
    runtime.to_host(outputs)
    assert host < 0.25 * (time.perf_counter() - started)


def test_a_loop_body_that_closes_over_a_tensor_is_refused(runtime: Runtime) -> None:
    def program(state, frozen, batch):
        def body(x, row, given):
            return x + row * batch["other"], ()

        return state, {"x": runtime.scan(body, batch["x"], batch["rows"], ())[0]}

    batch = {"x": torch.ones(2, 3), "other": torch.ones(2, 3), "rows": torch.ones(4, 3)}
    with pytest.raises(RuntimeError, match=r"reads a tensor \[2, 3\] that it was not handed"):
        runtime.compile(program, "closing")({}, {}, runtime.place_batch(batch))


def test_random_numbers_are_those_of_the_host(runtime: Runtime) -> None:
    rows = torch.arange(5, dtype=torch.int32) * 1000

    def draw(state, frozen, batch):
        return state, {"noise": normal(42, Purpose.FLOW_NOISE, batch["rows"], (4, 3))}

    _, outputs = runtime.compile(draw, "draw")({}, {}, runtime.place_batch({"rows": rows}))
    drawn = runtime.to_host(outputs)["noise"]
    torch.testing.assert_close(drawn, normal(42, Purpose.FLOW_NOISE, rows, (4, 3)), rtol=1e-5, atol=1e-5)


def test_training_equals_eager(tmp_path) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        overrides = [f"runtime={name}", f"root={tmp_path / name}", f"train.num_epochs={10 * 64 / 1437}"]
        recipe = load_recipe("recipes/quickstart/judge.yaml", [*overrides, "train.ema_decay=0.0"])
        train(recipe, create(name, MeshConfig(), "fp32"))
        return load_file(tmp_path / name / "judge" / "weights.safetensors")

    ours, reference = weights("xla"), weights("eager")
    for key, value in reference.items():
        np.testing.assert_allclose(ours[key], value, atol=2e-4, err_msg=key)


@pytest.fixture(scope="module")
def programs(runtime: Runtime) -> dict[tuple[str, str], str]:
    """The update of a small DiT^DH as HLO, before any optimisation, for each way to run its blocks."""

    def hlo(blocks: str, remat: str) -> str:
        module = small_model()
        optimizer = OptimizerConfig(num_epochs=1, learning_rate=1e-3, ema_decay=0.9)
        compute = ComputeConfig(blocks=blocks, remat=remat)
        update = make_update(module, loss, optimizer, compute, 10.0, runtime)
        frozen = runtime.place_frozen({"buffers": buffers_of(module)})
        results = update(runtime.place_state(initial_state(module, optimizer)), frozen, runtime.place_batch(batch(0)))
        text = torch_xla._XLAC._get_xla_tensors_hlo(tree_leaves(results))
        del results
        # Nothing of it is to be computed.
        torch_xla._XLAC._clear_pending_irs(str(torch_xla.device()))
        return text

    ways = [(blocks, remat) for blocks in ("list", "scan") for remat in ("none", "block", "matmuls")]
    return {way: hlo(*way) for way in ways}


def test_rematerialisation_computes_again_what_the_policy_does_not_keep(programs: dict) -> None:
    products = {way: len(re.findall(r" dot\(", text)) for way, text in programs.items()}
    # Eight products a block: qkv, two that turn queries and keys, scores, their sum of values, output, and two in the
    # MLP; and the modulation in the head, that of the backbone's two blocks being computed ahead of them.
    again = {"list": 3 * 8 + 1, "scan": 2 * 8 + 1}
    for blocks in ("list", "scan"):
        assert products[blocks, "matmuls"] == products[blocks, "none"], products
        assert products[blocks, "block"] - products[blocks, "none"] == again[blocks], products
    barriers = {way: text.count(" opt-barrier(") for way, text in programs.items()}
    assert barriers["list", "none"] == 0 and barriers["list", "block"] == barriers["list", "matmuls"] == 3


def test_a_scan_is_one_block_and_counts_in_32_bits(programs: dict) -> None:
    for remat in ("none", "block", "matmuls"):
        loops = re.findall(r"= \((\S+) .*? while\(", programs["scan", remat])
        assert [counter.rstrip(",") for counter in loops] == ["s32[]"] * 4, loops


@pytest.mark.parametrize(("version", "generation"), [(4, "v4"), (5, "v5p"), (5, "v5litepod"), (6, "v6e")])
def test_preflights_compiler_is_set_as_torch_xla_sets_it(
    version: int, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_xla._internal.tpu, "version", lambda: version)
    monkeypatch.setenv(VARIABLE, "")
    torch_xla._setup_libtpu_flags()
    assert tuple(os.environ[VARIABLE].split()) == flags_of_torch_xla(generation)


def test_a_v6es_compiler_is_set_and_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_xla._internal.tpu, "version", lambda: 6)
    given = our_flags("v6e")[0].replace("true", "false")
    monkeypatch.setenv(VARIABLE, given)
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    set_compiler()
    assert os.environ[VARIABLE] == given
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    set_compiler()
    set_compiler()
    assert os.environ[VARIABLE].split() == [*our_flags("v6e"), given]
    monkeypatch.setattr(torch_xla._internal.tpu, "version", lambda: 5)
    monkeypatch.setenv(VARIABLE, "")
    set_compiler()
    assert os.environ[VARIABLE] == ""


def test_fsdp_stays_within_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slices of 2x4 chips, which are not here: what torch_xla would say of them is given to it."""
    chips = [
        {"name": f"TPU:{8 * piece + 2 * y + x}", "coords": [x, y, 0], "slice_index": piece}
        for piece in range(2)
        for y in range(4)
        for x in range(2)
    ]
    monkeypatch.setattr(xr, "device_type", lambda: "TPU")
    monkeypatch.setattr(xr, "global_runtime_device_attributes", lambda: list(chips))
    monkeypatch.setattr(xr, "global_runtime_device_count", lambda: len(chips))
    monkeypatch.setattr(xm, "xla_device_hw", lambda _: "TPU")
    devices = np.array(Mesh(MeshConfig(fsdp=4, slices=2)).devices.device_ids).reshape(4, 4)
    slices = np.array([chip["slice_index"] for chip in chips])[devices]
    assert sorted(devices.flatten()) == list(range(16)) and slices.tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    with pytest.raises(UserError, match="this job has 2 slices, the recipe says 1; say slices: 2"):
        Mesh(MeshConfig(fsdp=4))
    # One slice of 4x4, counted y first: a group is a block of 2x2, whatever its chips' numbers are.
    by_number = [[x, y, 0] for x in range(4) for y in range(4)]
    chips[:] = [
        {"name": f"TPU:{number}", "coords": by_number[number], "slice_index": 0} for number in reversed(range(16))
    ]
    groups = np.array(Mesh(MeshConfig(fsdp=4)).devices.device_ids).reshape(4, 4)
    assert sorted(groups.flatten()) == list(range(16))
    places = np.array(by_number)[groups]
    assert (np.ptp(places, axis=1) == [1, 1, 0]).all()
