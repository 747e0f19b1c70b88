"""SIGTERM, SIGINT and a time limit: a run stops where nothing is lost, and says how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loadmaster.config.schema import Job
from loadmaster.errors import StoppedOnRequest

MESSAGE = "stopped on request; start the same command again to resume"
SAME_REQUEST_S = 2.0
"""Signals so soon after the first are the same request: a scheduler tells every process, the launcher its workers."""


STARTED = "LOADMASTER_STARTED"
"""Environment variable: when the job began, seconds of time.time(), which launch.max_hours counts from."""


class StopSignal:
    """Between safe points a request is only noted; elsewhere, and the second time, it stops at once."""

    def __init__(self, deadline: float | None = None, grace_s: float | None = None) -> None:
        """deadline: in seconds of time.time(), from when on a stop is requested.

        grace_s: seconds from a first request to where the process ends all the same, with what was saved before.
        """
        self.deadline, self.grace_s = deadline, grace_s
        self._signalled = False
        self._timer: threading.Timer | None = None
        self._first_s = float("-inf")
        self._deferring = False
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self._signalled or (self.deadline is not None and time.time() >= self.deadline)

    @requested.setter
    def requested(self, value: bool) -> None:
        self._signalled = value

    def install(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._first_s < SAME_REQUEST_S:
            return
        if not self._signalled:
            self._first_s = time.monotonic()
        if self._deferring and not self._signalled:
            self._signalled = True
            if self.grace_s is not None:
                self._timer = threading.Timer(self.grace_s, _end, [self.grace_s])
                self._timer.daemon = True
                self._timer.start()
            return
        raise StoppedOnRequest(MESSAGE)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first request only sets `requested`; the block looks at it at its safe points."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False


def deadline(job: Job) -> float | None:
    """When launch.max_hours is over, in seconds of time.time(); None where there is no such limit."""
    started = float(os.environ[STARTED])
    return None if job.launch.max_hours == "auto" else started + 3600 * job.launch.max_hours


def _end(grace_s: float) -> None:
    """The last resort: a step, or a rank that is waited for, took longer than whoever asked is willing to wait."""
    print(f"{MESSAGE} (nothing was saved within launch.grace_s={grace_s:g} s)", file=sys.stderr, flush=True)
    os._exit(StoppedOnRequest.exit_code)
