"""The lab report: one row a format, every figure against the model as trained."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = (
    ("format", "left"), ("MB", "right"), ("perplexity", "right"), ("KL, nats", "right"), ("top-1", "right"),
    ("task", "right"), ("task kept", "right"), ("passed", "left"),
)  # fmt: skip


def report_table(results: dict[str, dict[str, Any]]) -> Table:
    """A rich Table of what `export_all` returns.

    MB: 10^6 bytes on disk. perplexity: over the trained model's. KL: mean a token. top-1: share of tokens with the
    same most likely next token. task: the task metric; task kept: over the trained model's.
    """
    table = Table(title="exports against the model as trained")
    for name, justify in COLUMNS:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, figures in results.items():
        table.add_row(*row(name, figures))
    return table


def row(name: str, figures: dict[str, Any]) -> list[str]:
    """The cells of one format; figures that were not measured are left empty."""
    if "error" in figures:
        return [name, _cell(_megabytes(figures), "{:.1f}"), "", "", "", "", "", "no"]
    task = figures.get("task") or {}
    return [
        name,
        _cell(_megabytes(figures), "{:.1f}"),
        _cell(figures.get("perplexity_ratio"), "x{:.4f}"),
        _cell(figures.get("mean_kl"), "{:.5f}"),
        _cell(figures.get("top1_agreement"), "{:.2%}"),
        _cell(task.get("metric"), "{:.1%}"),
        _cell(figures.get("task_retention"), "{:.1%}"),
        "yes" if figures.get("passed") else "no",
    ]


def line(name: str, figures: dict[str, Any]) -> str:
    """The same as one line of a log."""
    cells = zip((column for column, _ in COLUMNS[1:]), row(name, figures)[1:], strict=True)
    return f"{name}: " + ", ".join(f"{column} {cell}" for column, cell in cells if cell)


def _megabytes(figures: dict[str, Any]) -> float | None:
    return figures["bytes"] / 1e6 if "bytes" in figures else None


def _cell(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
