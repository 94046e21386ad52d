"""Jobs on Cloud TPU: commands, decisions in any order of failures, and a supervisor that dies at every point."""

from __future__ import annotations

import json
import random
import subprocess
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ServerDisconnectedError
from fake_cloud import FakeCloud
from gcsfs.retry import HttpError

from rae_xla import storage
from rae_xla.cloud import commands, supervisor, watching
from rae_xla.cloud import gcloud as gcloud_module
from rae_xla.cloud.gcloud import Gcloud
from rae_xla.cloud.job import JobFiles, JobSpec, Limits, State
from rae_xla.cloud.supervisor import Supervisor

SPEC = JobSpec(
    name="run",
    project="p",
    zone="us-east5-b",
    accelerator="v6e-16",
    runtime_version="v2-alpha-tpuv6e",
    spot=True,
    arguments=("tools/train.py", "{recipe}"),
    run_dir=None,
    package="gs://b/p/code/abc.tar.gz",
    commit="abc",
    limits=Limits(
        max_preemptions=50, max_crashes=3, start_minutes=30, lost_minutes=10, silent_minutes=90, look_seconds=30
    ),
    created=0.0,
)


class KilledError(BaseException):
    """What a supervisor does not catch."""


@dataclass
class World:
    """A cloud, machines that write what workers write, and a clock that stands still but for sleeping.

    ``attempts``: how the job's command ends, by the attempt: ``done``, ``crash``, ``hang``, ``told`` (to end, the slice
    stays), ``restart`` (of a machine) or ``mistake``; the last one's for all that follow. ``die_at``: the effect, a
    write or a command, before or after which the supervisor dies.
    """

    cloud: FakeCloud
    files: JobFiles
    attempts: list[str]
    now: float = 1e6
    effects: int = 0
    die_at: set[int] = field(default_factory=set)
    looks: dict[tuple[str, int], int] = field(default_factory=dict)
    machines_write: bool = False

    def effect(self) -> None:
        """Something outside the supervisor is about to change, or has changed."""
        if self.machines_write:
            return
        self.effects += 1
        if self.effects in self.die_at:
            raise KilledError

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """In place of ``subprocess.run``."""
        self.effect()
        arguments = [one for one in command[1:] if one not in ("--format=json", "--quiet")]
        code, output, errors = self.cloud.handle(arguments)
        self.effect()
        return subprocess.CompletedProcess(command, code, output, errors)

    def sleep(self, seconds: float) -> None:
        """In place of ``time.sleep``: machines go on."""
        self.now += seconds
        assert self.now < 1e6 + 40 * 24 * 3600, "the job does not end"
        state = self.files.state()
        self.machines_write = True
        for worker in SPEC.workers(state.generation):
            row = self.cloud.slices.get(SPEC.resource(state.generation))
            if row is not None and self.cloud.is_up(SPEC.resource(state.generation)) and row["fate"] != "never_heard":
                self._machine(worker, state, down=row["fate"] == "one_down")
        self.machines_write = False

    def _machine(self, worker: str, state: State, *, down: bool) -> None:
        looks = self.looks[worker, state.attempt] = self.looks.get((worker, state.attempt), 0) + 1
        first = worker.endswith("w0")
        if down and first and looks > 3:
            return
        fate = self.attempts[min(state.attempt - 1, len(self.attempts) - 1)]
        stopped = state.outcome is not None
        began = self.now - SPEC.limits.look_seconds * looks
        heartbeat = {
            "time": self.now,
            "attempt": state.attempt,
            "running": True,
            "last_output": began if fate == "hang" else self.now,
        }
        storage.write_json(self.files.worker(worker, "heartbeat.json"), heartbeat)
        path = self.files.attempt(worker, state.attempt, "exit.json")
        code = {"done": 0, "crash": 1 if first else None, "told": 75, "mistake": 2}.get(fate)
        ends = code is not None or (fate == "restart" and first)
        if (stopped or (ends and looks > 5)) and not storage.exists(path):
            said = 75 if stopped and not ends else code
            storage.write_json(path, {"code": said, "time": self.now, "last_lines": ["...", fate, ""]})


