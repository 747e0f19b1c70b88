"""`loadmaster`, and `python -m loadmaster`."""

from __future__ import annotations

import sys

from loadmaster import collector, starting


def main() -> int:
    starting.listen()
    starting.refuse_another_python()
    collector.pause()
    from loadmaster.cli import main
    from loadmaster.ending import ended

    return ended(main())


if __name__ == "__main__":
    sys.exit(main())
