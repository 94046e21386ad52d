"""What runs on each machine of a slice: starts the job's command when the supervisor says so, and tells how it goes.

``python -m rae_xla.cloud.worker JOB WORKER --home DIR``. It writes into the machine's own folder of the job alone, and
reads ``state.json``: while that has no outcome, the attempt it names is to run, and another one that runs is ended
first. A machine that was restarted tells that its attempt is over.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rae_xla import cli, storage
from rae_xla.cloud.gcloud import Gcloud
from rae_xla.cloud.job import RECIPE, WATCH, JobFiles, JobSpec, State
from rae_xla.cloud.queued import delete_slice
from rae_xla.errors import first_line

logger = logging.getLogger(__name__)

# Processes of ours are known by this in their environment, whichever job and worker started them: the machine's folder.
MARK = "RAE_XLA_MACHINE"
# libtpu's, left by a process that was killed; the next one takes the chips for in use.
LOCK = Path("/tmp/libtpu_lockfile")
LONGEST_PIECE = 2**20
# Until the job could be read.
FIRST_LOOK_SECONDS, LEAVING_SECONDS = 5.0, 0.5
LAST_LINES, LAST_BYTES = 20, 2**16
# A save of a large state takes this long at most; then the process is killed.
GRACE_SECONDS = 300.0
# As a shell says it of a process that was killed by this signal.
SIGNALLED = 128
RESTARTED = "the machine was restarted"


class Attempt:
    """The job's command, run once: its process, its log and what is said of it."""

    def __init__(self, files: JobFiles, worker: str, number: int, home: Path) -> None:
        self.number = number
        self._files, self._worker = files, worker
        self._home = home
        self._log = home / f"attempt-{number:03d}.log"
        self._sent_file = home / f"attempt-{number:03d}.sent"
        self._ended_file = home / f"attempt-{number:03d}.ended"
        self._process: subprocess.Popen[bytes] | None = None
        self._told_at: float | None = None

    @property
    def was_begun(self) -> bool:
        """On this machine, also before it was restarted."""
        return self._log.exists()

    @property
    def is_told(self) -> bool:
        """Its end is in the bucket."""
        return self._ended_file.exists()

    @property
    def is_running(self) -> bool:
        """There is a process, and it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def last_output(self) -> float | None:
        """When it last wrote a line."""
        return self._log.stat().st_mtime if self._log.exists() else None

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """Nothing else of ours runs on this machine then."""
        end_leftovers(self._home)
        LOCK.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            # Its own group, so that all it starts can be ended with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, MARK: str(self._home), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def tell_to_end(self) -> None:
        """SIGTERM, upon which a training saves itself; SIGKILL when it has had its time."""
        if self._process is None or not self.is_running:
            return
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
            os.killpg(self._process.pid, signal.SIGTERM)
        elif now - self._told_at > GRACE_SECONDS:
            os.killpg(self._process.pid, signal.SIGKILL)

    def send_log(self) -> None:
        """What was written since, in pieces named by where they begin."""
        if not self._log.exists():
            return
        sent = int(self._sent_file.read_text()) if self._sent_file.exists() else 0
        with self._log.open("rb") as log:
            log.seek(sent)
            while piece := log.read(LONGEST_PIECE):
                storage.write_bytes(self._path(f"log-{sent:012d}.txt"), piece)
                sent += len(piece)
                self._sent_file.write_text(str(sent))

    def tell_end(self) -> None:
        """The log's rest, and how the process ended; once."""
        code = None if self._process is None else self._process.returncode
        if code is not None:
            # What it started and left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            code = SIGNALLED - code if code < 0 else code
        self.send_log()
        said = [RESTARTED] if code is None else self._last_lines()
        storage.write_json(self._path("exit.json"), {"code": code, "time": time.time(), "last_lines": said})
        self._ended_file.touch()

    def _last_lines(self) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - LAST_BYTES))
            return log.read().decode(errors="replace").splitlines()[-LAST_LINES:]

    def _path(self, name: str) -> str:
        return self._files.attempt(self._worker, self.number, name)