def _job() -> JobFiles:
    """In memory; a folder of its own."""
    made = JobFiles(f"memory://cloud/{uuid.uuid4().hex}", SPEC.name)
    storage.write_json(made.path("job.json"), SPEC.model_dump(mode="json"))
    return made


@pytest.fixture
def files() -> JobFiles:
    return _job()


def _world(
    monkeypatch: pytest.MonkeyPatch,
    files: JobFiles,
    cloud: FakeCloud,
    attempts: list[str],
    die_at: Iterable[int] = (),
) -> World:
    world = World(cloud, files, attempts, die_at=set(die_at))
    monkeypatch.setattr(gcloud_module.subprocess, "run", world.run)
    for module in (supervisor, commands):
        monkeypatch.setattr(module.time, "time", lambda: world.now)
        monkeypatch.setattr(module.time, "sleep", world.sleep)
    plain = storage.write_bytes

    def write_bytes(path: str, content: bytes) -> None:
        world.effect()
        plain(path, content)
        world.effect()

    monkeypatch.setattr(storage, "write_text", lambda path, content: write_bytes(path, content.encode()))
    return world


def _watch(files: JobFiles, world: World) -> State:
    """A supervisor, and another one each time that one dies; the dead one's watch runs out meanwhile."""
    while True:
        try:
            return Supervisor(files, SPEC, Gcloud(SPEC.project, SPEC.zone)).watch()
        except KilledError:
            pass


def _counts(state: State) -> tuple[Any, ...]:
    return state.outcome, state.generation, state.attempt, state.preemptions, state.crashes


def test_a_job_goes_through_every_failure_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, files: JobFiles) -> None:
    cloud = FakeCloud(
        fates=["refused_capacity", "stock_out", "preempted:4", "never_heard", "ok"], waits=40, unavailable_every=7
    )
    world = _world(monkeypatch, files, cloud, ["hang", "hang", "crash", "told", "restart", "done"])
    state = _watch(files, world)
    # Attempt 1 is cut off by preemption, 2 is on machines that are never heard of, 3 crashes, and so on.
    assert state.outcome == "succeeded"
    assert (state.preemptions, state.crashes) == (3, 2)
    assert cloud.slices == {} and cloud.most_at_once == 1
    told = [event.text for event in state.events]
    for part in ("no slice", "no more capacity", "SUSPEND", "not heard of", "ended with 1", "told to end", "succeeded"):
        assert any(part in text for text in told), (part, told)
    assert state.chip_hours > 0


