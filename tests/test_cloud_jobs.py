"""``tools/tpu.py`` with a ``gcloud`` that keeps state, machines that are processes, and a bucket on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, run_python, run_tool
from fake_cloud import FakeCloud
from faulty_bucket import BUCKET, FaultyProxy, faulty_bucket

from rae_xla import storage
from rae_xla.cloud.job import JobFiles
from rae_xla.cloud.worker import MARK

JUDGE = "recipes/quickstart/judge.yaml"
PROJECT = f"gs://{BUCKET}/project"
FAST = ("--look-seconds=0.25", "--settle-minutes=0.05")


class Cloud:
    """A fake ``gcloud`` on the PATH, and the machines that it starts."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = directory / "cloud.json"
        self.machines = directory / "machines"
        programs = directory / "bin"
        programs.mkdir()
        gcloud = programs / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fake_cloud.py" "$@"\n')
        gcloud.chmod(0o755)
        code = directory / "code" / "tools"
        code.mkdir(parents=True)
        shutil.copy(ROOT / "tests" / "stand_in_train.py", code / "train.py")
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_CLOUD", str(self.file))
        monkeypatch.setenv("FAKE_CODE", str(code.parent))
        self.set()

    def set(self, hosts_per_slice: int = 1, **values: Any) -> None:
        """Begin anew."""
        content = {**asdict(FakeCloud(**values)), "machines": {}, "hosts_per_slice": hosts_per_slice}
        self.file.write_text(json.dumps(content))

    @property
    def content(self) -> dict[str, Any]:
        """Its state."""
        with self.file.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH)
            return json.load(opened)

    def asked(self, word: str) -> list[list[str]]:
        """Commands with this word."""
        return [one for one in self.content["asked"] if word in one]

    def end(self) -> None:
        """Nothing of a test is left running."""
        for pids in self.content["machines"].values():
            for pid in pids:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker = psutil.Process(pid)
                    for process in [*worker.children(recursive=True), worker]:
                        process.kill()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_bucket(monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: FaultyProxy) -> Iterator[Cloud]:
    made = Cloud(tmp_path, monkeypatch)
    yield made
    made.end()


def _submit(*arguments: str, what: str = "submit", accelerator: str = "v6e-8") -> tuple[int, str, str]:
    return run_tool(
        "tpu", what, JUDGE, f"root={PROJECT}", "--name=life", f"--accelerator={accelerator}", "--zone=us-east5-b",
        *arguments,
    )  # fmt: skip


@pytest.mark.parametrize("deaths", [2, pytest.param(20, marks=pytest.mark.nightly)])
def test_a_job_lives_through_preemption_crash_and_its_supervisors_deaths(cloud: Cloud, deaths: int) -> None:
    cloud.set(hosts_per_slice=2, fates=["preempted:12", "ok"], unavailable_every=9, offered=["v4-16"])
    # Long enough that the last supervisor still has something to see.
    steps = 20 * deaths
    code, output, errors = _submit("--spot", *FAST, f"--env=STAND_IN_STEPS={steps}", accelerator="v4-16")
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
    command = [sys.executable, *given, *FAST, "--env=STAND_IN_STEPS=80"]
    # It does not crash this time.
    storage.write_text(f"{PROJECT}/judge/crashed", "before")
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    checkpoints = f"{PROJECT}/judge/checkpoints"
    _when(lambda: storage.list_names(checkpoints))
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=120)[1]
    assert running.returncode == os.EX_TEMPFAIL, said
    assert "stopped: asked to stop" in said
    files = JobFiles(PROJECT, "life")
    ended = storage.read_json(files.attempt("life-g1-w0", 1, "exit.json"))
    assert ended["code"] == os.EX_TEMPFAIL
    saved = storage.list_names(checkpoints)[-1]
    assert cloud.content["slices"] == {} and cloud.content["machines"] == {}
    code, _, errors = run_tool("tpu", "run", "--name=life", f"--root={PROJECT}", "--again")
    assert code == 0, errors
    log = storage.read_bytes(files.attempt("life-g2-w0", 2, "log-000000000000.txt")).decode()
    assert log.splitlines()[0] == f"begins at step {int(saved.removeprefix('step_'))}"
    assert cloud.content["slices"] == {} and cloud.content["made"] == 2


