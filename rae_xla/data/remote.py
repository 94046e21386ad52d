"""Parts of files that may be far away: what fails for a moment is counted and tried again, where it stopped."""

from __future__ import annotations

import io
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import requests
from fsspec.core import split_protocol
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError

from rae_xla import storage
from rae_xla.errors import SourceError, first_line

T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 30.0
BUFFER_BYTES = 4 * 2**20

logger = logging.getLogger(__name__)


class _ShortReadError(OSError):
    """Fewer bytes than were asked for."""


class RemoteFiles:
    """Files of any kind that fsspec knows; one object for each process, which opens its own connections.

    ``timeout_seconds``: of one request. ``give_up_seconds``: how long one request is tried. Threads may share it. Every
    method raises a `SourceError` if what it asks for stays away, is not there, or may not be read.
    """

    def __init__(self, timeout_seconds: float = 60.0, give_up_seconds: float = 60.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._give_up_seconds = give_up_seconds
        self._filesystems: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def take_counts(self) -> Counter[str]:
        """What failed for a moment since this was asked before, by kind.

        ``throttled``, ``server``, ``credentials``, ``timeout``, ``connection``, ``short_read``.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def stop(self) -> None:
        """Nothing is tried again from now on."""
        self._stopped.set()

    def info(self, path: str) -> dict[str, Any]:
        """What the store says of a file; ``size`` at least."""
        return self._tried(path, lambda filesystem, inner: dict(filesystem.info(inner)))

    def find(self, source: str) -> dict[str, dict[str, Any]]:
        """`info` of the files that a pattern names, or that are in a folder at any depth, by their whole paths."""

        def find(filesystem: Any, inner: str) -> dict[str, dict[str, Any]]:
            found = filesystem.glob(inner, detail=True) if "*" in inner else filesystem.find(inner, detail=True)
            whole = filesystem.unstrip_protocol if "://" in source else str
            return {whole(name): about for name, about in found.items() if about["type"] == "file"}

        return self._tried(source, find)

    def listing(self, folder: str) -> dict[str, dict[str, Any]]:
        """`info` of the files in a folder, by name."""

        def list_folder(filesystem: Any, inner: str) -> dict[str, dict[str, Any]]:
            return {about["name"].rpartition("/")[2]: about for about in filesystem.ls(inner, detail=True)}

        return self._tried(folder, list_folder)

    def read(self, path: str, first: int, end: int) -> bytes:
        """Bytes ``first`` up to ``end``."""
        parts: list[bytes] = []

        def read_rest(filesystem: Any, inner: str) -> bytes:
            start = first + sum(map(len, parts))
            part = bytes(filesystem.cat_file(inner, start=start, end=end)) if start < end else b""
            parts.append(part)
            if start + len(part) != end:
                raise _ShortReadError(f"{start + len(part) - first} of {end - first} bytes came")
            return b"".join(parts)

        return self._tried(path, read_rest)

    def open(self, path: str, size: int) -> io.RawIOBase:
        """A file that can be read anywhere, for libraries that want one."""
        return _RangedFile(self, path, size)

    def open_buffered(self, path: str, size: int) -> io.BufferedReader:
        """The same, to be read from its start to its end."""
        return io.BufferedReader(self.open(path, size), BUFFER_BYTES)

    def _filesystem(self, path: str) -> tuple[Any, str]:
        protocol = split_protocol(path)[0] or "file"
        with self._lock:
            if protocol not in self._filesystems:
                if protocol in ("gs", "gcs"):
                    from rae_xla.data.gcs import SingleTryGCS

                    self._filesystems[protocol] = SingleTryGCS.with_timeout(self._timeout_seconds)
                else:
                    self._filesystems[protocol] = storage.open_filesystem(path)[0]
        filesystem = self._filesystems[protocol]
        return filesystem, filesystem._strip_protocol(path)

    def _tried(self, path: str, request: Callable[[Any, str], T]) -> T:
        started = time.monotonic()
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                return request(*self._filesystem(path))
            # What a store and the libraries below may raise has no common base.
            except Exception as error:
                kind = _kind_of(error)
                if kind is None:
                    raise SourceError(_told(path, error)) from error
                with self._lock:
                    self._counts[kind] += 1
                if time.monotonic() - started + wait > self._give_up_seconds:
                    seconds = f"{self._give_up_seconds:g} seconds"
                    raise SourceError(f"{path} cannot be reached for {seconds}: {first_line(error)}") from error
                logger.debug("%s: %s, trying again", path, first_line(error))
            if self._stopped.wait(wait * random.uniform(0.5, 1.5)):
                raise SourceError(f"{path}: reading was stopped")
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


class _RangedFile(io.RawIOBase):
    def __init__(self, files: RemoteFiles, path: str, size: int) -> None:
        super().__init__()
        self._files, self._path, self._size = files, path, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        content = self._files.read(self._path, self._at, end) if self._at < end else b""
        self._at += len(content)
        return content


def _kind_of(error: Exception) -> str | None:
    """What failed for a moment; ``None`` if the same request will fail again."""
    status = _status_of(error)
    if status == 429:
        return "throttled"
    if status == 408 or (status is not None and status >= 500) or isinstance(error, requests.exceptions.ProxyError):
        return "server"
    expired = status == 401 and "Invalid Credentials" in str(error)
    if expired or (isinstance(error, GoogleAuthError) and not isinstance(error, DefaultCredentialsError)):
        return "credentials"
    if isinstance(error, TimeoutError | requests.Timeout):
        return "timeout"
    if isinstance(error, _ShortReadError | aiohttp.ClientPayloadError):
        return "short_read"
    if status is None and isinstance(error, ConnectionError | aiohttp.ClientError | requests.RequestException):
        return "connection"
    return None


def _status_of(error: Exception) -> int | None:
    for status in (getattr(error, "code", None), getattr(error, "status", None)):
        if status is not None and str(status).isdigit():
            return int(status)
    if isinstance(error, requests.RequestException) and error.response is not None:
        return error.response.status_code
    return None


def _told(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} is not there"
    if isinstance(error, DefaultCredentialsError) or _status_of(error) in (401, 403) or "Forbidden" in str(error):
        remedy = "run gcloud auth application-default login, or ask for access"
        return f"{path} may not be read ({first_line(error)}); {remedy}"
    return f"{path} cannot be read: {first_line(error)}"
