"""The lab report: one row a format, every figure against the model as trained."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from loadmaster.tables import figure

COLUMNS = (
    ("format", "left"), ("MB", "right"), ("ppl", "right"), ("KL", "right"), ("p99 KL", "right"), ("top-1", "right"),
    ("flips", "right"), ("task", "right"), ("kept", "right"), ("passed", "left"),
)


def report_table(results: dict[str, dict[str, Any]]) -> Table:
    """A rich Table of what `export_all` returns.

    MB: 10^6 bytes on disk. ppl: perplexity over the trained model's. KL: nats, mean a token; p99 KL: its 99th
    percentile over tokens. top-1: share of tokens with the same most likely next token. flips: share of greedy
    answers that are not the trained model's. task: the task metric; kept: over the trained model's. Below a format of
    which several were built, the others.
    """
    table = Table(title="exports against the model as trained", padding=0, box=SIMPLE_HEAD)
    for name, justify in COLUMNS:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, figures in results.items():
        table.add_row(*row(name, figures))
        for other, scores in (figures.get("candidates") or {}).items():
            if other != figures.get("candidate"):
                table.add_row(*row(f"  {other}", scores)[:-1], "", style="dim")
    return table


def row(name: str, figures: dict[str, Any]) -> list[str]:
    """The cells of one format; figures that were not measured are left empty."""
    return [
        name,
        figure(figures["bytes"] / 1e6 if "bytes" in figures else None, "{:.1f}"),
        figure(figures.get("perplexity_ratio"), "{:.4f}"),
        figure(figures.get("mean_kl"), "{:.5f}"),
        figure(figures.get("p99_kl"), "{:.4f}"),
        figure(figures.get("top1_agreement"), "{:.1%}"),
        figure(figures.get("flipped_answers"), "{:.1%}"),
        figure((figures.get("task") or {}).get("metric"), "{:.1%}"),
        figure(figures.get("task_retention"), "{:.1%}"),
        "yes" if figures.get("passed") else "no",
    ]


def line(name: str, figures: dict[str, Any]) -> str:
    """The same as one line of a log."""
    cells = zip((column for column, _ in COLUMNS[1:]), row(name, figures)[1:], strict=True)
    return f"{name}: " + ", ".join(f"{column} {cell}" for column, cell in cells if cell)
