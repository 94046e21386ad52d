"""A step of the quickstart's diffusion training with its batch left whole on every chip: ``unsplit_batch.py JOB``."""

from __future__ import annotations

import sys
from pathlib import Path

from rae_xla.preflight import trace_worker
from rae_xla.xla.tracing import TracingRuntime

if __name__ == "__main__":
    TracingRuntime.place_batch = TracingRuntime.place_frozen  # type: ignore[method-assign]
    trace_worker.main(Path(sys.argv[1]))
