"""Runs of a training that are killed at random moments, and go on: ``python tests/killed_runs.py RECIPE ROOT KILLS``.

Every run is a process of its own, forked from this one, which has imported everything already. One run is left alone;
the others are killed, each once or more or not at all, until there were KILLS. Prints what was found as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time

from conftest import run_tool

import rae_xla.training.tasks  # noqa: F401
from rae_xla import storage


def started(recipe: str, root: str, number: int) -> int:
    """A process that trains in ``ROOT/run_N``."""
    child = os.fork()
    if child:
        return child
    # Not the parent's: it has none of its own to restore.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    code, _, errors = run_tool("train", recipe, f"root={root}", f"run_dir=run_{number}")
    print(errors, file=sys.stderr, flush=True)
    os._exit(code)


def weights(root: str, number: int) -> bytes:
    return storage.read_bytes(f"{root}/run_{number}/weights.safetensors")


def main() -> None:
    recipe, root, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
    moments = random.Random(0)
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(started(recipe, root, 0), 0)[1]) == 0
    whole_seconds = time.monotonic() - begun
    found = {"kills": 0, "runs": 0, "half_written": 0, "resumed": 0, "equal": True, "whole_seconds": whole_seconds}
    number = 0
    while found["kills"] < kills:
        number += 1
        while True:
            child = started(recipe, root, number)
            killed_at = time.monotonic() + moments.uniform(0.05, 1.0) * whole_seconds
            ended = 0
            while not ended and time.monotonic() < killed_at:
                time.sleep(0.01)
                ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert os.waitstatus_to_exitcode(status) == 0
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found["kills"] += 1
            steps = f"{root}/run_{number}/checkpoints"
            names = storage.list_names(steps)
            found["half_written"] += sum(not storage.exists(f"{steps}/{name}/complete.json") for name in names)
        report = json.loads(storage.read_bytes(f"{root}/run_{number}/report.json"))
        found["runs"] += 1
        found["resumed"] += report["resumed_from_step"] > 0
        found["equal"] &= weights(root, number) == weights(root, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
