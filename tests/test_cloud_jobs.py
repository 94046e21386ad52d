"""Jobs from their making to their end: processes for machines and supervisors, and a bucket on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from cloud_machines import FAST, JUDGE, PROJECT, Cloud, submit, when
from conftest import ROOT, run_tool

from rae_xla import storage
from rae_xla.cloud.job import JobFiles
from rae_xla.cloud.worker import MARK


@pytest.mark.parametrize("deaths", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_job_lives_through_preemption_crash_and_its_supervisors_deaths(cloud: Cloud, deaths: int) -> None:
    cloud.set(hosts_per_slice=2, fates=["preempted:12", "ok"], unavailable_every=9, offered=["v4-16"])
    # Long enough that the last supervisor still has something to see.
    steps = 20 * deaths
    code, output, errors = submit("--spot", *FAST, f"--env=STAND_IN_STEPS={steps}", accelerator="v4-16")
    assert code == 0, errors
    assert "nobody watches it yet" in output
    drawn = random.Random(deaths)
    watching = [sys.executable, "tools/tpu.py", "run", "--name=life", f"--root={PROJECT}"]
    died = 0
    while True:
        supervisor = subprocess.Popen(watching, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            code = supervisor.wait(drawn.uniform(2.5, 5) if died < deaths else 400)
            break
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.communicate()
            died += 1
            assert died <= deaths
    said = supervisor.communicate()[1]
    assert code == 0, said
    assert died == deaths
    files = JobFiles(PROJECT, "life")
    state = files.state()
    assert (state.outcome, state.generation, state.preemptions) == ("succeeded", 2, 1)
    # Both machines see the third quarter at about the same time, and one of them crashes first.
    assert 1 <= state.crashes <= 2
    assert cloud.content["slices"] == {} and cloud.content["machines"] == {}
    assert cloud.content["made"] == 2 and cloud.content["most_at_once"] == 1
    # The second slice's machines went on from a checkpoint, and nothing of them is left.
    code, log, errors = run_tool("tpu", "logs", "--name=life", f"--root={PROJECT}")
    assert code == 0, errors
    begins = int(log.splitlines()[0].removeprefix("begins at step "))
    assert begins > 0 and log.endswith(f"step {steps}\ndone\n")
    assert not [p for p in psutil.process_iter(["environ"]) if _is_of_machines(p, cloud.machines)]
    assert run_tool("tpu", "clean", "--name=life", f"--root={PROJECT}")[0] == 0
    assert storage.list_names(f"{PROJECT}/jobs") == []
    assert storage.list_names(f"{PROJECT}/judge/checkpoints")[-1] == f"step_{steps:08d}"


def test_ctrl_c_lets_a_job_save_itself_and_run_begins_it_again(cloud: Cloud) -> None:
    given = ["tools/tpu.py", "run", JUDGE, f"root={PROJECT}", "--name=life", "--accelerator=v6e-8", "--zone=us-east5-b"]
    command = [sys.executable, *given, *FAST, "--env=STAND_IN_STEPS=400"]
    # It does not crash this time.
    storage.write_text(f"{PROJECT}/judge/crashed", "before")
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    checkpoints = f"{PROJECT}/judge/checkpoints"
    when(lambda: storage.list_names(checkpoints))
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == os.EX_TEMPFAIL, said
    assert "stopped: asked to stop" in said
    files = JobFiles(PROJECT, "life")
    ended = storage.read_json(files.attempt("life-g1-w0", 1, "exit.json"))
    assert ended["code"] == os.EX_TEMPFAIL
    # It saved itself at the step that it had come to. The rest would take a minute and a half.
    assert int(storage.list_names(checkpoints)[-1].removeprefix("step_")) < 398
    storage.write_text(f"{checkpoints}/step_00000398", "as if it had gone on")
    assert cloud.content["slices"] == {} and cloud.content["machines"] == {}
    code, _, errors = run_tool("tpu", "run", "--name=life", f"--root={PROJECT}", "--again")
    assert code == 0, errors
    log = storage.read_bytes(files.attempt("life-g2-w0", 2, "log-000000000000.txt")).decode()
    assert log.splitlines()[0] == "begins at step 398"
    assert cloud.content["slices"] == {} and cloud.content["made"] == 2


def test_a_slice_that_nobody_watches_gives_itself_back(cloud: Cloud) -> None:
    assert submit(*FAST, "--env=STAND_IN_STEPS=4", "--unwatched-minutes=0.05")[0] == 0
    # It does not crash this time.
    storage.write_text(f"{PROJECT}/judge/crashed", "before")
    gcloud = [str(cloud.file.parent / "bin" / "gcloud"), "compute", "tpus", "queued-resources", "list"]

    def is_gone() -> bool:
        # Cloud's clock; nobody of ours looks.
        subprocess.run(gcloud, check=True, capture_output=True)
        return cloud.content["made"] == 1 and not cloud.content["slices"]

    when(is_gone)
    assert JobFiles(PROJECT, "life").state().outcome is None
    code, _, errors = run_tool("tpu", "run", "--name=life", f"--root={PROJECT}")
    assert code == 0, errors
    assert JobFiles(PROJECT, "life").state().outcome == "succeeded"
    assert cloud.content["made"] == 1


def _is_of_machines(process: psutil.Process, machines: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(MARK, "").startswith(str(machines))
    return False


class Metadata:
    """What a machine can ask about itself."""

    def __init__(self, attributes: dict[str, str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.removeprefix("/computeMetadata/v1/instance/")
                found = attributes.get(path)
                self.send_response(404 if found is None else 200)
                self.end_headers()
                self.wfile.write((found or "").encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("localhost", 0), Handler)
        self.host = f"localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_the_start_script_trains_for_real(cloud: Cloud, tmp_path: Path) -> None:
    """In a clean directory and environment: it installs, trains, is killed, goes on, is rebooted, goes on, ends."""
    steps = ["train.num_epochs=1.2", "checkpoint.every_steps=2", "data.batch_size=64", "log.every_steps=1"]
    code, _, errors = submit(*steps, "mesh.fsdp=1", "--look-seconds=1")
    assert code == 0, errors
    files = JobFiles(PROJECT, "life")
    spec, worker = files.spec(), "life-g1-w0"
    home = tmp_path / "machine"
    home.mkdir()
    metadata = Metadata(
        {
            "attributes/rae-xla-job": files.directory,
            "attributes/rae-xla-package": spec.package,
            "attributes/tpu-env": "ACCELERATOR_TYPE: 'v6e-8'\nNODE_ID: 'life-g1'\nWORKER_ID: '0'\n",
            "service-accounts/default/token": '{"access_token":"none","expires_in":3600,"token_type":"Bearer"}',
            "preempted": "FALSE",
            "maintenance-event": "NONE",
        }
    )
    kept = ("STORAGE_EMULATOR_HOST", "FSSPEC_", "GCSFS_", "PIP_", "UV_", "SSL_", "REQUESTS_", "CURL_", "HTTP", "http")
    environment = {key: value for key, value in os.environ.items() if key.startswith(kept)}
    environment |= {
        "PATH": _without_environment(os.environ["PATH"]),
        "GCE_METADATA_HOST": metadata.host,
        "RAE_XLA_HOME": str(home),
        "RAE_XLA_EXTRAS": "",
        "PJRT_DEVICE": "CPU",
    }

    def boot() -> None:
        script = ["bash", str(ROOT / "rae_xla" / "cloud" / "start.sh")]
        done = subprocess.run(script, cwd="/", env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (home / "start.log").read_text()

    def ended(attempt: int) -> dict[str, Any]:
        return when(lambda: storage.read_json(files.attempt(worker, attempt, "exit.json")))

    try:
        boot()
        # The first of two is whole.
        when(lambda: len(storage.list_names(f"{PROJECT}/judge/checkpoints")) >= 2)
        os.killpg(_training(home), signal.SIGKILL)
        assert ended(1)["code"] == 128 + signal.SIGKILL
        files.write_state(files.state().model_copy(update={"attempt": 2}))
        newest = max(storage.list_names(f"{PROJECT}/judge/checkpoints"))
        when(lambda: max(storage.list_names(f"{PROJECT}/judge/checkpoints"), default="") > newest)
        # The power goes, and comes again.
        os.killpg(int((home / "worker.pid").read_text()), signal.SIGKILL)
        os.killpg(_training(home), signal.SIGKILL)
        boot()
        assert ended(2)["code"] is None
        files.write_state(files.state().model_copy(update={"attempt": 3}))
        assert ended(3)["code"] == 0, (home / "attempt-003.log").read_text()
    finally:
        metadata.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((home / "worker.pid").read_text()), signal.SIGKILL)
    assert "report.json" in storage.list_names(f"{PROJECT}/judge")
    lines = storage.read_bytes(f"{PROJECT}/judge/metrics.jsonl").decode().splitlines()
    logged = [json.loads(line)["step"] for line in lines]
    assert logged == list(range(1, len(logged) + 1))
    log = "".join(
        storage.read_bytes(files.attempt(worker, 3, name)).decode()
        for name in storage.list_names(files.attempt(worker, 3))
        if name.startswith("log-")
    )
    assert "judge: resuming from step" in log
    installs = (home / "install.log").read_text()
    # The second boot found the environment made.
    assert "installing" not in installs


def _without_environment(path: str) -> str:
    return ":".join(part for part in path.split(":") if ".venv" not in part)


def _training(home: Path) -> int:
    """The process group of the tool that the machine runs."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "tools/train.py" in command and any(str(home) in part for part in command):
            return process.pid
    raise AssertionError("nothing trains")
