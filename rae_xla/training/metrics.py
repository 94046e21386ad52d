"""Metrics of a run: ``metrics.jsonl``, one object a line with its ``step``, and a progress bar.

Values stay on the device until a later step has been started, so reading them never makes the devices wait.

A line also says where the time of a step went, in milliseconds, on average since the last line: ``input_ms`` waiting
for the batch, ``host_ms`` starting the step, ``device_wait_ms`` waiting for the devices, ``checkpoint_ms`` saving,
``looks_ms`` looking at held-out images or samples, out of ``step_ms``. A run that hardly waits for its devices is held
up by its host or its input. The first line holds the compilation. ``input_retries_*`` and ``input_unreadable`` count
requests that were tried again and images that could not be decoded, on the first host since the run was started. Scores
of held-out images, ``heldout_*``, and of samples have lines of their own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import fsspec
from pydantic import Field
from tqdm import tqdm

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.errors import first_line
from rae_xla.runtime import Runtime
from rae_xla.training.trackers import TrackerName, Trackers

logger = logging.getLogger(__name__)

# Values are read when so many later steps have been started.
READ_BEHIND_STEPS = 2
# An object store cannot append, so the whole file is written again, and not at every line.
WRITE_EVERY_SECONDS = 30.0


Part = Literal["input", "host", "device_wait", "checkpoint", "looks"]
PARTS: tuple[Part, ...] = get_args(Part)


class LogConfig(Config):
    """A line of metrics every so many steps, and who else gets it, see `rae_xla.training.trackers`."""

    every_steps: int = Field(default=50, gt=0)
    trackers: tuple[TrackerName, ...] = Field(default=("tensorboard",), strict=False)


class MetricsLog:
    """Collects metrics of steps ``start .. num_steps`` and writes those that fall on ``every_steps``, and the first."""

    def __init__(
        self,
        path: str,
        runtime: Runtime,
        trackers: Trackers,
        *,
        name: str,
        start: int,
        num_steps: int,
        batch_size: int,
        every_steps: int,
    ) -> None:
        self._path = path
        self._runtime = runtime
        self.trackers = trackers
        self._batch_size = batch_size
        self._every_steps = every_steps
        self._pending: deque[tuple[int, Any, dict[str, float]]] = deque()
        self._lines: list[str] = []
        self._kept = _lines_until(path, start)
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._waited_in_steps = 0.0
        self._last_step, self._last_times = start, self._times()
        self._written = time.monotonic()
        self._name, self._num_steps = name, num_steps
        # A bar where people watch; lines, half a minute apart, where a file is written.
        self._shows_bar = runtime.process_index == 0 and sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps, initial=start, desc=name, unit="step", mininterval=0.5, disable=not self._shows_bar
        )
        self._counts: Counter[str] = Counter()
        self.last: dict[str, float] = {}

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Count what happens inside as this part of the step's time."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to what went wrong and was mended; lines hold the sums since the run was started."""
        self._counts.update(counts)

    def add(self, step: int, metrics: Any, waited_in_steps: float) -> None:
        """``metrics`` of this step, still on the device. ``step`` counts from one.

        ``waited_in_steps``: `CompiledStep.wait_seconds`, which is inside what was timed as ``host``.
        """
        waited = waited_in_steps - self._waited_in_steps
        self._waited_in_steps = waited_in_steps
        self._seconds["host"] -= waited
        self._seconds["device_wait"] += waited
        self._pending.append((step, metrics, self._times()))
        while len(self._pending) > READ_BEHIND_STEPS:
            self._read(*self._pending.popleft())
        self._bar.update(1)

    def add_seen(self, step: int, title: str, values: Mapping[str, float]) -> None:
        """A line of its own: what was seen of this step, see `rae_xla.training.looks`."""
        while self._pending:
            self._read(*self._pending.popleft())
        self._lines.append(json.dumps({"step": step, **values}) + "\n")
        self.trackers.log(step, dict(values))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        logger.info("%s: step %d, %s: %s", self._name, step, title, shown)

    def flush(self) -> None:
        """Read everything that is pending and write the file."""
        while self._pending:
            self._read(*self._pending.popleft())
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._lines and self._runtime.process_index == 0:
            self._kept += self._lines
            self._lines = []
            try:
                storage.write_text(self._path, "".join(self._kept))
            # Training is worth more than its log, and the next time all lines are written again.
            except Exception as error:
                logger.warning("%s: metrics are not written (%s)", self._name, first_line(error))
        self.trackers.write()

    def close(self) -> None:
        """Flush and end the progress bar and the trackers."""
        self.flush()
        self._bar.close()
        self.trackers.close()

    def _times(self) -> dict[str, float]:
        return {"step": time.perf_counter(), **self._seconds}

    def _read(self, step: int, metrics: Any, times: dict[str, float]) -> None:
        if step % self._every_steps and step != 1:
            return
        with self.timed("device_wait"):
            values = {name: float(value) for name, value in self._runtime.to_host(metrics).items()}
        num_steps = step - self._last_step
        spent = {part: times[part] - self._last_times[part] for part in times}
        measured = {
            **values,
            "images_per_second": round(num_steps * self._batch_size / max(spent["step"], 1e-9), 2),
            **{f"{part}_ms": round(1e3 * seconds / num_steps, 3) for part, seconds in spent.items()},
            **{f"input_{name}": number for name, number in self._counts.items()},
        }
        self.last = {"step": step, **measured}
        self._last_step, self._last_times = step, times
        self.trackers.log(step, measured)
        self._lines.append(json.dumps(self.last) + "\n")
        parts = ", ".join(f"{part.replace('_', ' ')} {self.last[f'{part}_ms']:.1f}" for part in PARTS)
        shown = f"loss {values['loss']:.4f}, {self.last['images_per_second']:.0f} images/s, "
        shown += f"{self.last['step_ms']:.1f} ms a step ({parts})"
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