def end_leftovers(home: Path) -> None:
    """Kill processes of ours that an earlier attempt or worker left; they would hold the chips."""
    for pid in _ours(home):
        logger.info("process %d is left from before and is killed", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ours(home: Path) -> Iterator[int]:
    mark = f"{MARK}={home}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


class Worker:
    """A machine's part in a job."""

    def __init__(self, files: JobFiles, name: str, home: Path) -> None:
        self._files, self._name, self._home = files, name, home
        self._attempt: Attempt | None = None
        self._leaving = threading.Event()
        self._ended_at: float | None = None

    def leave(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: the machine goes down, or another worker takes over."""
        self._leaving.set()

    def run(self) -> None:
        """Until the job has an outcome and nothing runs here, or the machine goes down."""
        spec: JobSpec | None = None
        while True:
            try:
                spec = spec or self._fetched()
                if self._step(spec):
                    return
            # What stores and networks raise has no common base; the job goes on, what was not told is told again.
            except Exception as error:
                logger.warning("%s: %s", type(error).__name__, first_line(error))
            self._leaving.wait(FIRST_LOOK_SECONDS if spec is None else spec.limits.look_seconds)
            if self._leaving.is_set():
                # The wait above has ended at once.
                time.sleep(LEAVING_SECONDS)

    def _fetched(self) -> JobSpec:
        (self._home / RECIPE).write_bytes(storage.read_bytes(self._files.path(RECIPE)))
        return self._files.spec()

    def _step(self, spec: JobSpec) -> bool:
        state = self._files.state()
        wanted = None if state.outcome is not None or self._leaving.is_set() else state.attempt
        running = self._attempt
        if running is not None and running.is_running and running.number != wanted:
            running.tell_to_end()
        if running is not None and not running.is_running and not running.is_told:
            running.tell_end()
        if wanted is not None and (running is None or (running.is_told and running.number != wanted)):
            self._begin(wanted, spec)
        self._tell()
        self._give_back_if_unwatched(spec, state)
        idle = self._attempt is None or self._attempt.is_told
        return idle and (state.outcome is not None or self._leaving.is_set())

    def _begin(self, number: int, spec: JobSpec) -> None:
        self._attempt = attempt = Attempt(self._files, self._name, number, self._home)
        if attempt.is_told:
            return
        if attempt.was_begun:
            # By a worker that is no more.
            end_leftovers(self._home)
            attempt.tell_end()
            return
        command = [sys.executable, *spec.command(str(self._home / RECIPE))]
        logger.info("attempt %d: %s", number, shlex.join(command))
        attempt.start(command, spec.environment)

    def _tell(self) -> None:
        if self._attempt is not None and self._attempt.is_running:
            self._attempt.send_log()
        storage.write_json(self._files.worker(self._name, "heartbeat.json"), self._heartbeat())

    def _give_back_if_unwatched(self, spec: JobSpec, state: State) -> None:
        """Or a slice whose work is over would go on costing while its supervisor is dead. One machine asks for all."""
        if self._attempt is None or not self._attempt.is_told:
            self._ended_at = None
            return
        watch = self._files.read(WATCH)
        self._ended_at = self._ended_at or time.time()
        since = max(self._ended_at, 0.0 if watch is None else watch["time"])
        if self._name == spec.workers(state.generation)[0] and time.time() - since > 60 * spec.limits.unwatched_minutes:
            logger.info("nobody has watched for %g minutes; the slice is given back", spec.limits.unwatched_minutes)
            self._ended_at = time.time()
            delete_slice(spec, state.generation, Gcloud(spec.project, spec.zone))

    def _heartbeat(self) -> dict[str, Any]:
        attempt = self._attempt
        return {
            "time": time.time(),
            "attempt": None if attempt is None else attempt.number,
            "running": attempt is not None and attempt.is_running,
            "last_output": None if attempt is None else attempt.last_output,
        }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("worker")
    parser.add_argument("--home", type=Path, required=True)
    arguments = parser.parse_args()
    cli.set_up_logging("%(asctime)s %(message)s")
    worker = Worker(JobFiles.at(arguments.job), arguments.worker, arguments.home)
    signal.signal(signal.SIGTERM, worker.leave)
    worker.run()


if __name__ == "__main__":
    main()
