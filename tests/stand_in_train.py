"""In place of ``tools/train.py`` where jobs are tested, and not training: steps that are counted in checkpoints.

It goes on from the newest, crashes once in the third quarter, and saves itself on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from rae_xla import storage
from rae_xla.config import read_yaml

STEPS = int(os.environ["STAND_IN_STEPS"])

recipe = read_yaml(sys.argv[1])
run = storage.resolve(recipe["root"], recipe["run_dir"])
told: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: told.append(number))


def newest() -> int:
    """The step of the newest checkpoint, or 0."""
    return max((int(name.removeprefix("step_")) for name in storage.list_names(f"{run}/checkpoints")), default=0)


step = newest()
print(f"begins at step {step}")
while step < STEPS:
    time.sleep(0.25)
    step += 1
    print(f"step {step}")
    if step % 5 == 0 or told:
        storage.write_text(f"{run}/checkpoints/step_{step:08d}", str(os.getpid()))
    if told:
        sys.exit(os.EX_TEMPFAIL)
    if step > 0.6 * STEPS and not storage.exists(f"{run}/crashed"):
        storage.write_text(f"{run}/crashed", "once")
        raise SystemExit("crashes, as it is meant to")
print("done")
