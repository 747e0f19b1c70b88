"""SIGTERM and SIGINT: a run stops where nothing is lost, and says how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loadmaster.errors import StoppedOnRequest

MESSAGE = "stopped on request; start the same command again to resume"


class StopSignal:
    """Between safe points a request is only noted; elsewhere, and the second time, it stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False
        self._previous: dict[int, object] = {}

    def install(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferring and not self.requested:
            self.requested = True
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