def test_a_slice_that_nobody_watches_gives_itself_back(cloud: Cloud) -> None:
    assert _submit(*FAST, "--env=STAND_IN_STEPS=4", "--unwatched-minutes=0.05")[0] == 0
    # It does not crash this time.
    storage.write_text(f"{PROJECT}/judge/crashed", "before")
    gcloud = [str(cloud.file.parent / "bin" / "gcloud"), "compute", "tpus", "queued-resources", "list"]

    def is_gone() -> bool:
        # Cloud's clock; nobody of ours looks.
        subprocess.run(gcloud, check=True, capture_output=True)
        return cloud.content["made"] == 1 and not cloud.content["slices"]

    _when(is_gone)
    assert JobFiles(PROJECT, "life").state().outcome is None
    code, _, errors = run_tool("tpu", "run", "--name=life", f"--root={PROJECT}")
    assert code == 0, errors
    assert JobFiles(PROJECT, "life").state().outcome == "succeeded"
    assert cloud.content["made"] == 1


def _is_of_machines(process: psutil.Process, machines: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(MARK, "").startswith(str(machines))
    return False


V6E_8 = [
    "compute", "tpus", "queued-resources", "create", "life-g1", "--accelerator-type=v6e-8",
    "--runtime-version=v2-alpha-tpuv6e", "--node-id=life-g1",
    "--scopes=https://www.googleapis.com/auth/cloud-platform", "--labels=rae-xla-job=life",
    "--metadata=rae-xla-job=gs://images/project/jobs/life,rae-xla-package=PACKAGE",
    f"--metadata-from-file=startup-script={ROOT}/rae_xla/cloud/start.sh", "--async", "--project=configured",
    "--zone=us-east5-b",
]  # fmt: skip
TWO_SLICES = [
    "compute", "tpus", "queued-resources", "create", "life-g1", "--accelerator-type=v6e-64",
    "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=life-g1", "--spot",
    *V6E_8[8:],
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), V6E_8), (("--accelerator=v6e-64", "--num-slices=2", "--spot"), TWO_SLICES)],
    ids=["v6e-8", "two slices of v6e-64, spot"],
)
def test_what_gcloud_is_asked(cloud: Cloud, arguments: tuple[str, ...], expected: list[str]) -> None:
    """The very command, shown by a dry run, which does nothing, and then asked."""
    code, shown, errors = _submit(*arguments, "--dry-run")
    assert code == 0, errors
    assert cloud.asked("create") == [] and storage.list_names(PROJECT) == []
    code, _, errors = _submit(*arguments)
    assert code == 0, errors
    asked = cloud.asked("create")[-1]
    package = JobFiles(PROJECT, "life").spec().package
    assert asked == [part.replace("PACKAGE", package) for part in expected]
    assert shown.splitlines()[-1] == " ".join(["gcloud", *asked, "--format=json", "--quiet"])


