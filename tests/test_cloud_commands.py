"""What ``tools/tpu.py`` asks, says and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from cloud_machines import FAST, PROJECT, Cloud, submit
from conftest import ROOT, run_python, run_tool
from faulty_bucket import FaultyProxy

from rae_xla import storage
from rae_xla.cloud.job import JobFiles

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
    code, shown, errors = submit(*arguments, "--dry-run")
    assert code == 0, errors
    assert cloud.asked("create") == [] and storage.list_names(PROJECT) == []
    code, _, errors = submit(*arguments)
    assert code == 0, errors
    asked = cloud.asked("create")[-1]
    package = JobFiles(PROJECT, "life").spec().package
    assert asked == [part.replace("PACKAGE", package) for part in expected]
    assert shown.splitlines()[-1] == " ".join(["gcloud", *asked, "--format=json", "--quiet"])


def test_shell_characters_pass_unharmed(cloud: Cloud) -> None:
    zone, project = "z; rm -rf / #", "p$(touch x) 'q'"
    code, _, errors = submit(f"--zone={zone}", f"--project={project}", "--env=FLAGS=--a=$HOME; `b`", "run_dir=a b$(c)")
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
        (["mesh.slices=2"], "give --num-slices 2"),
        (["--env=WANDB_API_KEY=x"], "looks like a secret"),
        (["--env=x"], "written NAME=VALUE"),
        (["--tool=sample"], "task"),
        (["--tool=simple"], "--tool: 'simple'"),
        (["train.nonsense=1"], "unknown key"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(cloud: Cloud, arguments: list[str], message: str) -> None:
    cloud.set(offered=["v6e-8", "v6e-64"])
    code, output, errors = submit(*arguments)
    assert code == 2, output + errors
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert cloud.asked("create") == [] and storage.list_names(PROJECT) == []


def test_what_cloud_refuses_is_told_in_one_line(
    cloud: Cloud, store: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: str) -> str:
        code, output, errors = submit(*arguments)
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
    assert submit()[0] == 0
    assert "--name: life is taken by a job" in told()
    assert "there are slices of that name, life-g1" in told("root=gs://images/other")
    only_git = cloud.machines.parent / "only_git"
    only_git.mkdir()
    (only_git / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(only_git))
    assert "gcloud was not found; install the Google Cloud CLI" in told("--project=p")


def test_status_logs_attach_list_of_a_job(cloud: Cloud) -> None:
    assert run_tool("tpu", "status", "--name=life", f"--root={PROJECT}")[0] == 2
    assert submit(*FAST)[0] == 0
    code, output, errors = run_tool("tpu", "status", "--name=life", f"--root={PROJECT}")
    assert code == 0, errors
    assert "g1 WAITING_FOR_RESOURCES" in output and "life-g1-w0  not heard of yet" in output
    code, output, _ = run_tool("tpu", "list", f"--root={PROJECT}")
    assert code == 0 and output.startswith("life  v6e-8  us-east5-b  attempt 1")
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
    # What was asked for is done.
    assert run_tool("tpu", "stop", "--name=life", f"--root={PROJECT}", "--now")[0] == 0
    assert JobFiles(PROJECT, "life").state().outcome == "stopped" and cloud.content["slices"] == {}


def test_the_manifest_is_a_jobset(cloud: Cloud) -> None:
    """It is read by classes made from JobSet's published schema, which keep nothing that they do not know."""
    from kubeflow_trainer_api import models

    code, output, errors = submit(
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
