"""A profiler trace of chosen steps, in ``RUN/profile``, for TensorBoard's profile plugin or ui.perfetto.dev."""

from __future__ import annotations

import logging
import os
import tempfile

from pydantic import Field, model_validator

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.runtime import Runtime

logger = logging.getLogger(__name__)


class ProfileConfig(Config):
    """``steps``: the first and the last step to trace; a few are enough. The first of a run also compiles."""

    steps: tuple[int, int] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _in_order(self) -> ProfileConfig:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps are a first and a last one, counted from 1, got {list(self.steps)}")
        return self


class StepProfiler:
    """Starts and stops the runtime's trace around the steps of a `ProfileConfig`."""

    def __init__(self, config: ProfileConfig, run_dir: str, runtime: Runtime) -> None:
        self._steps = config.steps
        self._target = storage.join(run_dir, "profile")
        self._runtime = runtime
        # The profiler writes to this machine only, and the run may be in a bucket.
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._first: int | None = None

    def before(self, step: int) -> None:
        """To be called before a step is started."""
        if self._local is None and self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            self._first = step
            self._local = tempfile.TemporaryDirectory()
            self._runtime.start_trace(self._local.name)

    def after(self, step: int) -> None:
        """To be called after a step was started."""
        if self._local is not None and self._steps is not None and step == self._steps[1]:
            self._write(step)

    def close(self, step: int) -> None:
        """To be called after the last step of the run."""
        if self._local is not None:
            self._write(step)
        elif self._steps is not None and self._first is None:
            logger.warning("profile.steps: no step of %d to %d was run, nothing was traced", *self._steps)

    def _write(self, last: int) -> None:
        assert self._local is not None
        self._runtime.stop_trace()
        with self._local as local:
            for folder, _, names in os.walk(local):
                for name in names:
                    path = os.path.join(folder, name)
                    target = storage.join(self._target, *os.path.relpath(path, local).split(os.sep))
                    storage.write_bytes(target, storage.read_bytes(path))
        self._local = None
        logger.info("traced steps %d to %d into %s", self._first, last, self._target)
