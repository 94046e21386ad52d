"""A Cloud TPU that keeps state and fails as the real one does: `FakeCloud` in a process, or a ``gcloud`` on the PATH.

``python tests/fake_cloud.py ARGUMENT...`` is that ``gcloud``, with its state in the file FAKE_CLOUD; its output has the
shapes of Google Cloud SDK 528 where they can be seen without an account. Time is counted in lists of slices.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-b."
)
STOCK_OUT = 'There is no more capacity in the zone "us-east5-b"; you can try in another zone'
UNAVAILABLE = "ERROR: (gcloud.compute.tpus.queued-resources) UNAVAILABLE: The service is currently unavailable."
LOGIN = (
    "ERROR: (gcloud.auth) You do not currently have an active account selected.\nPlease run:\n\n  $ gcloud auth login"
)
NOT_FOUND = (
    "ERROR: (gcloud.compute.tpus.queued-resources) NOT_FOUND: Resource '{}' was not found. This command is "
    "authenticated as a@b which is the active account specified by the [core/account] property."
)
HOST_KEY = "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."
NOT_NOW = "ERROR: (gcloud.compute.tpus.queued-resources.delete) FAILED_PRECONDITION: not in a state to be deleted"


def _one_of(every: int, count: int) -> bool:
    """One in ``every`` counts, and none if that is 0; not in step with anything."""
    return every > 0 and count * 2654435761 % 2**32 < 2**32 // every


@dataclass
class FakeCloud:
    """``fates``: of each slice in the order of asking, what becomes of it; the last one's for all that follow.

    A fate is ``ok``, ``quota`` (refused at once), ``refused_capacity`` (at once), ``stock_out`` (later),
    ``never_heard`` (its machines write nothing) or ``preempted:N`` (N lists after it was ready). ``waits``: lists
    until a slice is ready. ``unavailable_every``: of so many commands one gets no answer; ``partial_every``: of so
    many lists one is empty. ``one_down:N`` is the fate of a slice of which a machine falls silent after N looks.
    """

    fates: list[str] = field(default_factory=lambda: ["ok"])
    waits: int = 2
    unavailable_every: int = 0
    logged_in: bool = True
    offered: list[str] = field(default_factory=lambda: ["v6e-8", "v6e-16", "v6e-64"])
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    made: int = 0
    listed: int = 0
    partial_every: int = 0
    most_at_once: int = 0

    def handle(self, arguments: list[str]) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        self.asked.append(arguments)
        words = [argument for argument in arguments if not argument.startswith("--")]
        if words[:2] == ["auth", "list"]:
            return 0, json.dumps([{"account": "a@b"}] if self.logged_in else []), ""
        if words[:2] == ["config", "get"]:
            return 0, json.dumps({"project": "configured"}.get(words[2], [])), ""
        if not self.logged_in:
            return 1, "", LOGIN
        if _one_of(self.unavailable_every, len(self.asked)):
            return 1, "", UNAVAILABLE
        if words[2:4] == ["accelerator-types", "list"]:
            rows = [{"name": f"projects/p/locations/z/acceleratorTypes/{name}", "type": name} for name in self.offered]
            return 0, json.dumps(rows), ""
        if words[2:4] == ["tpu-vm", "ssh"]:
            return 255, "", HOST_KEY
        commands = {"list": self._list, "describe": self._describe, "create": self._create, "delete": self._delete}
        return commands[words[3]](words, arguments)

    def _create(self, words: list[str], arguments: list[str]) -> tuple[int, str, str]:
        name = words[4]
        if name in self.slices:
            return 1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {name} already exists"
        fate = self.fates[min(self.made, len(self.fates) - 1)]
        self.made += 1
        if fate == "quota":
            return 1, "", QUOTA
        if fate == "refused_capacity":
            return 1, "", f"ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: {STOCK_OUT}"
        given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
        self.slices[name] = {"fate": fate, "state": "WAITING_FOR_RESOURCES", "age": 0, "given": given}
        self.most_at_once = max(self.most_at_once, len(self.slices))
        return 0, "", f"Create request issued for: [{name}]"

    def _delete(self, words: list[str], arguments: list[str]) -> tuple[int, str, str]:
        name = words[4]
        if name not in self.slices:
            return 1, "", NOT_FOUND.format(name)
        row = self.slices[name]
        if row["state"] == "PROVISIONING":
            return 1, "", NOT_NOW
        row.update(state="DELETING", age=0)
        return 0, "", f"Delete request issued for: [{name}]"

    def _describe(self, words: list[str], arguments: list[str]) -> tuple[int, str, str]:
        name = words[4]
        return (0, json.dumps(self._row(name)), "") if name in self.slices else (1, "", NOT_FOUND.format(name))

    def _list(self, words: list[str], arguments: list[str]) -> tuple[int, str, str]:
        for name, row in list(self.slices.items()):
            self._age(name, row)
        self.listed += 1
        if _one_of(self.partial_every, self.listed):
            # What could not be reached is left out, and nothing is said.
            return 0, "[]", ""
        return 0, json.dumps([self._row(name) for name in self.slices]), ""

    def _row(self, name: str) -> dict[str, Any]:
        state = self.slices[name]["state"]
        failed = {"failedData": {"error": {"code": 8, "message": STOCK_OUT}}} if state == "FAILED" else {}
        return {
            "name": f"projects/p/locations/us-east5-b/queuedResources/{name}",
            "state": {"state": state, **failed},
        }

    def _age(self, name: str, row: dict[str, Any]) -> None:
        row["age"] += 1
        state, fate, age = row["state"], row["fate"], row["age"]
        if state == "DELETING" and age > 1:
            del self.slices[name]
        elif state == "WAITING_FOR_RESOURCES" and fate == "stock_out" and age > self.waits:
            row.update(state="FAILED", age=0)
        elif state == "WAITING_FOR_RESOURCES" and age > self.waits:
            row.update(state="PROVISIONING", age=0)
        elif state == "PROVISIONING":
            row.update(state="ACTIVE", age=0)
        elif state == "ACTIVE" and fate.startswith("preempted:") and age > int(fate.partition(":")[2]):
            row.update(state="SUSPENDING", age=0)
        elif state == "SUSPENDING" and age > 1:
            row.update(state="SUSPENDED", age=0)

    def is_up(self, name: str) -> bool:
        """Whether a slice's machines run."""
        return name in self.slices and self.slices[name]["state"] == "ACTIVE"


