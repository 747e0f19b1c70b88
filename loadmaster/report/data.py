"""What the run was trained on, from the summary that the data room gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadmaster.report import units
from loadmaster.report.inputs import RunFiles, dig


def _if_any(figure: Any) -> str:
    return units.count(figure) if figure else units.MISSING


FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "conversations": ("conversations", units.count),
    "rows": ("packed rows", units.count),
    "tokens": ("tokens", units.count),
    "trained_tokens": ("tokens with loss", units.count),
    "fill": ("filled with tokens", units.percent),
    "median_length": ("median length, tokens", units.count),
    "longest": ("longest, tokens", units.count),
    "long_rows.long": ("longer than sequence_length", _if_any),
    "long_rows.cut_tokens": ("tokens of them that were cut off", _if_any),
    "long_rows.dropped": ("left out, or pieces without loss", _if_any),
}


@dataclass(frozen=True)
class DataSection:
    source: str
    figures: list[tuple[str, str, str]]
    """Label, and its value in the training and the validation data."""
    notes: list[str]


def data_section(files: RunFiles) -> DataSection | None:
    summary = files.result.get("data")
    if not isinstance(summary, dict):
        return None
    figures = [
        (label, show(dig(summary, f"train.{key}")), show(dig(summary, f"validation.{key}")))
        for key, (label, show) in FIGURES.items()
    ]
    path = files.job("data.path")
    names = ", ".join(map(str, path)) if isinstance(path, list) else str(path or "")
    parts = [
        names,
        f"format {summary['format']}" if summary.get("format") else "",
        f"{units.count(summary['rows_read'])} rows read, {units.count(summary.get('bad_rows'))} of them bad"
        if "rows_read" in summary else "",
    ]
    return DataSection(
        "; ".join(part for part in parts if part),
        [row for row in figures if set(row[1:]) != {units.MISSING}],
        [str(note) for note in summary.get("notes") or []],
    )
