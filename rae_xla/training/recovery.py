"""What ends a run early or takes it back: machines that go away, numbers that are not finite, steps that hang."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections import deque
from types import FrameType, TracebackType
from typing import Any

import requests
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from rae_xla.config import Config
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

# What processes say is heard by all so many steps later, when it has surely arrived.
HEARD_AFTER_STEPS = 2
# Values are read when so many later steps have been started, so that the devices do not wait for it.
READ_BEHIND_STEPS = 2
# Cloud TPU tells of maintenance a minute ahead, of a spot machine's end half a minute.
ASK_EVERY_SECONDS = 5.0
NOTICES = {"maintenance-event": "NONE", "preempted": "FALSE"}
"""Entries of an instance's metadata, and what they say while nothing is going to happen."""
REARM_EVERY_SECONDS = 1.0
LONGEST = ("skipped_longest_row", "skipped_longest_row_began")
# Of the process, whatever stands in for it in Python.
STDERR = 2


class RecoveryConfig(Config):
    """What a run does about bad numbers, and when it takes itself for hung.

    After ``max_bad_steps`` updates in a row that were not finite (and changed nothing) it goes back to the newest
    checkpoint before them and on with the batches after them; that ``max_rollbacks`` times, then it stops. With no step
    done for ``hung_minutes`` it ends, with the stacks of its threads in the log; the first step's compilation counts.
    """

    max_bad_steps: int = Field(default=10, gt=0)
    max_rollbacks: int = Field(default=3, ge=0)
    hung_minutes: float = Field(default=30.0, gt=0)


class Interruption:
    """Within this context SIGTERM, and Google Cloud's notice that the machine goes away, are noted as ``reason``."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: Any = None
        self._left = threading.Event()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        threading.Thread(target=self._ask, name="notices", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def _ask(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        answered = False
        while not self._left.wait(ASK_EVERY_SECONDS):
            for entry, quiet in NOTICES.items():
                try:
                    answer = requests.get(
                        f"http://{host}/computeMetadata/v1/instance/{entry}",
                        headers={"Metadata-Flavor": "Google"},
                        timeout=ASK_EVERY_SECONDS,
                    )
                except requests.RequestException:
                    if answered:
                        continue
                    # Not a machine of Google's.
                    return
                answered = True
                if answer.ok and answer.headers.get("Metadata-Flavor") == "Google" and answer.text.strip() != quiet:
                    self.reason = f"{entry} {answer.text.strip()}"
                    return


class Agreement:
    """What one process wishes all do, after the same step."""

    def __init__(self, runtime: Runtime) -> None:
        self._group = dist.new_group(backend="gloo") if runtime.num_processes > 1 else None
        self._said: deque[tuple[Tensor, Any]] = deque()

    def on(self, wish: bool) -> bool:
        """To be asked once a step: whether any process wished so, `HEARD_AFTER_STEPS` ago if there are several."""
        if self._group is None:
            return wish
        wished = torch.tensor([int(wish)])
        self._said.append((wished, dist.all_reduce(wished, dist.ReduceOp.MAX, self._group, async_op=True)))
        if len(self._said) <= HEARD_AFTER_STEPS:
            return False
        wished, arriving = self._said.popleft()
        arriving.wait()
        return bool(wished)


class Watchdog:
    """Ends the process, with the stacks of all its threads on stderr, if `step` is not called in time."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._armed_at = 0.0

    def __enter__(self) -> Watchdog:
        logger.info("watchdog: the run ends if no step is done for %g minutes", self._seconds / 60)
        self.step()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """Time runs from now on."""
        if time.monotonic() - self._armed_at > min(REARM_EVERY_SECONDS, self._seconds / 10):
            self._armed_at = time.monotonic()
            # A thread without Python: one that hangs in a library with Python's lock held is caught too.
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=STDERR)


class BadSteps:
    """Watches for updates in a row that were not finite, without making the devices wait."""

    def __init__(self, most: int, num_steps: int, runtime: Runtime) -> None:
        self._most = most
        self._num_steps = num_steps
        self._runtime = runtime
        self._pending: deque[tuple[int, Any]] = deque()

    def row_began(self, step: int, metrics: Any) -> int | None:
        """The step at which ``most`` or more in a row began, if there was such a row; ``metrics`` of this step.

        The longest row is looked at every ``most`` steps, a little later, and at the last: always at the same steps, so
        that a resumed run finds what the run would have.
        """
        is_last = step == self._num_steps
        if step % self._most == 0 or is_last:
            self._pending.append((step, [metrics[name] for name in LONGEST]))
        while self._pending and (is_last or self._pending[0][0] <= step - READ_BEHIND_STEPS):
            longest, began = map(int, self._runtime.to_host(self._pending.popleft()[1]))
            if longest >= self._most:
                return began
        return None