def main() -> None:
    """As ``gcloud``: machines of slices that are ready run ``rae_xla.cloud.worker``, and die with them.

    Cloud goes on with what it was asked, whoever is killed while waiting for the answer: a process of its own does it.
    """
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os.setsid()
    file = Path(os.environ["FAKE_CLOUD"])
    with file.open("r+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        content = json.load(opened)
        machines, hosts = content.pop("machines"), content.pop("hosts_per_slice")
        cloud = FakeCloud(**content)
        code, output, errors = cloud.handle([one for one in sys.argv[1:] if one not in ("--format=json", "--quiet")])
        ended = [pid for name in list(machines) if not cloud.is_up(name) for pid in machines.pop(name)]
        for name, row in cloud.slices.items():
            if cloud.is_up(name) and name not in machines and row["fate"] != "never_heard":
                machines[name] = [_boot(name, index, row, file.parent) for index in range(hosts)]
        opened.seek(0)
        opened.truncate()
        json.dump({**asdict(cloud), "machines": machines, "hosts_per_slice": hosts}, opened)
    sys.stdout.write(output)
    sys.stderr.write(errors)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # After all is said: it may be one of them that asks.
    for pid in ended:
        _kill(pid)
    os._exit(code)


def _boot(name: str, index: int, row: dict[str, Any], directory: Path) -> int:
    """A machine: its worker, and a folder that is its disk."""
    home = directory / "machines" / f"{name}-w{index}"
    # A slice that is made again by its name has new machines.
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    given = dict(pair.split("=", 1) for pair in row["given"]["metadata"].split(","))
    command = [sys.executable, "-m", "rae_xla.cloud.worker", given["rae-xla-job"], home.name, "--home", str(home)]
    with (home / "worker.log").open("w") as log:
        return subprocess.Popen(
            command,
            cwd=os.environ["FAKE_CODE"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ).pid


def _kill(pid: int) -> None:
    """The power goes: the worker and all that it started."""
    import psutil

    try:
        worker = psutil.Process(pid)
        for process in [*worker.children(recursive=True), worker]:
            # A worker may have asked for its own end.
            if process.pid != os.getpid():
                process.kill()
    except psutil.NoSuchProcess:
        pass


if __name__ == "__main__":
    main()
