"""What ``tools/tpu.py`` does, one function for each of its commands."""

from __future__ import annotations

import codecs
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rae_xla import storage
from rae_xla.cloud.deciding import chip_hours, going_on
from rae_xla.cloud.gcloud import INSTALL, Gcloud, GcloudError
from rae_xla.cloud.job import JOBS, SPEC, STOP, WATCH, JobFiles, JobSpec, State
from rae_xla.cloud.jobset import jobset
from rae_xla.cloud.queued import create_slice, delete_slice
from rae_xla.cloud.submitting import Order, check_bucket, check_cloud, prepare, show_submitting
from rae_xla.cloud.supervisor import Supervisor, WatchedError, as_text, request_stop
from rae_xla.cloud.watching import Seen, look, slices_of
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

# Of ssh itself, not of what it runs.
SSH_FAILED = 255
Show = Callable[[str], None] | None


def gcloud_of(spec: JobSpec, show: Show = None) -> Gcloud:
    """For a job's project and zone."""
    return Gcloud(spec.project, spec.zone, show)


def submit(order: Order, show: Show = None, *, ask: bool = True) -> JobFiles:
    """Make a job and, if nobody is going to watch it at once, ``ask`` for its slices. With ``show``, say what is done.

    Raises:
        UserError: anything that is wrong; nothing was made then.
    """
    prepared = prepare(order)
    files, spec = prepared.files, prepared.spec
    gcloud = gcloud_of(spec)
    if show is not None:
        show_submitting(prepared, show)
        return files
    check_cloud(prepared, gcloud)
    prepared.make()
    if not ask:
        return files
    try:
        create_slice(files, spec, 1, gcloud)
    except GcloudError as error:
        if error.kind not in ("quota", "refused"):
            logger.info("%s; whoever watches asks again", error)
            return files
        storage.remove(files.directory)
        raise UserError(str(error)) from error
    logger.info("%s is asked for in %s", spec.resource(1), spec.zone)
    return files


def manifest(
    order: Order, image: str, queue: str | None, service_account: str | None, show: Show = None
) -> dict[str, Any]:
    """A job for a Kubernetes cluster; its code and recipe are written into the bucket, unless it is only shown."""
    prepared = prepare(order)
    if show is None:
        check_bucket(prepared)
        prepared.make()
    return jobset(prepared.files, prepared.spec, image, queue, service_account)


def watch(files: JobFiles, show: Show = None, *, again: bool = False) -> State:
    """Supervise a job to its end. One that has ended is wound up; if it did not succeed, it may be begun ``again``."""
    spec, state = files.spec(), files.state()
    if show is not None:
        _show_watching(files, spec, state, show)
        return state
    supervisor = Supervisor(files, spec, gcloud_of(spec))
    ended = state.outcome
    state = supervisor.run()
    if ended is None or not again:
        return state
    if ended == "succeeded":
        logger.info("%s has succeeded, and is not begun again", spec.name)
        return state
    if files.read(STOP) is not None:
        storage.remove(files.path(STOP))
    files.write_state(going_on(state, time.time()))
    return supervisor.run()


def _show_watching(files: JobFiles, spec: JobSpec, state: State, show: Callable[[str], None]) -> None:
    gcloud = gcloud_of(spec, show)
    show(f"every {spec.limits.look_seconds:g} s:")
    slices_of(spec, gcloud)
    show("while there is no slice:")
    create_slice(files, spec, state.generation, gcloud)
    show("for a slice that was taken away, failed, or is not needed any more:")
    delete_slice(spec, state.generation, gcloud)


def stop(files: JobFiles, *, at_once: bool, show: Show = None) -> State:
    """End a job: its machines save themselves, unless ``at_once``, and everything is given back."""
    spec, state = files.spec(), files.state()
    if show is not None:
        gcloud = gcloud_of(spec, show)
        show(f"write {files.path(STOP)}")
        slices_of(spec, gcloud)
        delete_slice(spec, state.generation, gcloud)
        return state
    request_stop(files)
    supervisor = Supervisor(files, spec, gcloud_of(spec))
    try:
        return supervisor.end_at_once() if at_once else supervisor.run()
    except WatchedError as error:
        logger.info("%s; it ends the job now", str(error).partition(";")[0])
    while True:
        time.sleep(spec.limits.look_seconds)
        state = files.state()
        if state.outcome is not None and not slices_of(spec, gcloud_of(spec)):
            return state


def clean(files: JobFiles, *, show: Show = None) -> None:
    """Give everything back and remove the job's folder; what its tool wrote stays."""
    stop(files, at_once=True, show=show)
    if show is not None:
        show(f"remove {files.directory}")
        return
    storage.remove(files.directory)
    logger.info("%s is removed", files.directory)


def status(files: JobFiles, show: Show = None) -> dict[str, Any]:
    """Where a job stands, its slices and machines."""
    spec, state = files.spec(), files.state()
    if show is not None:
        slices_of(spec, gcloud_of(spec, show))
        return {}
    now = time.time()
    seen = look(files, spec, state, gcloud_of(spec), now)
    return {
        "name": spec.name,
        "slices": spec.topology.name,
        "zone": spec.zone,
        "stands": _stands(state, seen),
        "watched": _watched(files, now),
        "attempt": state.attempt,
        "preemptions": state.preemptions,
        "crashes": state.crashes,
        "checkpoint": seen.progress,
        "chip_hours": chip_hours(spec, state, now),
        "machines": [
            {
                "name": machine.name,
                "heard_seconds_ago": None if machine.heard is None else now - machine.heard,
                "wrote_seconds_ago": None if machine.last_output is None else now - machine.last_output,
                "ended_with": None if machine.ended is None else machine.ended.code,
                "says": machine.setup_failed or (machine.ended.said if machine.ended else None),
            }
            for machine in seen.machines
        ],
        "events": [f"{as_text(event.time)}  {event.text}" for event in state.events],
    }


