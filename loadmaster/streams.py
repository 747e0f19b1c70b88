"""What a command prints, where nobody reads on, or what reads it has not every character; and what it asks."""

from __future__ import annotations

import errno
import io
import os
import sys

from rich.console import Console

from loadmaster.errors import LoadmasterError


class Output(Console):
    """Where what reads it leaves (| head, a tee that was killed) the work goes on, unheard; rich would end it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        unheard(self.file.fileno())


class _Terminal(io.FileIO):
    """One that may be gone, a window that is closed or a connection that is lost: the work goes on, unheard."""

    def write(self, text: bytes | memoryview) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        unheard(self.fileno())
        return memoryview(text).nbytes


def settle_streams() -> None:
    """A terminal that is gone ends nothing; a character that a terminal's or log's encoding has not (LANG=en_US) is
    shown as a question mark."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")
        if stream.isatty():
            setattr(sys, name, _on_terminal(stream))


def _on_terminal(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    terminal = _Terminal(stream.fileno(), "w", closefd=False)
    unbuffered = stream.write_through
    buffer = terminal if unbuffered else io.BufferedWriter(terminal)
    return io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=True, write_through=unbuffered)


def agreed(question: str) -> bool:
    """Whether somebody says yes. Raises LoadmasterError where nobody is there."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except UnicodeDecodeError:
        return False
    except (EOFError, RuntimeError):  # RuntimeError: with <&-
        raise LoadmasterError("nobody is there to ask: --yes goes on without") from None


def unheard(descriptor: int) -> None:
    """What is still written there, by children too, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
