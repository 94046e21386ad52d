"""A Google Cloud Storage on this machine, and a proxy before it that fails now and then as the real one does."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from gcp_storage_emulator.server import create_server

BUCKET = "images"
FAULTS = ("throttled", "server", "connection", "timeout", "short_read")
STATUSES = {"throttled": 429, "server": 503, "forbidden": 403}
# Longer than the test's recipes wait for an answer.
STALL_SECONDS = 3.0


class FaultyProxy:
    """Hands requests on to ``target``, and of reads a ``rate`` of each of `FAULTS` in place of an answer.

    ``away``: nothing is answered but errors; ``refuses``: objects with this in their names may not be written;
    ``forbids_listing``: nobody may look what there is. ``injected`` counts what was done.
    """

    def __init__(self, target: int) -> None:
        self.rate = 0.0
        self.away = False
        self.refuses: str | None = None
        self.forbids_listing = False
        self.injected: Counter[str] = Counter()
        self._random = random.Random(0)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def log_message(self, *_: object) -> None:
                pass

            def _handle(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                fault = proxy._fault(self.command, self.path)
                if body and proxy.refuses and proxy.refuses.encode() in body:
                    fault = "forbidden"
                if proxy.forbids_listing and "/o?" in self.path and "alt=media" not in self.path:
                    fault = "forbidden"
                if fault == "connection":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                    self.close_connection = True
                    return
                if fault in STATUSES:
                    status, headers, content = STATUSES[fault], [], b"injected"
                else:
                    if fault == "timeout":
                        time.sleep(STALL_SECONDS)
                    onward = HTTPConnection("localhost", target)
                    onward.request(self.command, self.path, body, dict(self.headers))
                    answer = onward.getresponse()
                    status, headers, content = answer.status, answer.getheaders(), answer.read()
                    onward.close()
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                # Either the connection ends early, or a shorter range is answered in good order.
                ends_early = fault == "short_read" and proxy._random.random() < 0.5
                kept = content[: len(content) // 2] if fault == "short_read" else content
                self.send_header("Content-Length", str(len(content if ends_early else kept)))
                self.end_headers()
                self.wfile.write(kept)
                self.close_connection = ends_early

            # The names are http.server's.
            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle  # noqa: N815

        self._server = ThreadingHTTPServer(("localhost", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _fault(self, method: str, path: str) -> str | None:
        if self.away:
            return "server"
        if method != "GET" or ("alt=media" not in path and "/download/" not in path):
            return None
        drawn = self._random.random()
        if drawn >= self.rate:
            return None
        fault = FAULTS[int(drawn / self.rate * len(FAULTS))]
        self.injected[fault] += 1
        return fault

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def faulty_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """``gs://images`` on this machine, for gcsfs in this process and in those that it starts."""
    port = _free_port()
    server = create_server("localhost", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    proxy = FaultyProxy(port)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        yield proxy
    finally:
        proxy.close()
        server.stop()
