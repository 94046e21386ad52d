"""Runs that are told to end, that hang, and whose numbers are not finite."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python, run_tool
from torch import Tensor, nn

from rae_xla.data.sources import DataConfig, open_in_memory
from rae_xla.data.transforms import to_unit
from rae_xla.errors import PreemptedError, StoppedError
from rae_xla.models.functional import buffers_of, parameters_of
from rae_xla.recipe import load_recipe
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig
from rae_xla.training import recovery
from rae_xla.training.checkpoint import complete_steps
from rae_xla.training.diagnosis import first_not_finite, make_diagnosis
from rae_xla.training.loop import TrainingTask, run_training
from rae_xla.training.metrics import read_metrics
from rae_xla.training.phases import plain_phase
from rae_xla.training.tasks import train
from rae_xla.training.update import initial_state

JUDGE = "recipes/quickstart/judge.yaml"
NUM_STEPS = 40
SHORT = ["data.batch_size=16", "train.schedule=constant", "log.every_steps=1"]


def steps_logged(run_dir: Path) -> int:
    return len(read_metrics(str(run_dir / "metrics.jsonl")))


def test_a_run_that_is_told_to_end_saves_and_goes_on_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The metrics' file is written with each checkpoint, so it tells how far the run is."""
    caplog.set_level(logging.INFO)
    arguments = [JUDGE, f"root={tmp_path}", *SHORT, f"train.num_epochs={400 * 16 / 1437}", "checkpoint.every_steps=20"]
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *arguments]
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    while not steps_logged(tmp_path / "judge") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, errors = process.communicate()
    print(f"ended {time.monotonic() - told:.2f} s after the signal")
    assert process.returncode == 75, errors
    ended = re.search(r"SIGTERM: saved at step (\d+), the same command goes on from there$", errors.strip())
    assert ended, errors
    step = int(ended[1])
    assert step < 400 and complete_steps(str(tmp_path / "judge" / "checkpoints"))[-1] == step
    assert steps_logged(tmp_path / "judge") == step, "nothing was done after it"
    assert run_tool("train", *arguments)[0] == 0 and f"resuming from step {step}" in caplog.text
    assert run_tool("train", *arguments, "run_dir=whole")[0] == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("judge", "whole")]
    assert weights[0] == weights[1]


def test_notice_of_maintenance_is_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = threading.Event()

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            entry = self.path.removeprefix("/computeMetadata/v1/instance/")
            answers = {"maintenance-event": "TERMINATE" if asked.is_set() else "NONE", "preempted": "FALSE"}
            self.send_response(200)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write(answers[entry].encode())
            if entry == "preempted":
                asked.set()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(recovery, "ASK_EVERY_SECONDS", 0.05)
    recipe = load_recipe(JUDGE, ["runtime=eager", f"root={tmp_path}", *SHORT, "train.num_epochs=100"])
    runtime = create("eager", MeshConfig(), "fp32")
    with pytest.raises(PreemptedError, match=r"^maintenance-event TERMINATE: saved at step \d+, the same command"):
        train(recipe, runtime)
    server.shutdown()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    program = tmp_path / "hangs.py"
    program.write_text(
        "import threading\n"
        "from rae_xla.training.recovery import Watchdog\n"
        "def waits_for_ever():\n    threading.Event().wait()\n"
        "threading.Thread(target=waits_for_ever, daemon=True).start()\n"
        "with Watchdog(0.5 / 60) as watchdog:\n"
        "    for _ in range(3):\n        watchdog.step()\n"
        "    waits_for_ever()\n"
    )
    done = run_python(str(program))
    assert done.returncode == 1 and done.stderr.count("in waits_for_ever") == 2 and "Timeout" in done.stderr
    ended = run_python("-c", "from rae_xla.training.recovery import Watchdog\nwith Watchdog(1): pass")
    assert ended.returncode == 0, ended.stderr


Broken = Callable[[Tensor], Tensor]


