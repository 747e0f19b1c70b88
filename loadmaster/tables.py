"""Tables that lose nothing: whole in a log or a pipe, and in a narrow terminal wrapped where there is text."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from loadmaster.streams import Output

ANY_WIDTH = 10_000
LONGEST_BAR = 40
BESIDE_A_BAR = 26
"""Widest name of a component, its figure and the space between."""


def print_table(table: Table, console: Console) -> None:
    """At its own width; in a terminal narrower than that, closer together and with headings and text wrapped.

    Columns of figures (justified to the right) and no_wrap ones are never cut: where not even they have room beside the
    longest words, lines are longer than the terminal.
    """
    width = _own_width(table, console)
    if console.is_terminal and width > console.width:
        width = _narrow(table, console)
    Output(file=console.file, width=width).print(table)


def memory_table(rows: Iterable[tuple[str, float, str]], budget_gib: float, console: Console) -> Table:
    """A bar against the budget for each (component, GiB, style of its bar)."""
    table, width = Table(box=None, pad_edge=False), max(10, min(LONGEST_BAR, console.width - BESIDE_A_BAR))
    for heading, justify in (("memory", "left"), ("GiB", "right"), (f"of {budget_gib:.1f} GiB", "left")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, gib, style in rows:
        filled = min(width, round(gib / budget_gib * width)) if budget_gib else 0
        table.add_row(name, f"{gib:.2f}", f"[{style}]{'█' * filled}[/]{'·' * (width - filled)}")
    return table


def figure(value: float | None, form: str) -> str:
    """As `form` has it; nothing where it is not known."""
    return "" if value is None else form.format(value)


def _own_width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=ANY_WIDTH), table).maximum


def _narrow(table: Table, console: Console) -> int:
    """Set the columns' widths for this terminal; what the table is wide then."""

    def longest(texts: list[str]) -> int:
        return max((console.render_str(text).cell_len for text in texts), default=0)

    table.collapse_padding = True
    own, widths, text = [], [], []
    for number, column in enumerate(table.columns):
        heading, cells = str(column.header), [str(cell) for cell in column.cells]
        if not column.no_wrap and column.justify != "right":
            text.append(number)
        words = [word for cell in cells for word in cell.split()] if number in text else cells
        own.append(longest([heading, *cells]))
        widths.append(longest([*heading.split(), *words]))
        column.no_wrap = False  # figures have room now, and headings wrap
    beside = _own_width(table, console) - sum(own)
    while beside + sum(widths) < console.width and (cut := [n for n, width in enumerate(widths) if width < own[n]]):
        widths[min(cut, key=lambda n: (n not in text, widths[n]))] += 1  # text first, the narrowest of it
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    return beside + sum(widths)
