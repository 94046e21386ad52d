"""What can be seen of a job: its slices by gcloud, its machines by what they write into its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rae_xla import storage
from rae_xla.cloud.gcloud import Gcloud, names_of
from rae_xla.cloud.job import STOP, JobFiles, JobSpec, State
from rae_xla.cloud.queued import described_slice, listed_slices


@dataclass(frozen=True)
class Slice:
    """A queued resource. ``state`` in Cloud's words, ``said`` what it says of a failure."""

    generation: int
    state: str
    said: str = ""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended on a machine. ``code`` is ``None`` if the machine was restarted meanwhile."""

    code: int | None
    time: float
    said: str


@dataclass(frozen=True)
class Machine:
    """``heard``: when it last wrote anything. ``setup_failed``: why its command cannot be started."""

    name: str
    heard: float | None = None
    last_output: float | None = None
    setup_failed: str | None = None
    ended: Ended | None = None


@dataclass(frozen=True)
class Seen:
    """All that a decision is made by. ``progress``: the newest checkpoint of the run."""

    now: float
    slices: tuple[Slice, ...] = ()
    machines: tuple[Machine, ...] = ()
    stop: bool = False
    progress: str | None = None

    def slice(self, generation: int) -> Slice | None:
        """The one of this generation, if there is one."""
        return next((one for one in self.slices if one.generation == generation), None)


def look(files: JobFiles, spec: JobSpec, state: State, gcloud: Gcloud, now: float) -> Seen:
    """Raises GcloudError and StoppedError where nobody can say."""
    slices = slices_of(spec, gcloud)
    if state.generation not in [one.generation for one in slices]:
        # A list may come without what could not be reached; only who is asked for by name and not found is gone.
        asked = {generation: described_slice(spec, generation, gcloud) for generation in _last_known(state, slices)}
        slices += [_slice(generation, row) for generation, row in asked.items() if row is not None]
    return Seen(
        now=now,
        slices=tuple(slices),
        machines=tuple(machines_of(files, spec, state)),
        stop=files.read(STOP) is not None,
        progress=newest_checkpoint(spec),
    )


def slices_of(spec: JobSpec, gcloud: Gcloud) -> list[Slice]:
    """The job's, of all generations that there still are."""
    rows = listed_slices(gcloud)
    found = []
    for row, name in zip(rows, names_of(rows), strict=True):
        generation = spec.generation(name)
        if generation is not None:
            found.append(_slice(generation, row))
    return found


def _last_known(state: State, slices: list[Slice]) -> list[int]:
    """What may be there although it was not listed, and on which it depends whether another is made or all is done."""
    present = [state.generation] if state.seen_active is not None or state.outcome is not None else []
    before = [state.generation - 1] if state.generation > 1 else []
    return [one for one in (*before, *present) if one not in [row.generation for row in slices]]


def _slice(generation: int, row: dict[str, Any]) -> Slice:
    state = row.get("state") or {}
    return Slice(generation, state.get("state", "STATE_UNSPECIFIED"), _said(state))


def _said(state: dict[str, Any]) -> str:
    """A failed request's own words: its state holds an error somewhere below."""
    errors = [part["error"] for part in state.values() if isinstance(part, dict) and "error" in part]
    return " ".join(str(error.get("message", "")) for error in errors).strip()


def machines_of(files: JobFiles, spec: JobSpec, state: State) -> list[Machine]:
    """Of the present slice, and how the present attempt ended on each."""
    names = spec.workers(state.generation)
    paths = {
        (name, what): path
        for name in names
        for what, path in (
            ("setup", files.worker(name, "setup.json")),
            ("heartbeat", files.worker(name, "heartbeat.json")),
            ("exit", files.attempt(name, state.attempt, "exit.json")),
        )
    }
    read = _read_all(paths.values())
    found = []
    for name in names:
        setup, heartbeat, ended = (read.get(paths[name, what], {}) for what in ("setup", "heartbeat", "exit"))
        times = [part["time"] for part in (setup, heartbeat, ended) if part]
        found.append(
            Machine(
                name=name,
                heard=max(times, default=None),
                last_output=heartbeat.get("last_output") if heartbeat.get("attempt") == state.attempt else None,
                setup_failed=setup.get("failed"),
                ended=Ended(ended["code"], ended["time"], _last_line(ended["last_lines"])) if ended else None,
            )
        )
    return found


def _last_line(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _read_all(paths: Iterable[str]) -> dict[str, Any]:
    """Those of some JSON files that are there, read side by side."""
    filesystem, _ = storage.open_filesystem(next(iter(paths)))
    inner = {filesystem._strip_protocol(path): path for path in paths}
    found = filesystem.cat(list(inner), on_error="return")
    # An absent file is no error, and any other is not an absent file.
    for content in found.values():
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            raise content
    return {inner[path]: json.loads(content) for path, content in found.items() if not isinstance(content, Exception)}


def newest_checkpoint(spec: JobSpec) -> str | None:
    """Its name; ``None`` before there is one, or where the job makes none."""
    if spec.run_dir is None:
        return None
    return max(storage.list_names(storage.join(spec.run_dir, "checkpoints")), default=None)
