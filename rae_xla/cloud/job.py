"""A job: what is to run on which slices, as a folder in a bucket that says all of it and where it stands.

ROOT/jobs/NAME/
  job.json              what was asked for; written once
  recipe.yaml           the resolved recipe
  state.json            the supervisor's: which slice, which attempt, how it ended
  stop.json             somebody wants it to end
  supervisor.json       who watches, and when it last did
  workers/NODE-wN/      a machine: heartbeat.json, and of each attempt its log in pieces and exit.json
ROOT/code/SHA256.tar.gz the code, shared by all jobs that run it
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from rae_xla import storage
from rae_xla.config import Config
from rae_xla.errors import StoppedError, UserError, first_line
from rae_xla.topologies import Topology, topology

# Names of nodes have 63 characters at most; ours add the generation and the slice.
LONGEST_NAME = 50
JOBS, CODE = "jobs", "code"
SPEC, RECIPE, STATE, STOP, WATCH = "job.json", "recipe.yaml", "state.json", "stop.json", "supervisor.json"
Outcome = Literal["succeeded", "failed", "stopped"]


class CloudConfig(Config):
    """Where a recipe's jobs run, if the command does not say. ``service_account``: whose rights the machines have.

    ``runtime_version``: of the machines' image; ``null`` for the generation's own.
    """

    project: str | None = None
    zone: str | None = None
    accelerator: str | None = None
    runtime_version: str | None = None
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    internal_ips: bool = False


class Limits(Config):
    """When a supervisor gives up, and when it takes a machine for lost.

    ``max_crashes`` counts those in a row between which no checkpoint was added. ``start_minutes``: from a slice that
    is there to the first heartbeat of all its machines. ``silent_minutes``: no machine has written a line, which
    includes compiling.
    """

    max_preemptions: int = Field(default=1000, ge=0)
    max_crashes: int = Field(default=3, ge=0)
    start_minutes: float = Field(default=30.0, gt=0)
    lost_minutes: float = Field(default=10.0, gt=0)
    silent_minutes: float = Field(default=90.0, gt=0)
    settle_minutes: float = Field(default=2.0, gt=0)
    """What is left to the other machines, and to Cloud to say why, after the first has ended."""
    save_minutes: float = Field(default=5.0, ge=0)
    """What is left to machines that are asked to stop."""
    no_capacity_minutes: float = Field(default=10.0, ge=0)
    """Between requests that were refused for want of capacity."""
    unwatched_minutes: float = Field(default=30.0, gt=0)
    """After its command has ended and nobody has watched for so long a machine gives its slices back itself."""
    look_seconds: float = Field(default=15.0, gt=0)
    """Between two looks, of the supervisor at everything and of the machines at what they are to do."""


class JobSpec(Config):
    """What was asked for. ``arguments``: of Python on each machine, ``{recipe}`` in place of the recipe's path there.

    ``package`` is the URL of the code. ``environment`` goes to the process, not to the log.
    """

    name: str
    project: str
    zone: str
    accelerator: str
    num_slices: int = Field(default=1, ge=1)
    runtime_version: str
    spot: bool = False
    reserved: bool = False
    service_account: str | None = None
    network: str | None = None
    subnetwork: str | None = None
    internal_ips: bool = False
    arguments: tuple[str, ...] = Field(strict=False)
    run_dir: str | None = None
    package: str
    commit: str
    environment: dict[str, str] = Field(default_factory=dict)
    limits: Limits = Limits()
    created: float
    """Seconds since 1970, as all times here."""

    @property
    def topology(self) -> Topology:
        """The slices."""
        prefix = f"{self.num_slices}x" if self.num_slices > 1 else ""
        return topology(prefix + self.accelerator, "--accelerator")

    def command(self, recipe: str) -> list[str]:
        """Arguments of Python for an attempt: the inputs are looked for, and then the tool takes the chips."""
        arguments = [recipe if argument == "{recipe}" else argument for argument in self.arguments]
        return ["-m", "rae_xla.cloud.checked", recipe, *arguments]

    def resource(self, generation: int) -> str:
        """The name of the queued resource; a slice that was taken away is asked for again by another one."""
        return f"{self.name}-g{generation}"

    def generation(self, resource: str) -> int | None:
        """Which of this job's a queued resource is; ``None`` if it is not this job's."""
        found = re.fullmatch(rf"{re.escape(self.name)}-g(\d+)", resource)
        return int(found[1]) if found else None

    def nodes(self, generation: int) -> list[str]:
        """The names of its slices; of several, Cloud numbers them."""
        name = self.resource(generation)
        return [name] if self.num_slices == 1 else [f"{name}-{index}" for index in range(self.num_slices)]

    def workers(self, generation: int) -> list[str]:
        """The names of its machines, in order."""
        return [
            # As ``start.sh`` makes it of a machine's metadata.
            f"{node}-w{index}"
            for node in self.nodes(generation)
            for index in range(self.topology.hosts_per_slice)
        ]


class Event(Config):
    """Something that happened to a job."""

    time: float
    text: str


class State(Config):
    """Where a job stands. Only the supervisor writes it; machines do what it says.

    ``generation`` counts the slices asked for, ``attempt`` the starts. ``seen_active``: when the slice was first seen
    ready; ``began``: the present attempt. ``not_before``: no slice is asked for until then. ``progress``: the newest
    checkpoint at the last crash.
    """

    generation: int = 1
    attempt: int = 1
    preemptions: int = 0
    crashes: int = 0
    seen_active: float | None = None
    began: float = 0.0
    not_before: float = 0.0
    progress: str | None = None
    outcome: Outcome | None = None
    reason: str | None = None
    exit_code: int | None = None
    """What its supervisor exits with."""
    ended: float | None = None
    chip_hours: float = 0.0
    """Of slices that are gone, from when they were first seen ready."""
    events: tuple[Event, ...] = Field(default=(), strict=False)


class JobFiles:
    """Paths in a job's folder, and its small files."""

    def __init__(self, root: str, name: str) -> None:
        self.root, self.name = root, name
        self.directory = storage.join(root, JOBS, name)

    @classmethod
    def at(cls, directory: str) -> JobFiles:
        """By the folder's own URL."""
        jobs, _, name = directory.rstrip("/").rpartition("/")
        return cls(jobs.rpartition("/")[0], name)

    def path(self, *names: str) -> str:
        """Of a file in the folder."""
        return storage.join(self.directory, *names)

    def read(self, name: str) -> Any:
        """A JSON file's content; ``None`` if it is not there.

        Raises:
            StoppedError: nobody can say.
        """
        try:
            return storage.read_json(self.path(name))
        except FileNotFoundError:
            return None
        # What stores and the libraries below raise has no common base.
        except Exception as error:
            raise StoppedError(
                f"{self.path(name)} cannot be read ({first_line(error)}); try again when it can"
            ) from error

    def spec(self) -> JobSpec:
        """Raises a `UserError` if there is no such job."""
        content = self.read(SPEC)
        if content is None:
            raise UserError(f"{self.name}: no such job in {self.root}; tools/tpu.py list shows them")
        return JobSpec.model_validate(content)

    def state(self) -> State:
        """Where it stands; the first state until there is one."""
        content = self.read(STATE)
        return State() if content is None else State.model_validate(content)

    def write_state(self, state: State) -> None:
        """Whole or not at all."""
        storage.write_json(self.path(STATE), state.model_dump(mode="json"))

    def worker(self, worker: str, *names: str) -> str:
        """Of a file of a machine's."""
        return self.path("workers", worker, *names)

    def attempt(self, worker: str, attempt: int, *names: str) -> str:
        """Of a file of a machine's attempt."""
        return self.worker(worker, f"attempt-{attempt:03d}", *names)


def check_name(name: str) -> None:
    """Raises a `UserError` if Cloud would not take it, or it could be another job's slice."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"--name: {name!r}: Cloud takes small letters, digits and hyphens, a letter first, here "
            f"{LONGEST_NAME} at most"
        )
    if re.search(r"-g\d+$", name):
        raise UserError(f"--name: {name!r} ends as the names of slices do; leave {name.rpartition('-')[2]} out")
