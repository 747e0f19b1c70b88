"""What the model could do before, can do now, and can still do in each exported format."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadmaster.report import units
from loadmaster.report.inputs import RunFiles, dig, number, rows

LONGEST_SAMPLE = 4000
"""Characters of a sample that the page shows."""


@dataclass(frozen=True)
class Change:
    name: str
    unit: str
    before: str
    after: str
    difference: str
    is_part: bool = False
    """Whether it is a part of the figure above it."""


@dataclass(frozen=True)
class Measured:
    """A figure, and the limit that it was held against (empty where there was none)."""

    value: str
    limit: str = ""


@dataclass(frozen=True)
class Export:
    name: str
    size: str
    perplexity_ratio: Measured
    mean_kl: Measured
    top1: Measured
    task: Measured
    verdict: str = ""
    """passed, rejected, or empty for the rows that are not exports."""
    notes: tuple[str, ...] = ()
    """Why it was rejected; which of several candidates was taken."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    before: str | None
    before_right: bool | None
    after: str | None
    after_right: bool | None


def evaluation_section(files: RunFiles) -> list[Change] | None:
    before, after = (_side(files, side) for side in ("before", "after"))
    if not before and not after:
        return None

    def pair(key: str) -> tuple[Any, Any]:
        return dig(before, key), dig(after, key)

    found = [
        _change("loss", "nats per token", *pair("held_out.loss"), units.decimals),
        _change("perplexity", "", *pair("held_out.perplexity"), lambda v: units.significant(v, 4)),
        _change("answers right", "the task metric", *pair("task.metric"), units.percent, points=True),
        _change("answers that are valid JSON", "", *pair("task.valid_json"), units.percent, points=True),
        _change("fields right", "", *pair("task.field_match"), units.percent, points=True),
    ]
    first, second = (found if isinstance(found, dict) else {} for found in pair("task.per_field"))
    for name in second or first:
        found.append(_change(name, "", first.get(name), second.get(name), units.percent, points=True, is_part=True))
    return [change for change in found if {change.before, change.after} != {units.MISSING}]


def _change(name: str, unit: str, before: Any, after: Any, show: Any, points: bool = False,
            is_part: bool = False) -> Change:
    first, second = number(before), number(after)
    difference = units.MISSING
    if first is not None and second is not None:
        if points:
            difference = f"{100 * (second - first):+.1f} points".replace("-", "\N{MINUS SIGN}")
        elif first > 0:
            difference = units.signed_percent(second / first - 1)
    return Change(name, unit, show(before), show(after), difference, is_part)


def exports_section(files: RunFiles) -> list[Export] | None:
    """The base and the trained model, then each format; None before anything was exported."""
    exports = _exports(files)
    if not exports:
        return None
    base_task, trained_task = (number(dig(_side(files, side), "task.metric")) for side in ("before", "after"))
    none = Measured(units.MISSING)
    return [
        Export("base model", units.MISSING, none, none, none, Measured(units.percent(base_task))),
        Export("as trained", units.MISSING, Measured("1.0000"), Measured("0.0000"), Measured("100.00%"),
               Measured(units.percent(trained_task))),
        *(_export(name, facts, trained_task) for name, facts in exports.items()),
    ]


def _exports(files: RunFiles) -> dict[str, dict[str, Any]]:
    """Facts of each format: what result.json says of all of them, and the manifests of those that were published."""
    said = files.result.get("exports")
    found = {str(k): v for k, v in said.items() if isinstance(v, dict)} if isinstance(said, dict) else {}
    for name, manifest in files.manifests.items():
        found[name] = {**found.get(name, {}), **manifest}
    return found


def _export(name: str, facts: dict[str, Any], trained_task: float | None) -> Export:
    figures = facts["verification"] if isinstance(facts.get("verification"), dict) else facts

    def measured(key: str, show: Callable[[Any], str], bound: str, sign: str) -> Measured:
        limit = dig(figures, f"limits.{bound}")
        return Measured(show(dig(figures, key)), "" if number(limit) is None else f"{sign} {show(limit)}")

    retention = number(dig(figures, "limits.min_task_retention"))
    least = None if retention is None or trained_task is None else retention * trained_task
    return Export(
        name=name,
        size=units.file_size(facts.get("bytes")),
        perplexity_ratio=measured("perplexity_ratio", units.decimals, "max_perplexity_ratio", "at most"),
        mean_kl=measured("mean_kl", units.decimals, "max_mean_kl", "at most"),
        top1=measured("top1_agreement", lambda v: units.percent(v, 2), "min_top1_agreement", "at least"),
        task=Measured(units.percent(dig(figures, "task.metric")),
                      "" if not least else f"at least {units.percent(least)}"),
        verdict="passed" if figures.get("passed") is True else "rejected",
        notes=(*map(str, figures.get("failures") or []), *_chosen(figures)),
    )


def _chosen(figures: dict[str, Any]) -> list[str]:
    """Which candidate was taken, where a format had several."""
    candidates = figures.get("candidates")
    if not isinstance(candidates, dict):
        return []
    scores = (f"{name} {units.decimals(dig(score, 'mean_kl'))}" for name, score in candidates.items())
    return [f"{figures.get('candidate')} was taken, by mean KL: {', '.join(scores)}"]


def samples_section(files: RunFiles) -> list[Sample] | None:
    """Answers before and after to the same prompts, in the order in which they were generated."""
    before, after = (rows(dig(_side(files, side), "task.samples")) for side in ("before", "after"))
    if not before and not after:
        return None
    pairs = itertools.zip_longest(before, after, fillvalue={})
    return [
        Sample(
            prompt=_cut((second or first).get("prompt")), reference=_cut((second or first).get("reference")),
            before=_cut(first.get("answer")) if first else None, before_right=first.get("right"),
            after=_cut(second.get("answer")) if second else None, after_right=second.get("right"),
        )
        for first, second in pairs
    ]


def _side(files: RunFiles, side: str) -> dict[str, Any]:
    found = files.evaluation.get(side)
    return found if isinstance(found, dict) else {}


def _cut(text: Any) -> str:
    whole = str(text)
    more = len(whole) - LONGEST_SAMPLE
    return whole if more <= 0 else f"{whole[:LONGEST_SAMPLE]}… ({more:,} more characters)"
