"""What the nodes of one job say, shown as they say it and kept in a log: the same for rented machines and hosts."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from loadmaster.launch.follow import Reader, unpack
from loadmaster.launch.provider import LogLine

KILLED = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
Echo = Callable[[str], None]


class Board:
    """A Reader for each node; lines of several nodes carry their number.

    usd_per_hour: of all nodes together, None where nothing is billed.
    """

    def __init__(
        self, echo: Echo, log: TextIO, nodes: int, usd_per_hour: float | None, clock: Callable[[], float] = time.time
    ):
        self.echo, self.log, self.clock = echo, log, clock
        self.readers = [Reader() for _ in range(nodes)]
        self.usd_per_hour = usd_per_hour
        self.start = clock()
        self.failed_at: float | None = None
        self.failed = 0
        """Exit code of the first node that failed."""

    @property
    def lead(self) -> Reader:
        return self.readers[0]

    @property
    def armed(self) -> bool:
        return all(reader.armed for reader in self.readers)

    @property
    def hours(self) -> float:
        return (self.clock() - self.start) / 3600

    def take(self, node: int, line: LogLine) -> None:
        said = self.readers[node].take(line)
        prefix = f"[{node}] " if len(self.readers) > 1 else ""
        if isinstance(said, str):
            self._keep(f"{line.at} {prefix}{said}")
            self.echo(f"  | {prefix}{said}")
        elif said is not None and said["event"] == "step":
            loss = "" if said.get("loss") is None else f", loss {said['loss']:.4f}"
            of = f" of {said['steps']}" if said.get("steps") else ""
            bill = "" if self.usd_per_hour is None else f", ${self.hours * self.usd_per_hour:.2f}"
            self.echo(f"  step {said['step']}{of}{loss}; {self.hours:.2f} h{bill} so far")
        elif said is not None and said["event"] == "end":
            if said["exit_code"] != 0 and self.failed_at is None:
                self.failed_at, self.failed = self.clock(), int(said["exit_code"])
            if len(self.readers) > 1:
                self.echo(f"  | {prefix}ended with exit code {said['exit_code']}")
        elif said is not None:
            self._keep(f"{line.at} {prefix}{json.dumps(said)}")

    def _keep(self, line: str) -> None:
        self.log.write(line + "\n")
        self.log.flush()

    def over(self, grace_s: float) -> bool:
        """Node 0 has ended, or another one failed so long ago that node 0 will not get through without it."""
        return self.lead.ended is not None or (self.failed_at is not None and self.clock() - self.failed_at > grace_s)

    def result(self, folder: Path) -> int:
        """Unpack what node 0 handed back into `folder`, say what did not come; the job's exit code."""
        ended = self.lead.ended
        if ended is None:  # another node failed, and node 0 hung
            return self.failed
        packed = self.lead.files() if ended["parts"] else b""
        if packed is None:
            self.echo("the small files did not come through the log whole; they are in the run directory there")
        elif packed:
            names = unpack(packed, folder)
            self.echo(f"brought back {len(names)} files to {folder}")
        for name in ended.get("left", []):
            self.echo(f"  too large to come back through the log: {name}")
        for node, reader in enumerate(self.readers):
            if reader.ended and (said := reader.ended.get("said")):
                self.echo(f"node {node}: {said}" if len(self.readers) > 1 else said)
        # Killed, because another one had failed: that one's code says more.
        return self.failed if ended["exit_code"] in KILLED else int(ended["exit_code"])
