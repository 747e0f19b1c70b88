"""The end of a process, and of one that stopped on request."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from loadmaster import collector
from loadmaster.errors import StoppedOnRequest

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Requests to stop."""
PR_SET_PDEATHSIG = 1
LOOK_S = 1.0


def heed_no_more_requests() -> None:
    """From here on a request to stop is too late for this process, and must not kill it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def ended(code: int) -> int:
    """The exit code of this process, before it leaves Python: that takes a second, in which one more Ctrl-C, or the
    end of a session that begins with its terminal's, would kill it and put its own code in the place of 75."""
    if code == StoppedOnRequest.exit_code:
        heed_no_more_requests()
    elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C then ends it without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    collector.leave()
    return code


def end_with(parent: int) -> None:
    """This process is killed when the one that started it is gone, however that came about: by the kernel on Linux, by
    a thread that looks elsewhere."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _end_without(parent)  # it was gone before
    else:
        threading.Thread(target=_look_for, args=(parent,), name="parent", daemon=True).start()


def _look_for(parent: int) -> None:
    while True:
        _end_without(parent)
        time.sleep(LOOK_S)


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
