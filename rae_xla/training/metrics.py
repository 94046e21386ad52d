"""Metrics of a run: ``metrics.jsonl``, one object a line with its ``step``, and a progress bar.

Values stay on the device until a later step has been started, so reading them never makes the devices wait.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from typing import Any

import fsspec
from pydantic import Field
from tqdm import tqdm

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2
# An object store cannot append, so the whole file is written again, and not at every line.
WRITE_EVERY_SECONDS = 30.0


class LogConfig(Config):
    """A line of metrics every so many steps."""

    every_steps: int = Field(default=50, gt=0)


class MetricsLog:
    """Collects metrics of steps ``start .. num_steps`` and writes those that fall on ``every_steps``, and the first."""

    def __init__(
        self, path: str, runtime: Runtime, *, name: str, start: int, num_steps: int, batch_size: int, every_steps: int
    ) -> None:
        self._path = path
        self._runtime = runtime
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._pending: deque[tuple[int, Any]] = deque()
        self._lines: list[str] = []
        self._kept = _lines_until(path, start)
        self._last_time, self._last_step = time.perf_counter(), start
        self._written = time.monotonic()
        self._name, self._num_steps = name, num_steps
        # A bar where people watch; lines, half a minute apart, where a file is written.
        self._shows_bar = runtime.process_index == 0 and sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, initial=start, desc=name, unit="step", mininterval=0.5, disable=not self._shows_bar
        )
        self.last: dict[str, float] = {}

    def add(self, step: int, metrics: Any) -> None:
        """``metrics`` of this step, still on the device. ``step`` counts from one."""
        self._pending.append((step, metrics))
        while len(self._pending) > STEPS_IN_FLIGHT:
            self._read(*self._pending.popleft())
        self._bar.update(1)

    def flush(self) -> None:
        """Read everything that is pending and write the file."""
        while self._pending:
            self._read(*self._pending.popleft())
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._lines and self._runtime.process_index == 0:
            self._kept += self._lines
            storage.write_text(self._path, "".join(self._kept))
            self._lines = []

    def close(self) -> None:
        """Flush and end the progress bar."""
        self.flush()
        self._bar.close()

    def _read(self, step: int, metrics: Any) -> None:
        if step % self._every_steps and step != 1:
            return
        values = {name: float(value) for name, value in self._runtime.to_host(metrics).items()}
        now = time.perf_counter()
        images = (step - self._last_step) * self._batch_size
        self.last = {"step": step, **values, "images_per_second": round(images / max(now - self._last_time, 1e-9), 2)}
        self._last_time, self._last_step = now, step
        self._lines.append(json.dumps(self.last) + "\n")
        shown = f"loss {values['loss']:.4f}, {self.last['images_per_second']:.0f} images/s"
        self._bar.set_postfix_str(shown)
        if time.monotonic() - self._written > WRITE_EVERY_SECONDS:
            self._write()
            if not self._shows_bar:
                logger.info("%s: step %d of %d, %s", self._name, step, self._num_steps, shown)


def read_metrics(path: str) -> list[dict[str, float]]:
    """The lines of a metrics file; none if there is no file."""
    if not storage.exists(path):
        return []
    with fsspec.open(path, "r") as file:
        return [json.loads(line) for line in file]


def _lines_until(path: str, step: int) -> list[str]:
    """What an interrupted run wrote up to the step it resumes from; later lines will be written again."""
    return [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
