"""What the nodes of one job say, shown as they say it and kept in a log: the same for rented machines and hosts."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from loadmaster.launch.context import Launch
from loadmaster.launch.follow import Reader, unpack
from loadmaster.launch.provider import LogLine
from loadmaster.words import counted

KILLED = (128 + signal.SIGTERM, 128 + signal.SIGKILL)


@contextmanager
def log_file(path: Path) -> Iterator[TextIO]:
    """Opened to be added to; lines that its disk does not take are lost, and nothing else."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closing it may fail once more
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


class Board(AbstractContextManager):
    """A Reader for each node; lines of several nodes carry their number.

    usd_per_hour: of all nodes together, None where nothing is billed. On a terminal the last line is a bar: steps,
    loss, tokens/s, dollars, time left. Elsewhere each report of a step is a line.
    """

    def __init__(self, launch: Launch, log: TextIO, nodes: int, usd_per_hour: float | None):
        self.echo, self.log, self.clock, self.console = launch.echo, log, launch.clock, launch.console
        self.bar: Progress | None = None
        self.first_step: tuple[int, float] | None = None
        self.readers = [Reader() for _ in range(nodes)]
        self.usd_per_hour = usd_per_hour
        self.start = self.clock()
        self.keeps = True
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
            self._step(said)
        elif said is not None and said["event"] == "end":
            if said["exit_code"] != 0 and self.failed_at is None:
                self.failed_at, self.failed = self.clock(), int(said["exit_code"])
            if len(self.readers) > 1:
                self.echo(f"  | {prefix}ended with exit code {said['exit_code']}")
        elif said is not None:
            self._keep(f"{line.at} {prefix}{json.dumps(said)}")

    def _step(self, said: dict[str, Any]) -> None:
        step, steps, now = int(said["step"]), said.get("steps"), self.clock()
        loss = "" if said.get("loss") is None else f", loss {said['loss']:.4f}"
        speed = "" if not said.get("tokens_per_second") else f", {said['tokens_per_second']:,.0f} tokens/s"
        bill = "" if self.usd_per_hour is None else f", ${self.hours * self.usd_per_hour:.2f}"
        self.first_step = self.first_step or (step, now)
        left = ""
        if steps and step > self.first_step[0]:
            left = f", {(now - self.first_step[1]) / (step - self.first_step[0]) * (steps - step) / 60:.0f} min left"
        if steps and self.console.is_terminal:
            self._draw(step, int(steps), f"{loss}{speed}; {self.hours:.2f} h{bill}{left}".lstrip(", "))
            return
        of = f" of {steps}" if steps else ""
        self.echo(f"  step {step}{of}{loss}{speed}; {self.hours:.2f} h{bill} so far{left}")

    def _draw(self, step: int, steps: int, status: str) -> None:
        if self.bar is None:
            steps_done = MofNCompleteColumn(table_column=Column(no_wrap=True))
            columns = ("there", BarColumn(), steps_done, TextColumn("{task.fields[status]}", markup=False))
            self.bar = Progress(*columns, console=self.console)
            self.bar.add_task("", total=steps, status=status)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=step, total=steps, status=status)
        if step >= steps:  # what comes after training has no steps
            self.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _keep(self, line: str) -> None:
        try:
            self.log.write(line + "\n")
            self.log.flush()
        except OSError as error:  # a full disk here is no reason to end a job there
            if self.keeps:
                self.echo(f"the log is kept no longer ({error})")
            self.keeps = False

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
            self.echo(f"brought back {counted(len(names), 'file')} to {folder}")
        for name in ended.get("left", []):
            self.echo(f"  too large to come back through the log: {name}")
        for node, reader in enumerate(self.readers):
            if reader.ended and (said := reader.ended.get("said")):
                self.echo(f"node {node}: {said}" if len(self.readers) > 1 else said)
        # Killed, because another one had failed: that one's code says more.
        return self.failed if ended["exit_code"] in KILLED else int(ended["exit_code"])
