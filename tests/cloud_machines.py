"""A cloud on this machine for `tools/tpu.py`: a ``gcloud`` that keeps state, and machines that are processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, run_tool
from fake_cloud import FakeCloud
from faulty_bucket import BUCKET

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


def submit(*arguments: str, what: str = "submit", accelerator: str = "v6e-8") -> tuple[int, str, str]:
    """A job of the quickstart's, called life."""
    return run_tool(
        "tpu", what, JUDGE, f"root={PROJECT}", "--name=life", f"--accelerator={accelerator}", "--zone=us-east5-b",
        *arguments,
    )  # fmt: skip


def when(found: Any, seconds: float = 400) -> Any:
    """What is found as soon as something is."""
    for _ in range(int(seconds / 0.5)):
        with contextlib.suppress(FileNotFoundError):
            if value := found():
                return value
        time.sleep(0.5)
    raise AssertionError("it does not come")
