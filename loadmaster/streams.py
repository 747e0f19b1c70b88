"""What a command prints, where nobody reads on, or what reads it has not every character."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console


class Output(Console):
    """Where what reads it leaves (| head, a tee that was killed) the work goes on, unheard; rich would end it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def make_legible() -> None:
    """Of a character that a terminal's or log's encoding has not (LANG=en_US) a question mark is shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
