"""What a process settles before it imports what takes long.

A request to stop meanwhile finds nothing to save: it ends with 75, and the same command starts it again.
"""

from __future__ import annotations

import os
import signal
import sys

_before: dict[int, object] = {}


def refuse_another_python() -> None:
    """For an entry point alone: where the environment was not activated, that is said, not which module is missing."""
    from importlib.util import find_spec  # after listen(): until then Ctrl-C is a traceback
    from pathlib import Path

    if find_spec("hydra") is None:
        print(
            f"error: {sys.executable} has none of the packages that loadmaster needs\n"
            f"fix: `. .venv/bin/activate` in {Path(__file__).parents[1]}, and the same command again "
            "(`make setup` makes that environment)", file=sys.stderr,
        )
        sys.exit(2)


def number_cards_as_the_driver() -> None:
    """Of unlike cards CUDA otherwise takes the fastest for the first, and what is looked at and planned for is the
    driver's first one. A user's own order stays."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def listen() -> None:
    """For an entry point alone, before what takes long to import. What somebody has asked for already stays so."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            _before[number] = signal.signal(number, _stopped)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C then ends it without a traceback
        _before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_DFL)


def over(*numbers: int) -> None:
    """These signals do again what they did before listen()."""
    for number in numbers:
        if number in _before:
            signal.signal(number, _before.pop(number))


def heard() -> set[int]:
    """The signals that listen() answers, or answered: none where something else imports this program."""
    return set(_before)


def _stopped(*_: object) -> None:
    try:
        os.write(2, b"stopped on request; the same command starts it again\n")
    finally:  # also where the terminal is gone
        os._exit(75)
