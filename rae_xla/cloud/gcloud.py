"""The ``gcloud`` command, with argument lists, and what its failures mean."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rae_xla.errors import StoppedError, UserError

logger = logging.getLogger(__name__)

# The longest seen is a create without --async, which we do not use.
TIMEOUT_SECONDS = 300
Kind = Literal["not_found", "taken", "quota", "capacity", "refused", "logged_out", "transient", "unknown"]
# By the first that is found in what gcloud says: usage and rights before words that stand in many messages; a refusal
# for a quota has the code of one for capacity.
_KINDS: tuple[tuple[Kind, str], ...] = (
    ("refused", r"unrecognized arguments|argument --|PERMISSION_DENIED"),
    ("not_found", r"NOT_FOUND"),
    ("taken", r"ALREADY_EXISTS"),
    ("logged_out", r"do not currently have an active account|gcloud auth login|invalid_grant|UNAUTHENTICATED"),
    ("capacity", r"(?i:no more capacity|not enough resources|stock.?out|insufficient capacity)"),
    ("transient", r"per minute|rateLimitExceeded|UNAVAILABLE|\bINTERNAL\b|ABORTED|DEADLINE_EXCEEDED|HttpError.*50\d"),
    ("transient", r"(?i:timed out|connection|try again|unable to find the server|name resolution)"),
    ("quota", r"(?i:quota)"),
    ("refused", r"INVALID_ARGUMENT|FAILED_PRECONDITION"),
    ("capacity", r"RESOURCE_EXHAUSTED"),
)
# What newer gcloud adds to refusals, whoever is logged in.
_ACCOUNT = "This command is authenticated as"
INSTALL = "gcloud was not found; install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
QUOTA = "ask for quota (console.cloud.google.com/iam-admin/quotas), or try another zone; spot chips have their own"
LOGIN = "gcloud is not logged in; run gcloud auth login and gcloud auth application-default login"


def kind_of(said: str) -> Kind:
    """What a failure means, by what gcloud or a queued resource says of it."""
    said = said.partition(_ACCOUNT)[0]
    return next((kind for kind, pattern in _KINDS if re.search(pattern, said)), "unknown")


class GcloudError(StoppedError):
    """A command that failed; in one line, with the ``kind`` of failure."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Gcloud:
    """Commands about one project and zone. With ``show``, each is handed to that and not run."""

    project: str | None
    zone: str | None
    show: Callable[[str], None] | None = None

    def read(self, *arguments: str) -> Any:
        """What a command answers as JSON; ``None`` if it is only shown.

        Raises:
            GcloudError: it failed, or answers something else. UserError: there is no gcloud.
        """
        said = self.run(*arguments)
        try:
            return None if said is None else json.loads(said)
        except ValueError as error:
            raise GcloudError("unknown", f"gcloud {' '.join(arguments)} answers no JSON: {str(said)[:200]}") from error

    def run(self, *arguments: str) -> str | None:
        """What a command says; ``None`` if it is only shown.

        Raises:
            GcloudError: it failed. UserError: there is no gcloud.
        """
        command = self.command(*arguments)
        if self.show is not None:
            self.show(shlex.join(command))
            return None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except FileNotFoundError as error:
            raise UserError(INSTALL) from error
        except subprocess.TimeoutExpired as error:
            raise GcloudError("transient", f"gcloud {arguments[-1]}: no answer in {TIMEOUT_SECONDS} s") from error
        if done.returncode:
            kind = kind_of(done.stderr)
            said = LOGIN if kind == "logged_out" else _in_one_line(done.stderr)
            raise GcloudError(kind, f"{said}; {QUOTA}" if kind == "quota" else said)
        return done.stdout

    def command(self, *arguments: str) -> list[str]:
        """The argument list, project and zone included."""
        where = [
            f"--{key}={value}" for key, value in (("project", self.project), ("zone", self.zone)) if value is not None
        ]
        return ["gcloud", *arguments, *where, "--format=json", "--quiet"]


def _in_one_line(said: str) -> str:
    """gcloud's own words, from where it says that it is an error."""
    lines = [line.strip() for line in said.partition(_ACCOUNT)[0].splitlines() if line.strip()]
    first = next((index for index, line in enumerate(lines) if line.startswith("ERROR:")), 0)
    return " ".join(lines[first:])[:600] or "gcloud failed and says nothing"


def configured(key: str) -> str | None:
    """A value of gcloud's own configuration, ``project`` or ``compute/zone``, if it is set."""
    found = Gcloud(None, None).read("config", "get", key)
    # What is not set is an empty list.
    return found if isinstance(found, str) else None


def check_logged_in() -> None:
    """Raises a `UserError` if nobody is."""
    if not Gcloud(None, None).read("auth", "list", "--filter=status:ACTIVE"):
        raise UserError(LOGIN)


def flag(name: str, values: dict[str, str]) -> str:
    """``--name=key=value,...``, with another separator, as gcloud lets one choose, where a comma is in a value."""
    pairs = [f"{key}={value}" for key, value in values.items()]
    separator = next(one for one in ",|;~:#" if not any(one in pair for pair in pairs))
    return f"--{name}=" + ("" if separator == "," else f"^{separator}^") + separator.join(pairs)


def one_of_each(flags: dict[str, str | None]) -> list[str]:
    """``--key=value`` for those that have one."""
    return [f"--{key}={value}" for key, value in flags.items() if value is not None]


def names_of(listed: Sequence[dict[str, Any]] | None, key: str = "name") -> list[str]:
    """The last parts of resource names such as ``projects/p/locations/z/queuedResources/n``."""
    return [str(row[key]).rsplit("/", 1)[-1] for row in listed or ()]
