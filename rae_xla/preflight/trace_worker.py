"""Traces programs of recipes, in a process of its own: torch_xla starts with tracing in mind.

``python -m rae_xla.preflight.trace_worker JOB ...``: each JOB is a folder with ``job.json``, which gets ``traced.json``
and ``program.pb``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rae_xla.errors import UserError

USER_ERROR = 2


def main(directory: Path) -> None:
    """Trace, and write what was found."""
    from rae_xla.preflight.calibration import traced_calibration
    from rae_xla.preflight.programs import traced
    from rae_xla.recipe import load_recipe

    job = json.loads((directory / "job.json").read_text())
    start = time.perf_counter()
    if job["recipe"] is None:
        program = traced_calibration(job["program"], job["grid"])
    else:
        program = traced(load_recipe(job["recipe"], job["overrides"]), job["program"], job["grid"])
    seconds = time.perf_counter() - start
    (directory / "program.pb").write_bytes(program.hlo)
    about = {
        "name": program.name,
        "arguments": [asdict(argument) for argument in program.arguments],
        "num_images": program.num_images,
        "mesh": program.mesh,
        "seconds": seconds,
    }
    (directory / "traced.json").write_text(json.dumps(about))


if __name__ == "__main__":
    try:
        for argument in sys.argv[1:]:
            main(Path(argument))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(USER_ERROR)
