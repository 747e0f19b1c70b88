"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

WIDTH_WITH_BAR = 100
"""Columns of a terminal that has room for a bar beside the figures."""


class Display:
    """Shows tokens/s, loss, ETA and peak memory while training."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, console: Console | None):
        """console: None on every rank but the lead, which alone speaks; all write to their own log."""
        self.console = console
        self._log = logging.getLogger("loadmaster")
        self._progress: Progress | None = None
        self._last_plain = 0.0

    def echo(self, message: str) -> None:
        self._log.info(message)
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def start(self, steps: int, done: int) -> None:
        self._started, self._done_before = time.perf_counter(), done
        if self.console is not None and self.console.is_terminal:
            from rich import progress
            from rich.table import Column

            whole = Column(no_wrap=True)  # else steps and times are cut where the line is too long
            figures = progress.MofNCompleteColumn(table_column=whole), progress.TextColumn("{task.fields[status]}")
            left = "eta", progress.TimeRemainingColumn(table_column=whole)
            columns = (*figures, *left)
            if self.console.width >= WIDTH_WITH_BAR:
                elapsed = progress.TimeElapsedColumn(table_column=whole)
                columns = ("training", progress.BarColumn(), *figures, elapsed, *left)
            self._progress = progress.Progress(*columns, console=self.console)
            self._task = self._progress.add_task("training", total=steps, completed=done, status="")
            self._progress.start()

    def step(self, row: dict[str, Any], steps: int, peak_gib: float) -> None:
        """steps: of the whole run; fewer than at its start where it ends early."""
        self._step(row, steps, peak_gib)
        if row.get("eval_loss") is not None:
            self.echo(f"step {row['step']}/{steps}  held-out loss {row['eval_loss']:.4f}")

    def _step(self, row: dict[str, Any], steps: int, peak_gib: float) -> None:
        status = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tok/s  "
            f"peak {peak_gib:.2f} GiB"
        )
        if self._progress is not None:
            self._log.info(f"step {row['step']}/{steps}  {status}")
            self._progress.update(self._task, total=steps, completed=row["step"], status=status)
            return
        now = time.perf_counter()
        if now - self._last_plain < self.PLAIN_EVERY_S and row["step"] < steps:
            return
        self._last_plain = now
        remaining = (now - self._started) / max(1, row["step"] - self._done_before) * (steps - row["step"])
        self.echo(f"step {row['step']}/{steps}  {status}  eta {remaining:.0f} s")

    def answers(self, done: int, wanted: int, when: str) -> None:
        """While answers are generated; a line every PLAIN_EVERY_S."""
        if time.perf_counter() - self._last_plain >= self.PLAIN_EVERY_S:
            self._last_plain = time.perf_counter()
            self.echo(f"  {done} of {wanted} answers {when}")

    def asked(self, split: str, done: int, wanted: int) -> None:
        """While the model before training is asked for its answers; at the end, and every PLAIN_EVERY_S."""
        if done == wanted or time.perf_counter() - self._last_plain >= self.PLAIN_EVERY_S:
            self._last_plain = time.perf_counter()
            self.echo(f"  reference of the {split} answers: {done:,} of {wanted:,} packed rows")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
