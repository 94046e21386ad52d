"""Parts of files that may be far away: what fails for a moment is counted and tried again, where it stopped."""

from __future__ import annotations

import asyncio
import io
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import requests
from fsspec.core import split_protocol, url_to_fs

from rae_xla.errors import SourceError

T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 30.0

logger = logging.getLogger(__name__)


class _ShortReadError(OSError):
    """Fewer bytes than were asked for."""


class RemoteFiles:
    """Files of any kind that fsspec knows; one object for each process, which opens its own connections.

    ``timeout_seconds``: of one request. ``give_up_seconds``: how long one read is tried. ``counts``: what failed for a
    moment, by kind: ``throttled``, ``server``, ``timeout``, ``connection``, ``short_read``.
    """

    def __init__(self, timeout_seconds: float, give_up_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._give_up_seconds = give_up_seconds
        self._filesystems: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    def size(self, path: str) -> int:
        """Bytes of a file."""
        filesystem, inner = self._opened(path)
        return int(self._tried(path, lambda: filesystem.size(inner)))

    def read(self, path: str, first: int, end: int) -> bytes:
        """Bytes ``first`` up to ``end``.

        Raises:
            SourceError: it stays away, is not there, or may not be read.
        """
        filesystem, inner = self._opened(path)
        parts: list[bytes] = []

        def read_rest() -> bytes:
            start = first + sum(map(len, parts))
            part = bytes(filesystem.cat_file(inner, start=start, end=end)) if start < end else b""
            parts.append(part)
            if start + len(part) != end:
                raise _ShortReadError(f"{start + len(part) - first} of {end - first} bytes came")
            return b"".join(parts)

        return self._tried(path, read_rest)

    def read_whole(self, path: str) -> bytes:
        """All bytes of a file."""
        return self.read(path, 0, self.size(path))

    def open(self, path: str, size: int) -> io.RawIOBase:
        """A file that can be read anywhere, for libraries that want one."""
        return _RangedFile(self, path, size)

    def _opened(self, path: str) -> tuple[Any, str]:
        protocol = split_protocol(path)[0] or "file"
        if protocol not in self._filesystems:
            if protocol in ("gs", "gcs"):
                from rae_xla.data.gcs import SingleTryGCS

                self._filesystems[protocol] = SingleTryGCS.with_timeout(self._timeout_seconds)
            else:
                self._filesystems[protocol] = url_to_fs(path)[0]
        filesystem = self._filesystems[protocol]
        return filesystem, filesystem._strip_protocol(path)

    def _tried(self, path: str, read: Callable[[], T]) -> T:
        started = time.monotonic()
        wait = FIRST_WAIT_SECONDS
        while True:
            try:
                return read()
            except Exception as error:
                kind = _kind_of(error)
                if kind is None:
                    raise SourceError(f"{path} cannot be read: {_told(error)}") from error
                self.counts[kind] += 1
                if time.monotonic() - started + wait > self._give_up_seconds:
                    raise SourceError(
                        f"{path} cannot be reached for {self._give_up_seconds:g} seconds: {_told(error)}"
                    ) from error
                logger.debug("%s: %s, trying again", path, _told(error))
            time.sleep(wait * random.uniform(0.5, 1.5))
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
        end = min(self._at + len(buffer), self._size)
        content = self._files.read(self._path, self._at, end)
        buffer[: len(content)] = content
        self._at = end
        return len(content)

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        content = self._files.read(self._path, self._at, end)
        self._at = end
        return content


def _kind_of(error: Exception) -> str | None:
    """What failed for a moment; ``None`` if the same request will fail again."""
    status = _status_of(error)
    if status == 429:
        return "throttled"
    if status == 408 or (status is not None and status >= 500):
        return "server"
    if isinstance(error, TimeoutError | asyncio.TimeoutError | requests.Timeout):
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


def _told(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
