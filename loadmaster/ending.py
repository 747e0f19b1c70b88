"""The end of a process, and of one that stopped on request."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from loadmaster import collector
from loadmaster.errors import StoppedOnRequest

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Requests to stop."""
PR_SET_PDEATHSIG = 1


def heed_no_more_requests() -> None:
    """From here on a request to stop is too late for this process, and must not kill it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def ended(code: int) -> int:
    """The exit code of this process, before it leaves Python: that takes a second, in which one more Ctrl-C, or the
    end of a session that begins with its terminal's, would kill it and put its own code in the place of 75."""
    if code == StoppedOnRequest.exit_code:
        heed_no_more_requests()
    collector.leave()
    return code


def end_with(parent: int) -> None:
    """On Linux the kernel ends this process when the one that started it is gone, however that came about."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)
