"""Watches a job to its end: looks, decides (`rae_xla.cloud.deciding`), writes the new state, asks Cloud, looks again.

It may end at any point and be started anywhere else: all it knows is in the bucket. Only one watches at a time, by a
file that it renews.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from rae_xla import storage
from rae_xla.cloud.deciding import Decision, decide, refused_slice
from rae_xla.cloud.gcloud import Gcloud, GcloudError
from rae_xla.cloud.job import STOP, WATCH, JobFiles, JobSpec, State
from rae_xla.cloud.queued import create_slice, delete_slice
from rae_xla.cloud.watching import look
from rae_xla.errors import UserError, first_line

logger = logging.getLogger(__name__)

# A supervisor that has not renewed its file for so many looks is gone.
ABANDONED_LOOKS = 8


class WatchedError(UserError):
    """Another supervisor watches the job."""


@dataclass
class Supervisor:
    """Of one job."""

    files: JobFiles
    spec: JobSpec
    gcloud: Gcloud
    _me: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}")
    _said: float = field(default_factory=time.time)
    _doubt: str | None = None

    def run(self) -> State:
        """`watch`; Ctrl-C asks the job to stop and goes on watching, a second one gives its slices back at once."""
        with contextlib.suppress(KeyboardInterrupt):
            return self.watch()
        logger.info("the job is asked to stop and saves itself; Ctrl-C again gives its slices back at once")
        request_stop(self.files)
        with contextlib.suppress(KeyboardInterrupt):
            return self.watch()
        return self.end_at_once()

    def end_at_once(self) -> State:
        """Give everything back; machines do not save themselves."""
        request_stop(self.files)
        limits = self.spec.limits.model_copy(update={"save_minutes": 0.0})
        self.spec = self.spec.model_copy(update={"limits": limits})
        return self.watch()

    def watch(self) -> State:
        """Until the job has ended and nothing of it is left in Cloud.

        Raises:
            WatchedError: another supervisor watches it.
        """
        has_waited = False
        while True:
            try:
                if not has_waited:
                    self._wait_for_watch()
                    has_waited = True
                self._take_watch()
                decision = self._step()
                if decision.done:
                    storage.remove(self.files.path(WATCH))
                    return decision.state
                self._doubt = None
            except WatchedError:
                raise
            # What stores, networks and gcloud raise has no common base. Chips may be held, and nobody else would give
            # them back: it is told, and looked at again.
            except Exception as error:
                self._say_once(error)
            time.sleep(self.spec.limits.look_seconds)

    def _step(self) -> Decision:
        before = self.files.state()
        decision = decide(self.spec, before, look(self.files, self.spec, before, self.gcloud, time.time()))
        self._write(before, decision.state)
        for generation in decision.delete:
            logger.info("%s is given back", self.spec.resource(generation))
            delete_slice(self.spec, generation, self.gcloud)
        if decision.create:
            self._create(decision.state)
        return decision

    def _create(self, state: State) -> None:
        logger.info("%s is asked for", self.spec.resource(state.generation))
        try:
            create_slice(self.files, self.spec, state.generation, self.gcloud)
        except GcloudError as error:
            if error.kind not in ("capacity", "quota", "refused"):
                raise
            self._write(state, refused_slice(self.spec, state, time.time(), error.kind, str(error)))

    def _write(self, before: State, state: State) -> None:
        if state == before:
            return
        self.files.write_state(state)
        for event in state.events:
            if event.time > self._said:
                logger.info("%s  %s", as_text(event.time), event.text)
                self._said = event.time

    def _say_once(self, error: Exception) -> None:
        doubt = f"{type(error).__name__}: {first_line(error)}"
        if doubt != self._doubt:
            logger.warning("not known now, and looked at again: %s", doubt)
        self._doubt = doubt

    def _wait_for_watch(self) -> None:
        """Another's is taken over when it has not been renewed for long enough."""
        before = self._others_watch()
        if before is not None:
            logger.info("%s watched it a moment ago; looking whether it still does", before["who"])
        while before is not None and time.time() - before["time"] < self._abandoned_seconds:
            time.sleep(self.spec.limits.look_seconds)
            now = self._others_watch()
            if now is not None and now != before:
                raise WatchedError(f"{self.spec.name}: {now['who']} watches it; end that one first, or let it")
            before = now

    def _take_watch(self) -> None:
        other = self._others_watch()
        if other is not None and time.time() - other["time"] < self._abandoned_seconds:
            raise WatchedError(f"{self.spec.name}: {other['who']} watches it now, so this one ends")
        storage.write_json(self.files.path(WATCH), {"who": self._me, "time": time.time()})

    def _others_watch(self) -> dict[str, Any] | None:
        watch = self.files.read(WATCH)
        return None if watch is None or watch["who"] == self._me else watch

    @property
    def _abandoned_seconds(self) -> float:
        return ABANDONED_LOOKS * self.spec.limits.look_seconds


def request_stop(files: JobFiles) -> None:
    """Let a job end: its machines save themselves, and whoever watches gives its slices back."""
    storage.write_json(files.path(STOP), {"time": time.time()})


def as_text(seconds: float) -> str:
    """A time of this place."""
    return time.strftime("%F %T", time.localtime(seconds))
