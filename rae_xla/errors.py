"""The exceptions that are told in one line."""

import os


class UserError(ValueError):
    """A mistake in a recipe, a file or a command: one line that names it and says what to do.

    Tools print it on stderr and exit with 2.
    """

    exit_code = 2


class StoppedError(Exception):
    """A run came to an early end through no mistake in what it was told; one line that says where it stands.

    Tools print it on stderr and exit with 1.
    """

    exit_code = 1


class PreemptedError(StoppedError):
    """The machine goes away. What was done is saved; the same command goes on from there, on this machine or another.

    Tools exit with 75, the system's code for what is to be tried again.
    """

    exit_code = os.EX_TEMPFAIL


class SourceError(StoppedError):
    """Images do not come: the store stayed away for longer than a recipe waits, or will not answer; in one line."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to its first line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
