"""One launch: what is launched, where its record lies here, and how it speaks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadmaster.config.compose import Composed
from loadmaster.ending import STOPS
from loadmaster.training.stop import StopSignal
from loadmaster.words import visible


@dataclass
class Launch:
    composed: Composed
    console: Console
    name: str
    """Used once; whatever is made for this launch bears it."""
    folder: Path
    """Of the log and of what comes back."""
    stop: StopSignal
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep

    def echo(self, text: str) -> None:
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl-C, SIGTERM or SIGHUP within: an impatient finger, or a terminal that closes, must not leave a bill, or a
    job that nobody watches."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
