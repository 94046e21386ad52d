"""From a recipe and slices to what its programs cost there: each is traced and compiled in processes of their own."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.preflight.estimate import Estimate, Estimator
from rae_xla.preflight.hlo import Module
from rae_xla.preflight.topologies import Topology
from rae_xla.preflight.trace_worker import USER_ERROR

logger = logging.getLogger(__name__)

# Of what the workers leave: an older cache is not read.
FORMAT = 3
DEFAULT_CACHE = Path.home() / ".cache" / "rae_xla" / "preflight"
# The names of operations are kept only if this is set before torch_xla starts.
TRACING = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "XLA_HLO_DEBUG": "1"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program of a recipe on a slice; without a recipe, one of `CALIBRATIONS`."""

    recipe: str | None
    overrides: tuple[str, ...] = ()
    program: str
    topology: Topology

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.program} on {self.topology.name}"


@dataclass(frozen=True)
class Compiled:
    """What the workers left in a folder."""

    job: Job
    directory: Path
    traced: dict[str, Any]
    compiled: dict[str, Any]

    @property
    def refusal(self) -> str | None:
        """What the compiler says of a program that does not fit; none if it does."""
        return self.compiled.get("too_large")

    @property
    def hlo_file(self) -> Path:
        """The compiled program's text, if it fits."""
        return self.directory / "compiled.hlo"

    @cached_property
    def module(self) -> Module:
        """The compiled program."""
        return Module(self.hlo_file.read_text())

    @cached_property
    def estimate(self) -> Estimate:
        """How long it takes."""
        places, mesh = self.compiled["coordinates"], self.traced["mesh"]
        return Estimator(self.module, self.job.topology, places, mesh).estimate()


def check_compiler() -> None:
    """Raises a `UserError` that says how to install the compiler if it is missing."""
    missing = [name for name in ("jax", "libtpu") if util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: the TPU's compiler comes with pip install 'rae_xla[preflight]'"
        )


def compile_all(jobs: list[Job], cache: Path, num_workers: int) -> list[Compiled]:
    """Trace and compile, so many at once, or take what is in ``cache`` of the same program; in the order of ``jobs``.

    Raises:
        UserError: the recipe does not fit a slice, or the compiler is missing.
    """
    check_compiler()
    with ThreadPoolExecutor(num_workers) as pool:
        futures = {job: pool.submit(_compiled, job, cache) for job in jobs}
        try:
            for done in as_completed(futures.values()):
                done.result()
        except BaseException:
            # One mistake is enough to know.
            pool.shutdown(cancel_futures=True)
            raise
        return [futures[job].result() for job in jobs]


def _compiled(job: Job, cache: Path) -> Compiled:
    name, options = job.topology.for_compiler
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        about = {
            "recipe": job.recipe,
            "overrides": list(job.overrides),
            "program": job.program,
            "topology": name,
            "topology_options": options,
            "num_chips": job.topology.num_chips,
        }
        (directory / "job.json").write_text(json.dumps(about))
        logger.info("%s: tracing", job.title)
        environment = {**os.environ, **TRACING}
        _run_worker("rae_xla.preflight.trace_worker", directory, environment, job)
        traced = json.loads((directory / "traced.json").read_text())
        kept = cache / _key(directory, traced, name, options)
        if (kept / "compiled.json").exists():
            logger.info("%s: compiled before", job.title)
        else:
            logger.info("%s: traced in %.0f s; compiling, which takes minutes", job.title, traced["seconds"])
            _run_worker("rae_xla.xla.tpu_compiler", directory, dict(os.environ), job)
            kept.parent.mkdir(parents=True, exist_ok=True)
            _keep(directory, kept)
        compiled = json.loads((kept / "compiled.json").read_text())
        logger.info("%s: compiled in %.0f s", job.title, compiled["seconds"])
        return Compiled(job, kept, traced, compiled)


def _keep(directory: Path, kept: Path) -> None:
    """Copy a folder into the cache: all of it or nothing, and what another process has put there stays."""
    partial = Path(tempfile.mkdtemp(dir=kept.parent))
    try:
        shutil.copytree(directory, partial, dirs_exist_ok=True)
        partial.rename(kept)
    except OSError:
        if not (kept / "compiled.json").exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _key(directory: Path, traced: dict[str, Any], topology: str, options: dict[str, object]) -> str:
    versions = [FORMAT, *[metadata.version(name) for name in ("libtpu", "jaxlib")]]
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    content = json.dumps([traced["arguments"], topology, options, versions, flags], sort_keys=True).encode()
    return hashlib.sha256(content + (directory / "program.pb").read_bytes()).hexdigest()[:32]


def _run_worker(module: str, directory: Path, environment: dict[str, str], job: Job) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, str(directory)], env=environment, capture_output=True, text=True
    )
    if done.returncode == USER_ERROR:
        raise UserError(f"{job.title}: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode:
        raise RuntimeError(f"{job.title}: {module} ended with {done.returncode}:\n{done.stderr[-4000:]}")