def test_shell_characters_pass_unharmed(cloud: Cloud) -> None:
    zone, project = "z; rm -rf / #", "p$(touch x) 'q'"
    code, _, errors = _submit(f"--zone={zone}", f"--project={project}", "--env=FLAGS=--a=$HOME; `b`", "run_dir=a b$(c)")
    assert code == 0, errors
    assert [f"--project={project}", f"--zone={zone}"] == cloud.asked("create")[-1][-2:]
    spec = JobFiles(PROJECT, "life").spec()
    assert spec.environment == {"FLAGS": "--a=$HOME; `b`"}
    recipe = yaml.safe_load(storage.read_bytes(JobFiles(PROJECT, "life").path("recipe.yaml")))
    assert recipe["run_dir"] == "a b$(c)"


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="there is no gcloud here")
@pytest.mark.parametrize("expected", [V6E_8, TWO_SLICES], ids=["v6e-8", "two slices"])
def test_the_real_gcloud_understands_it(expected: list[str], tmp_path: Path) -> None:
    """It reads the command as far as to say that nobody is logged in; a flag that it does not know ends earlier."""
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)}

    def said(*more: str) -> str:
        command = ["gcloud", *expected, "--format=json", "--quiet", *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stderr

    assert "active account" in said()
    assert "unrecognized arguments" in said("--no-such-flag")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=Life"], "--name: 'Life'"),
        (["--name=life-g2"], "ends as the names of slices do; leave g2 out"),
        (["--accelerator=v6e-7"], "--accelerator: Cloud has no"),
        (["--accelerator=v6e-16"], "us-east5-b has no v6e-16; it has v6e-8"),
        (["--num-slices=0"], "at least one slice"),
        (["root=work"], "say root=gs://"),
        (["run_dir=/tmp/x"], "run_dir: /tmp/x is on this machine"),
        (["mesh.fsdp=3"], "v6e-8 has 8 chips"),
        (["--env=WANDB_API_KEY=x"], "looks like a secret"),
        (["--env=x"], "written NAME=VALUE"),
        (["--tool=sample"], "task"),
        (["--tool=simple"], "--tool: 'simple'"),
        (["train.nonsense=1"], "unknown key"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(cloud: Cloud, arguments: list[str], message: str) -> None:
    cloud.set(offered=["v6e-8", "v6e-64"])
    code, output, errors = _submit(*arguments)
    assert code == 2, output + errors
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert cloud.asked("create") == [] and storage.list_names(PROJECT) == []


def test_what_cloud_refuses_is_told_in_one_line(
    cloud: Cloud, store: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: str) -> str:
        code, output, errors = _submit(*arguments)
        assert code == 2, output + errors
        assert len(errors.strip().splitlines()) == 1
        return errors

    cloud.set(logged_in=False)
    assert "gcloud is not logged in; run gcloud auth login" in told()
    cloud.set(fates=["quota"])
    assert "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI" in told()
    assert storage.list_names(f"{PROJECT}/jobs") == []
    cloud.set()
    store.refuses = "writable"
    assert "root: gs://images/project cannot be written" in told()
    store.refuses = None
    missing = ["tpu", "submit", "recipes/quickstart/diffusion.yaml", f"root={PROJECT}", "--name=life"]
    code, _, errors = run_tool(*missing, "--accelerator=v6e-8", "--zone=us-east5-b")
    assert code == 2 and "autoencoder.latent_stats: gs://images/project/" in errors and "is not there" in errors
    assert storage.list_names(f"{PROJECT}/jobs") == [] and cloud.asked("create") == []
    assert _submit()[0] == 0
    assert "--name: life is taken by a job" in told()
    assert "there are slices of that name, life-g1" in told("root=gs://images/other")
    only_git = cloud.machines.parent / "only_git"
    only_git.mkdir()
    (only_git / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(only_git))
    assert "gcloud was not found; install the Google Cloud CLI" in told("--project=p")


def test_status_logs_attach_list_of_a_job(cloud: Cloud) -> None:
    assert run_tool("tpu", "status", "--name=life", f"--root={PROJECT}")[0] == 2
    assert _submit()[0] == 0
    code, output, errors = run_tool("tpu", "status", "--name=life", f"--root={PROJECT}")
    assert code == 0, errors
    assert "g1 WAITING_FOR_RESOURCES" in output and "life-g1-w0  not heard of yet" in output
    code, output, _ = run_tool("tpu", "list", f"--root={PROJECT}")
    assert code == 0 and output.startswith("life  1 x v6e-8  us-east5-b  attempt 1")
    code, _, errors = run_tool("tpu", "logs", "--name=life", f"--root={PROJECT}")
    assert code == 2 and "attempt 1 has written nothing yet" in errors
    code, _, errors = run_tool("tpu", "logs", "--name=life", f"--root={PROJECT}", "--worker=1")
    assert code == 2 and "--worker: 1: the job has machines 0 to 0" in errors
    code, _, errors = run_tool("tpu", "attach", "--name=life", f"--root={PROJECT}")
    assert code == 2 and "host's key has changed" in errors
    assert cloud.asked("ssh")[-1][3:6] == ["ssh", "life-g1", "--worker=0"]
    for command in ("status", "stop", "clean", "attach", "run", "list"):
        asked = len(cloud.content["asked"])
        code, output, errors = run_tool("tpu", command, "--name=life", f"--root={PROJECT}", "--dry-run")
        assert code == 0 and output, errors
        assert len(cloud.content["asked"]) == asked
    assert JobFiles(PROJECT, "life").state().outcome is None


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
    code, _, errors = _submit(*steps, "mesh.fsdp=1", "--look-seconds=1")
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
        return _when(lambda: storage.read_json(files.attempt(worker, attempt, "exit.json")))

    try:
        boot()
        # The first of two is whole.
        _when(lambda: len(storage.list_names(f"{PROJECT}/judge/checkpoints")) >= 2)
        os.killpg(_training(home), signal.SIGKILL)
        assert ended(1)["code"] == 128 + signal.SIGKILL
        files.write_state(files.state().model_copy(update={"attempt": 2}))
        newest = max(storage.list_names(f"{PROJECT}/judge/checkpoints"))
        _when(lambda: max(storage.list_names(f"{PROJECT}/judge/checkpoints"), default="") > newest)
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


def _when(found: Any, seconds: float = 400) -> Any:
    """What is found as soon as something is."""
    for _ in range(int(seconds / 0.5)):
        with contextlib.suppress(FileNotFoundError):
            if value := found():
                return value
        time.sleep(0.5)
    raise AssertionError("it does not come")


def test_the_manifest_is_a_jobset(cloud: Cloud) -> None:
    """It is read by classes made from JobSet's published schema, which keep nothing that they do not know."""
    from kubeflow_trainer_api import models

    code, output, errors = _submit(
        "--num-slices=2", "--spot", "--queue=team", "--env=FLAGS=$(a) b", what="manifest", accelerator="v6e-64"
    )
    assert code == 0, errors
    manifest = yaml.safe_load(output)
    read = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None and read.to_dict() == manifest
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (2, 16, 16)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert {"name": "FLAGS", "value": "$$(a) b"} in container["env"]
    assert storage.exists(JobFiles(PROJECT, "life").spec().package)
    assert cloud.asked("create") == []


def test_cost_is_hours_times_prices(tmp_path: Path) -> None:
    found = tmp_path / "preflight.json"
    program = {"name": "train", "topology": "v6e-64", "fits": True, "run": {"hours": 10.0, "chip_hours": 640.0}}
    second = {**program, "name": "train_adversarial", "run": {"hours": 5.0, "chip_hours": 320.0}}
    sample = {"name": "sample", "topology": "v6e-64", "fits": True, "run": None}
    found.write_text(json.dumps({"programs": [program, second, sample]}))
    prices = tmp_path / "prices.yaml"
    prices.write_text("v6e: {on_demand: 2.0, spot: 0.5}\n")
    result = tmp_path / "cost.json"
    code, output, errors = run_tool("tpu", "cost", str(found), f"--prices={prices}", f"--json={result}")
    assert code == 0, errors
    (row,) = json.loads(result.read_text())["slices"]
    assert row == {"topology": "v6e-64", "hours": 15.0, "chip_hours": 960.0, "on_demand": 1920.0, "spot": 480.0}
    assert "1,920" in output
    assert run_tool("tpu", "cost", str(found))[0] == 0
    found.write_text(json.dumps({"programs": [{**program, "fits": False}]}))
    code, _, errors = run_tool("tpu", "cost", str(found))
    assert code == 2 and "train does not fit v6e-64" in errors
    prices.write_text("v6e: {on_demand: cheap}\n")
    code, _, errors = run_tool("tpu", "cost", str(found), f"--prices={prices}")
    assert code == 2 and "in dollars or null" in errors


def test_no_torch_where_jobs_are_watched() -> None:
    done = run_python(
        "-c",
        "import sys; import rae_xla.cloud.commands, rae_xla.cloud.worker, rae_xla.cloud.cost, rae_xla.cloud.jobset; "
        "print('torch' in sys.modules)",
    )
    assert done.stdout == "False\n", done.stderr