def _stands(state: State, seen: Seen) -> str:
    there = ", ".join(f"g{one.generation} {one.state}" for one in seen.slices) or "no slice"
    if state.outcome is not None:
        return f"{state.outcome}: {state.reason} ({there})"
    return there


def _watched(files: JobFiles, now: float) -> str:
    watch = files.read(WATCH)
    return "by nobody" if watch is None else f"by {watch['who']}, {now - watch['time']:.0f} s ago"


def as_lines(found: dict[str, Any]) -> list[str]:
    """`status` for people."""
    lines = [f"{key:12} {found[key]}" for key in ("name", "slices", "zone", "stands", "watched", "attempt")]
    lines += [f"{key:12} {found[key]}" for key in ("preemptions", "crashes", "checkpoint")]
    lines.append(f"chip-hours   {found['chip_hours']:.1f}")
    for machine in found["machines"]:
        heard, wrote = machine["heard_seconds_ago"], machine["wrote_seconds_ago"]
        parts = [
            "not heard of yet" if heard is None else f"heard {heard:.0f} s ago",
            "" if wrote is None else f"wrote {wrote:.0f} s ago",
            "" if machine["ended_with"] is None else f"ended with {machine['ended_with']}",
            machine["says"] or "",
        ]
        lines.append(f"  {machine['name']}  {', '.join(part for part in parts if part)}")
    return [*lines, *found["events"]]


def logs(files: JobFiles, worker: int, attempt: int | None, *, follow: bool) -> Iterator[str]:
    """What a machine's command wrote, by the machine's number over all slices; the present attempt if none is named.

    Raises:
        UserError: no such machine, or nothing was written yet.
    """
    spec, state = files.spec(), files.state()
    _check_worker(spec, worker)
    chosen = state.attempt if attempt is None else attempt
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    told: set[str] = set()
    while True:
        state = files.state()
        directory = _directory_of(files, spec, state, worker, chosen)
        if directory is None and not follow:
            raise UserError(
                f"{spec.name}: attempt {chosen} has written nothing yet; tools/tpu.py status says where it stands"
            )
        pieces = [] if directory is None else storage.list_names(directory)
        for name in pieces:
            if name.startswith("log-") and name not in told:
                told.add(name)
                yield decoder.decode(storage.read_bytes(storage.join(str(directory), name)))
        if not follow or (state.outcome is not None and state.attempt == chosen):
            return
        if state.attempt > chosen and attempt is None:
            chosen, told = state.attempt, set()
            yield f"--- attempt {chosen}\n"
        elif "exit.json" in pieces and attempt is not None:
            return
        time.sleep(spec.limits.look_seconds)


def _check_worker(spec: JobSpec, worker: int) -> None:
    number = spec.num_slices * spec.topology.hosts_per_slice
    if not 0 <= worker < number:
        raise UserError(f"--worker: {worker}: the job has machines 0 to {number - 1}")


def _directory_of(files: JobFiles, spec: JobSpec, state: State, worker: int, attempt: int) -> str | None:
    """Of an attempt on a machine: slices come and go, an attempt is on one of them."""
    for generation in range(state.generation, 0, -1):
        directory = files.attempt(spec.workers(generation)[worker], attempt)
        if storage.list_names(directory):
            return directory
    return None


def attach(files: JobFiles, worker: int, show: Show = None) -> int:
    """A shell on a machine, by gcloud's ssh; its exit code."""
    spec, state = files.spec(), files.state()
    _check_worker(spec, worker)
    node, index = divmod(worker, spec.topology.hosts_per_slice)
    command = [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", spec.nodes(state.generation)[node]),
        *(f"--worker={index}", f"--project={spec.project}", f"--zone={spec.zone}"),
        *(["--internal-ip"] if spec.internal_ips else []),
    ]
    if show is not None:
        show(shlex.join(command))
        return 0
    if shutil.which("gcloud") is None:
        raise UserError(INSTALL)
    code = subprocess.run(command, check=False).returncode
    if code == SSH_FAILED:
        raise UserError(
            "ssh did not connect; if it says that the host's key has changed, remove the line it names from "
            "~/.ssh/google_compute_known_hosts. The job does not need ssh"
        )
    return code


def jobs(root: str) -> list[dict[str, Any]]:
    """All jobs of a root, by what is in the bucket."""
    found = []
    for name in storage.list_names(storage.join(root, JOBS)):
        files = JobFiles(root, name)
        if files.read(SPEC) is None:
            continue
        spec, state = files.spec(), files.state()
        found.append(
            {
                "name": name,
                "slices": spec.topology.name,
                "zone": spec.zone,
                "outcome": state.outcome or f"attempt {state.attempt}",
                "created": as_text(spec.created),
                "watched": _watched(files, time.time()),
            }
        )
    return found


def write(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
