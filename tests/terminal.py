"""A process on a terminal of its own, for tests that close it."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.runs import environment


class OnTerminal:
    """A process that leads a session on a terminal of its own, as what a window or a connection opens with."""

    def __init__(self, words: list[str], folder: Path, nohup: bool = False, **variables: str):
        self.master, slave = pty.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if nohup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

        env = {**environment(), "TERM": "xterm", **variables}
        self.process = subprocess.Popen(
            words, cwd=folder, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.said, self.open = "", True

    def hear(self) -> None:
        with suppress(OSError):  # nothing to read now, or nobody writes any more
            while self.open and (heard := os.read(self.master, 4096)):
                self.said += heard.decode()

    def until(self, true: Callable[[], bool], within_s: float = 120) -> None:
        deadline = time.monotonic() + within_s
        while not true():
            self.hear()
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def close(self) -> None:
        self.open = False
        os.close(self.master)

    def code(self, within_s: float = 120) -> int:
        deadline = time.monotonic() + within_s
        while (code := self.process.poll()) is None and time.monotonic() < deadline:
            self.hear()
            time.sleep(0.02)
        self.hear()
        assert code is not None, self.said
        return code
