"""Shared fixtures. A process has one set of devices, so tests that need eight have a process of their own."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import photos
import pytest
from faulty_bucket import BUCKET, FaultyProxy, faulty_bucket
from inception_weights import write_weights

from rae_xla import storage
from rae_xla.eager import EagerRuntime
from rae_xla.runtime import create
from rae_xla.sharding import MeshConfig

os.environ.setdefault("PJRT_DEVICE", "CPU")
# Who has a key does not want their tests in their account.
os.environ.pop("WANDB_API_KEY", None)

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session", autouse=True)
def xla_before_autograd() -> None:
    """Autograd counts devices at its first backward pass; an XLA device that comes later has no gradients."""
    create("xla", MeshConfig(), "fp32")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process in the project's root."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_tool(name: str, *arguments: str) -> tuple[int, str, str]:
    """A tool in this process, which has torch imported already: (exit code, standard output, standard error)."""
    output, errors = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = [f"{name}.py", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0), output.getvalue(), errors.getvalue()
    finally:
        sys.argv = argv
    raise AssertionError(f"{name} did not exit")


@pytest.fixture(scope="session")
def eight_device_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The whole quickstart, shortened, on eight virtual devices, parameters split over two; (root, what it printed)."""
    root = tmp_path_factory.mktemp("eight")
    done = run_python("tests/short_quickstart.py", str(root), "mesh.fsdp=2", CPU_NUM_DEVICES="8", PJRT_DEVICE="CPU")
    assert done.returncode == 0, done.stderr[-4000:]
    return root, done.stdout


@pytest.fixture(scope="session")
def one_device_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one device."""
    root = tmp_path_factory.mktemp("one")
    done = run_python("tests/short_quickstart.py", str(root), CPU_NUM_DEVICES="1", PJRT_DEVICE="CPU")
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.fixture(scope="session")
def rows() -> photos.Rows:
    """A hundred JPEG images of 80x60 and their labels."""
    return photos.samples(100)


@pytest.fixture
def exact_programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Names of the eager runtime's programs, as they are made, and whether they multiply float32 as such."""
    found: dict[str, bool] = {}
    plain = EagerRuntime.compile

    def noted(self, function, name: str, *, exact: bool = False):
        found[name] = exact
        return plain(self, function, name, exact=exact)

    monkeypatch.setattr(EagerRuntime, "compile", noted)
    return found


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Inception's weights, at random."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    write_weights(path)
    return path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, rows: photos.Rows) -> Iterator[FaultyProxy]:
    """``gs://images/set/manifest.json``, of four shards."""
    with faulty_bucket(monkeypatch) as proxy:
        for shard in range(4):
            content = photos.parquet(rows[25 * shard : 25 * (shard + 1)], 5)
            storage.write_bytes(f"gs://{BUCKET}/set/train-{shard}.parquet", content)
        code, _, errors = run_tool(
            "prepare_data", f"gs://{BUCKET}/set/*.parquet", "--out", f"gs://{BUCKET}/set/manifest.json"
        )
        assert code == 0, errors
        yield proxy


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """``gs://images``, empty."""
    with faulty_bucket(monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: FaultyProxy) -> Iterator[Any]:
    """A `cloud_machines.Cloud`."""
    from cloud_machines import Cloud

    made = Cloud(tmp_path, monkeypatch)
    yield made
    made.end()
