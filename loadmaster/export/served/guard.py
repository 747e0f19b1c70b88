"""Run a command, and kill it with all its children as soon as whoever started this process is gone.

    python guard.py COMMAND ...          started in a session of its own, stdin an open pipe

The pipe closes when the starter closes it or dies, whatever it dies of (kill -9 included), so a server never
outlives its check. Only the standard library is imported: this runs beside a model that wants the memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> None:
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    # A handler, where SIG_IGN would be handed down: the server ends at SIGTERM, and this process when it has.
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    code = server.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_starter() -> None:
    # Not sys.stdin, whose lock this thread would still hold when the interpreter shuts down.
    while os.read(0, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
