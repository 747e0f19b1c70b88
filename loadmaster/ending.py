"""The end of a process, and of one that stopped on request."""

from __future__ import annotations

import signal

from loadmaster import collector
from loadmaster.errors import StoppedOnRequest


def ended(code: int) -> int:
    """The exit code of this process, before it leaves Python: that takes a second, in which one more Ctrl-C, or the
    end of a session that begins with its terminal's, would kill it and put its own code in the place of 75."""
    if code == StoppedOnRequest.exit_code:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    collector.leave()
    return code