def task_with(broken: Broken, root: Path, where: str, *overrides: str) -> tuple[TrainingTask, object, object]:
    """Two linear layers on the digits, whose inputs are not finite for the batches whose positions are ``broken``."""
    recipe = load_recipe(JUDGE, [f"runtime={where}", f"root={root}", *SHORT, *overrides])
    runtime = create(where, MeshConfig(), "fp32")
    images = open_in_memory(DataConfig(source="digits", image_size=32, batch_size=16), "train")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.Linear(8, 10))

    def loss(model: Callable[..., Tensor], _: object, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = to_unit(batch["images"])
        inputs = torch.where(broken(batch["positions"]).reshape(-1, 1, 1, 1), inputs / 0, inputs)
        return nn.functional.cross_entropy(model(inputs), batch["labels"].long()), {}

    task = TrainingTask(
        name="small",
        images=images,
        num_steps=NUM_STEPS,
        module=module,
        state=initial_state(module, recipe.train),
        frozen={"buffers": buffers_of(module)},
        phases=(plain_phase(module, loss, recipe, 100.0, runtime),),
        export=dict,
    )
    return task, recipe, runtime


@pytest.mark.parametrize("where", ["eager", "xla"])
def test_bad_numbers_take_a_run_back_and_past_them(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps 14 to 23 are bad. Every fourth is looked at, two steps later; step 15 is due for a checkpoint, and bad."""
    caplog.set_level(logging.INFO)

    def broken(positions: Tensor) -> Tensor:
        return (positions >= 13 * 16) & (positions < 23 * 16)

    limits = ["recovery.max_bad_steps=4", "checkpoint.every_steps=5"]
    report = run_training(*task_with(broken, tmp_path, where, *limits))
    assert report["rollbacks"] == 1 and report["steps"] == NUM_STEPS
    assert "updates from step 14 on were not finite; from step 22 back to step 10, and on with" in caplog.text
    lines = {line["step"]: line for line in read_metrics(str(tmp_path / "judge" / "metrics.jsonl"))}
    assert sorted(lines) == list(range(1, NUM_STEPS + 1))
    # What would have been step 23 is step 11 now.
    assert [lines[step]["skipped_in_row"] for step in (10, 11, 12)] == [0, 1, 0]


@pytest.mark.parametrize("where", ["eager", "xla"])
def test_bad_numbers_that_stay_end_the_run_with_the_first_tensor(where: str, tmp_path: Path) -> None:
    limits = ["recovery.max_bad_steps=3", "recovery.max_rollbacks=2", "checkpoint.every_steps=5"]
    told = "the first tensor that is not: input 0 of the model; saved at step 10$"
    message = rf"^3 updates or more in a row were not finite by step 17, after 2 rollbacks; {told}"
    with pytest.raises(StoppedError, match=message):
        run_training(*task_with(lambda positions: positions >= 12 * 16, tmp_path, where, *limits))
    assert complete_steps(str(tmp_path / "judge" / "checkpoints")) == [5, 10]
    message = r"after 0 rollbacks; the first tensor that is not: input 0 of the model; nothing was saved yet"
    with pytest.raises(StoppedError, match=message):
        run_training(*task_with(lambda positions: positions >= 0, tmp_path / "other", where, *limits))


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    runtime = create("eager", MeshConfig(), "fp32")
    recipe = load_recipe(JUDGE, [])

    class Root(torch.autograd.Function):
        """A value that is finite and whose gradient is not."""

        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value * 1

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient / 0

    def first(change: Callable[[dict], None], break_gradient: bool = False) -> str | None:
        def loss(model: Callable[..., Tensor], _: object, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
            value = model(batch["x"]).square().mean()
            return Root.apply(value) if break_gradient else value, {}

        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
        parameters = parameters_of(module)
        change(parameters)
        diagnosis = make_diagnosis(module, loss, recipe.compute, runtime)
        return first_not_finite(
            diagnosis({}, {"buffers": {}, "parameters": parameters}, {"x": torch.full((2, 4), 1e3)})[1]
        )

    def huge(parameters: dict) -> None:
        parameters["1.weight"].fill_(1e38)

    assert first(lambda _: None) is None
    assert first(lambda parameters: next(iter(parameters.values())).fill_(torch.nan)).startswith("parameter ")
    assert first(huge).startswith("output of 1")
    assert first(lambda _: None, break_gradient=True) == "gradient of 2.bias"