def test_a_supervisor_may_die_before_and_after_everything_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects of a whole life are points to die at, before and after them; what comes out is as if nothing had been."""

    def live(die_at: set[int]) -> tuple[World, State]:
        files = _job()
        with monkeypatch.context() as patched:
            cloud = FakeCloud(fates=["preempted:4", "stock_out", "ok"])
            world = _world(patched, files, cloud, ["hang", "crash", "told", "done"], die_at)
            return world, _watch(files, world)

    undisturbed, expected = live(set())
    assert _counts(expected) == ("succeeded", 3, 4, 2, 1)
    assert undisturbed.effects > 100
    for point in range(1, undisturbed.effects + 1, 3):
        world, state = live({point})
        assert _counts(state) == _counts(expected), point
        assert world.cloud.slices == {} and world.cloud.most_at_once == 1, point
        assert world.cloud.made == undisturbed.cloud.made, point
    # And twenty deaths in one life.
    points = set(random.Random(0).sample(range(1, undisturbed.effects), 20))
    world, state = live(points)
    assert _counts(state) == _counts(expected)
    assert world.cloud.slices == {}


def _break_looks(monkeypatch: pytest.MonkeyPatch, drawn: random.Random) -> None:
    """Now and then what stores and networks raise."""
    plain = supervisor.look

    def look(*arguments: Any) -> Any:
        if drawn.random() < 0.2:
            raise drawn.choice(
                [
                    HttpError({"code": 503, "message": "away"}),
                    ServerDisconnectedError(),
                    json.JSONDecodeError("", "", 0),
                ]
            )
        return plain(*arguments)

    monkeypatch.setattr(supervisor, "look", look)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_left_in_any_order_of_failures(monkeypatch: pytest.MonkeyPatch, files: JobFiles, seed: int) -> None:
    drawn = random.Random(seed)
    fates = [
        drawn.choice(["stock_out", "refused_capacity", "preempted:3", "never_heard", "one_down", "ok"])
        for _ in range(4)
    ]
    ends = [drawn.choice(["crash", "hang", "told", "restart", "done", "mistake"]) for _ in range(6)]
    cloud = FakeCloud(fates=[*fates, "ok"], waits=drawn.randrange(6), unavailable_every=drawn.choice([0, 3, 5]))
    cloud.partial_every = drawn.choice([0, 3, 4])
    world = _world(monkeypatch, files, cloud, [*ends, "done"], {drawn.randrange(1, 200) for _ in range(10)})
    _break_looks(monkeypatch, drawn)
    state = _watch(files, world)
    assert cloud.slices == {}
    assert cloud.most_at_once == 1
    assert state.crashes <= SPEC.limits.max_crashes
    assert state.exit_code == {"mistake": 2, "succeeded": 0}.get(
        "mistake" if state.reason == "mistake" else str(state.outcome), 1
    )
    if state.outcome == "failed":
        assert state.reason == "mistake" or "crash 4" in str(state.reason)
    assert not storage.exists(files.path("supervisor.json"))


def test_a_refusal_that_waiting_does_not_mend_ends_the_job(monkeypatch: pytest.MonkeyPatch, files: JobFiles) -> None:
    world = _world(monkeypatch, files, FakeCloud(fates=["quota"]), ["done"])
    state = _watch(files, world)
    assert (state.outcome, state.exit_code) == ("failed", 2)
    assert "TPUV6EPreemptiblePerProjectPerZoneForTPUAPI" in str(state.reason)


def test_crashes_are_counted_from_the_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, files: JobFiles, tmp_path: Path
) -> None:
    world = _world(monkeypatch, files, FakeCloud(), ["crash"])
    state = _watch(files, world)
    assert (state.outcome, state.exit_code, state.attempt) == ("failed", 1, 4)
    assert "w0 ended with 1: crash" in str(state.reason)
    # With a checkpoint after each crash there is no end to patience.
    again = _job()
    spec = SPEC.model_copy(update={"run_dir": str(tmp_path / "out")})
    storage.write_json(again.path("job.json"), spec.model_dump(mode="json"))
    world = _world(monkeypatch, again, FakeCloud(), ["crash"] * 12 + ["done"])
    plain = world.sleep

    def sleep(seconds: float) -> None:
        plain(seconds)
        (tmp_path / "out" / "checkpoints" / f"step_{again.state().attempt:08d}").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(supervisor.time, "sleep", sleep)
    state = Supervisor(again, spec, Gcloud("p", "z")).watch()
    assert (state.outcome, state.attempt) == ("succeeded", 13)


def test_a_stopped_job_saves_itself_and_can_be_begun_again(monkeypatch: pytest.MonkeyPatch, files: JobFiles) -> None:
    cloud = FakeCloud()
    world = _world(monkeypatch, files, cloud, ["hang", "done"])
    plain, slept = world.sleep, []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) in (10, 14):
            raise KeyboardInterrupt
        plain(seconds)

    monkeypatch.setattr(supervisor.time, "sleep", sleep)
    state = Supervisor(files, SPEC, Gcloud("p", "z")).run()
    assert (state.outcome, state.exit_code) == ("stopped", 75)
    ended = storage.read_json(files.attempt(SPEC.workers(1)[0], 1, "exit.json"))
    assert ended["code"] == 75 and cloud.slices == {}
    monkeypatch.setattr(supervisor.time, "sleep", plain)
    assert commands.watch(files).outcome == "stopped"
    state = commands.watch(files, again=True)
    assert _counts(state) == ("succeeded", 2, 2, 0, 0)
    assert cloud.slices == {}
    # And once more it says how it ended, and asks for nothing.
    made = cloud.made
    assert commands.watch(files, again=True).outcome == "succeeded"
    assert cloud.made == made


def test_what_ended_while_nobody_watched_is_not_done_again(monkeypatch: pytest.MonkeyPatch, files: JobFiles) -> None:
    """The slice is gone since, and the job has succeeded."""
    world = _world(monkeypatch, files, FakeCloud(), ["done"])
    for worker in SPEC.workers(1):
        ended = {"code": 0, "time": world.now, "last_lines": ["done"]}
        storage.write_json(files.attempt(worker, 1, "exit.json"), ended)
    assert _counts(_watch(files, world)) == ("succeeded", 1, 1, 0, 0)
    assert world.cloud.made == 0


def test_one_supervisor_at_a_time(monkeypatch: pytest.MonkeyPatch, files: JobFiles) -> None:
    """Another's watch is taken over when it is not renewed, and not before."""
    world = _world(monkeypatch, files, FakeCloud(), ["done"])
    watch = {"who": "there:1:2", "time": world.now - 20}
    storage.write_json(files.path("supervisor.json"), watch)
    plain, begun = world.sleep, world.now

    def sleep(seconds: float) -> None:
        plain(seconds)
        if renews:
            storage.write_json(files.path("supervisor.json"), {**watch, "time": world.now})

    monkeypatch.setattr(supervisor.time, "sleep", sleep)
    renews = True
    with pytest.raises(supervisor.WatchedError, match="there:1:2 watches it"):
        Supervisor(files, SPEC, Gcloud("p", "z")).watch()
    assert world.cloud.asked == []
    renews = False
    assert Supervisor(files, SPEC, Gcloud("p", "z")).watch().outcome == "succeeded"
    assert world.now - begun > supervisor.ABANDONED_LOOKS * SPEC.limits.look_seconds


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("PERMISSION_DENIED: no. This command is authenticated as a@b which is the active account", "refused"),
        ("NOT_FOUND: x. This command is authenticated as a@b which is the active account", "not_found"),
        ("There was a problem refreshing your current auth tokens: Unable to find the server", "transient"),
        ("RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Write requests' and limit per minute", "transient"),
        ("RESOURCE_EXHAUSTED: Quota limit 'X' has been exceeded", "quota"),
        ("unrecognized arguments: --internal-ip", "refused"),
        ("INTERNAL: something", "transient"),
        ("Reauthentication failed. Please run: gcloud auth login", "logged_out"),
        ("RESOURCE_EXHAUSTED: no", "capacity"),
    ],
)
def test_what_gcloud_means(said: str, kind: str) -> None:
    assert gcloud_module.kind_of(said) == kind


def test_what_cannot_be_read_is_not_taken_for_absent(monkeypatch: pytest.MonkeyPatch, files: JobFiles) -> None:
    filesystem, _ = storage.open_filesystem(files.directory)
    heartbeat = files.worker(SPEC.workers(1)[0], "heartbeat.json")
    storage.write_json(heartbeat, {"time": 1.0, "attempt": 1, "last_output": 2.0})
    first = watching.machines_of(files, SPEC, State())[0]
    assert (first.heard, first.last_output, first.ended) == (1.0, 2.0, None)
    plain = filesystem.cat_file

    def cat_file(path: str, **kwargs: Any) -> bytes:
        if path.endswith("heartbeat.json"):
            raise HttpError({"code": 503, "message": "away"})
        return plain(path, **kwargs)

    monkeypatch.setattr(filesystem, "cat_file", cat_file)
    with pytest.raises(HttpError):
        watching.machines_of(files, SPEC, State())


def test_state_survives_json(files: JobFiles) -> None:
    state = State(generation=3, progress="step_1", outcome="failed", reason="x", exit_code=2)
    files.write_state(state)
    assert files.state() == state
    assert files.spec() == SPEC
