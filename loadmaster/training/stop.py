"""SIGTERM, SIGINT, SIGHUP and limits of time and money: a run stops where nothing is lost, and says how to go on."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from loadmaster import starting
from loadmaster.config.schema import Job
from loadmaster.ending import STOPS
from loadmaster.errors import StoppedOnRequest

MESSAGE = "stopped on request; start the same command again to resume"
SAME_REQUEST_S = 2.0
"""Signals so soon after the first are the same request: a scheduler tells every process, the launcher its workers."""
FINALIZER_S = 0.05
"""A signal that finds the program where nothing can be raised comes once more after so long."""

STARTED = "LOADMASTER_STARTED"
"""Environment variable: when the job began, seconds of time.time(), which launch.max_hours counts from."""

OVER = "LOADMASTER_OVER"
"""Environment variable: a file to leave when a limit of time or money ends the run. A batch script that starts again
what was stopped (75) would else pay for another such time, and another."""


class StopSignal:
    """Between safe points a request is only noted; elsewhere, and the second time, it stops at once. SIGHUP is never a
    second time: who presses Ctrl-C and closes the window does not insist.

    Python runs a signal's handler between two steps of its own, and never within a collective that waits for another
    rank. A thread hears of the signal all the same (signal.set_wakeup_fd), notes the request and sees to it that the
    process ends in time.
    """

    def __init__(self, grace_s: float | None = None) -> None:
        """grace_s: seconds from a first request to where the process ends all the same, with what was saved before."""
        self.grace_s = grace_s
        self.deadline: float | None = None
        """In seconds of time.time(), from when on a stop is requested."""
        self.last_words: Callable[[str], object] = _print
        """Told why, when the process ends because grace_s is over."""
        self._signalled = self._heard = self._raised = False
        self._timers: list[threading.Timer] = []
        self._first_s = float("-inf")
        self._deferring = False
        self._previous: dict[int, object] = {}
        self._ears: tuple[socket.socket, socket.socket] | None = None
        self._previous_fd = -1

    @property
    def requested(self) -> bool:
        return self._signalled or self._heard or (self.deadline is not None and time.time() >= self.deadline)

    @requested.setter
    def requested(self, value: bool) -> None:
        """For who hears of a request otherwise: from a worker that was told, or from another rank."""
        if value and not self._signalled:
            self._first_s = time.monotonic()
        self._signalled = value

    def limit(self, deadline: float | None) -> None:
        """From `deadline` on it is as if somebody had sent SIGTERM: a stage of one process ends too. None: no limit."""
        self.deadline = deadline
        if deadline is not None:
            self._later(max(0.0, deadline - time.time()), os.kill, os.getpid(), signal.SIGTERM)

    def install(self, hangup: bool = True) -> StopSignal:
        """hangup: a terminal that closes (SIGHUP) is a request too; else it ends this process, and nothing besides."""
        for number in heeded():
            plain = number == signal.SIGHUP and not hangup
            self._previous[number] = signal.signal(number, signal.SIG_DFL if plain else self._handle)
        self._ears = socket.socketpair()
        for end in self._ears:
            end.setblocking(end is self._ears[0])
        self._previous_fd = signal.set_wakeup_fd(self._ears[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._ears[0],), name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        leaves = starting.heard() if self.requested else set()  # one more would only spoil the code that it ends with
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number in leaves else handler)
        self._previous.clear()
        if self._ears is not None:
            signal.set_wakeup_fd(self._previous_fd)
            with suppress(OSError):
                self._ears[0].shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes its end
            self._ears[1].close()
            self._ears = None
        for timer in self._timers:
            timer.cancel()

    def _listen(self, ear: socket.socket) -> None:
        with ear, suppress(OSError):
            while numbers := ear.recv(64):
                # Another's handler is there while workers run (training.agent): they are told, and waited for.
                ours = signal.getsignal(signal.SIGTERM) == self._handle
                if ours and not self._heard and set(STOPS) & set(numbers):
                    self._heard = True
                    self._end_in_time()

    def _end_in_time(self) -> None:
        if self.grace_s is not None:
            self._later(self.grace_s, self._end, self.grace_s)

    def _later(self, wait_s: float, do: Callable[..., object], *what: object) -> None:
        timer = threading.Timer(wait_s, do, what)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._first_s < SAME_REQUEST_S or (self._signalled and number == signal.SIGHUP):
            return
        if not self._deferring and _in_finalizer(frame):
            self._later(FINALIZER_S, os.kill, os.getpid(), number)
            return
        first = not self._signalled
        if first:
            self._first_s = time.monotonic()
            self._signalled = True
        if not (first and self._deferring):
            self._raised = not self._deferring
            raise StoppedOnRequest(self.message)

    @property
    def message(self) -> str:
        over = self.deadline is not None and time.time() >= self.deadline
        return f"launch.max_hours or launch.max_usd is used up: {MESSAGE}" if over else MESSAGE

    def leave_word(self) -> None:
        """Where a limit of time or money is reached, for who would start the run again."""
        if self.deadline is not None and time.time() >= self.deadline and OVER in os.environ:
            with suppress(OSError):
                Path(os.environ[OVER]).touch()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first request only sets `requested`; the block looks at it at its safe points."""
        before, self._deferring = self._deferring, True
        try:
            yield
        finally:
            self._deferring = before

    def _end(self, waited_s: float) -> None:
        """The last resort: a step, or a rank that is waited for, took longer than whoever asked is willing to wait.

        What was raised outside of a block that defers is on its way, and may have to give back what was rented first.
        """
        if self._raised:
            return
        self.leave_word()
        with suppress(Exception):
            self.last_words(f"{self.message} (nothing was saved within {waited_s:g} s)")
        os._exit(StoppedOnRequest.exit_code)


def heeded() -> list[signal.Signals]:
    """STOPS, less a SIGHUP that is ignored: what nohup starts goes on without its terminal."""
    return [number for number in STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether the interrupted code is an object's __del__: Python prints what is raised there, drops it and goes on."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def deadline(job: Job, usd_per_hour: float | None = None) -> float | None:
    """When launch.max_hours is over or launch.max_usd is spent, in seconds of time.time(); None: no such limit.

    usd_per_hour: what all of the hardware costs, by the plan; None where that is not known. A stop is requested before
    the limit, so that it is saved by then: launch.grace_s before, or a tenth of a limit that is short.
    """
    limits = [] if job.launch.max_hours == "auto" else [job.launch.max_hours]
    if job.launch.max_usd is not None and usd_per_hour:
        limits.append(job.launch.max_usd / usd_per_hour)
    if not limits:
        return None
    allowed_s = 3600 * min(limits)
    return float(os.environ[STARTED]) + allowed_s - min(job.launch.grace_s, allowed_s / 10)


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
