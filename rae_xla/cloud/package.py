"""The code as one file: what git tracks, as it lies here, so that equal code is equal bytes and goes up once."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

from rae_xla import storage
from rae_xla.cloud.job import CODE
from rae_xla.errors import UserError

PROJECT = Path(__file__).parent.parent.parent


def packed(project: Path = PROJECT) -> bytes:
    """A ``.tar.gz`` of the tracked files with their present content; names and modes, and no owners or times.

    Raises:
        UserError: the project is no git checkout.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in sorted(_git(project, "ls-files", "-z").split("\0")):
            # One that was deleted and not yet committed is tracked still; so is a whole other checkout inside.
            if not name or not (project / name).is_file():
                continue
            about = archive.gettarinfo(project / name, arcname=name)
            about.mtime, about.uid, about.gid, about.uname, about.gname = 0, 0, 0, "", ""
            with (project / name).open("rb") as file:
                archive.addfile(about, None if about.issym() else file)
    return gzip.compress(content.getvalue(), mtime=0)


def version(project: Path = PROJECT) -> str:
    """The commit, and whether files differ from it."""
    commit = _git(project, "rev-parse", "HEAD").strip()
    changed = _git(project, "status", "--porcelain", "--untracked-files=no").strip()
    return f"{commit} with uncommitted changes" if changed else commit


def url_of(root: str, content: bytes) -> str:
    """Where a package lies; its name is its SHA-256."""
    return storage.join(root, CODE, f"{hashlib.sha256(content).hexdigest()}.tar.gz")


def _git(project: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("git was not found, which says which files are the project's; install it") from error
    if done.returncode:
        raise UserError(f"{project} is no git checkout, so what belongs to the project is not known; clone it")
    return done.stdout
