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

from rae_xla.compiler_flags import VARIABLE, flags_of_torch_xla, our_flags, with_flags
from rae_xla.errors import UserError
from rae_xla.preflight.estimate import Estimate, Estimator
from rae_xla.preflight.hlo import Module
from rae_xla.preflight.trace_worker import USER_ERROR
from rae_xla.topologies import Topology

logger = logging.getLogger(__name__)

# Of what the workers leave: an older cache is not read.
FORMAT = 4
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
    quick: bool = False
    """Compiled with the least effort: what does not change is how arrays are split over the chips."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.program} on {self.topology.name}"

    @property
    def for_workers(self) -> dict[str, Any]:
        """What ``job.json`` holds."""
        name, options = self.topology.for_compiler
        return {
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "program": self.program,
            "topology": name,
            "topology_options": options,
            # Between slices there is none.
            "grid": self.topology.shape if self.topology.num_slices == 1 else [self.topology.num_chips],
            "quick": self.quick,
        }


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


def compile_all(groups: list[list[Job]], cache: Path, num_workers: int) -> list[Compiled]:
    """Trace and compile, so many groups at once, or take what is in ``cache`` of the same program; in the jobs' order.

    Jobs of a group are for one slice. They share their processes, whose start takes longer than to trace and compile a
    small program.

    Raises:
        UserError: the recipe does not fit a slice, or the compiler is missing.
    """
    check_compiler()
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(_compiled, group, cache) for group in groups]
        try:
            for done in as_completed(futures):
                done.result()
        except BaseException:
            # One mistake is enough to know.
            pool.shutdown(cancel_futures=True)
            raise
        return [compiled for future in futures for compiled in future.result()]


def _compiled(group: list[Job], cache: Path) -> list[Compiled]:
    title = ", ".join(job.title for job in group)
    with tempfile.TemporaryDirectory() as folder:
        directories = [Path(folder, str(number)) for number in range(len(group))]
        for job, directory in zip(group, directories, strict=True):
            directory.mkdir()
            (directory / "job.json").write_text(json.dumps(job.for_workers))
        logger.info("%s: tracing", title)
        _run_worker("rae_xla.preflight.trace_worker", directories, {**os.environ, **TRACING}, title)
        traced = [json.loads((directory / "traced.json").read_text()) for directory in directories]
        [generation] = {job.topology.generation for job in group}
        flags = with_flags(os.environ.get(VARIABLE, ""), (*flags_of_torch_xla(generation), *our_flags(generation)))
        kept = [cache / _key(directory, flags) for directory in directories]
        new = {place: directory for place, directory in zip(kept, directories, strict=True) if not _is_kept(place)}
        seconds = sum(found["seconds"] for found in traced)
        if new:
            logger.info("%s: traced in %.0f s; compiling, which takes minutes", title, seconds)
            _run_worker("rae_xla.xla.tpu_compiler", list(new.values()), {**os.environ, VARIABLE: flags}, title)
        else:
            logger.info("%s: compiled before", title)
        for place, directory in new.items():
            _keep(directory, place)
    compiled = [json.loads((place / "compiled.json").read_text()) for place in kept]
    logger.info("%s: compiled in %.0f s", title, sum(found["seconds"] for found in compiled))
    return [Compiled(*found) for found in zip(group, kept, traced, compiled, strict=True)]


def _is_kept(place: Path) -> bool:
    return (place / "compiled.json").exists()


def _keep(directory: Path, kept: Path) -> None:
    """Copy a folder into the cache: all of it or nothing, and what another process has put there stays."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=kept.parent))
    try:
        shutil.copytree(directory, partial, dirs_exist_ok=True)
        partial.rename(kept)
    except OSError:
        if not _is_kept(kept):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _key(directory: Path, flags: str) -> str:
    """Of all that decides what the compiler makes: the program, where it is to run, how, and by which compiler."""
    job, traced = [json.loads((directory / name).read_text()) for name in ("job.json", "traced.json")]
    settings = [job["topology"], job["topology_options"], job["quick"]]
    versions = [FORMAT, *[metadata.version(name) for name in ("libtpu", "jaxlib")]]
    all_flags = [flags, os.environ.get("XLA_FLAGS", "")]
    content = json.dumps([traced["arguments"], settings, versions, all_flags], sort_keys=True).encode()
    return hashlib.sha256(content + (directory / "program.pb").read_bytes()).hexdigest()[:32]


def _run_worker(module: str, directories: list[Path], environment: dict[str, str], title: str) -> None:
    command = [sys.executable, "-m", module, *[str(directory) for directory in directories]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == USER_ERROR:
        raise UserError(f"{title}: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode:
        raise RuntimeError(f"{title}: {module} ended with {done.returncode}:\n{done.stderr[-4000:]}")
