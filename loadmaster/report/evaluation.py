"""What the model could do before, can do now, and can still do in each exported format."""

from __future__ import annotations

import itertools
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


@dataclass(frozen=True)
class Export:
    name: str
    size: str
    perplexity_ratio: str
    mean_kl: str
    top1: str
    task: str
    verdict: str
    """passed, rejected, or empty for the rows that are not exports."""
    failures: list[str]


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
    found = [
        _change("held-out loss", "nats per token", dig(before, "held_out.loss"), dig(after, "held_out.loss"), units.decimals),
        _change("held-out perplexity", "", dig(before, "held_out.perplexity"), dig(after, "held_out.perplexity"),
                units.significant),
    ]
    figures = {"metric": "task metric: answers right", "valid_json": "answers that are valid JSON",
               "field_match": "fields right"}
    for key, name in figures.items():
        found.append(_change(name, "", dig(before, f"task.{key}"), dig(after, f"task.{key}"), units.percent, points=True))
    fields = dig(after, "task.per_field") or dig(before, "task.per_field") or {}
    for name in fields if isinstance(fields, dict) else ():
        pair = [(dig(side, "task.per_field") or {}).get(name) for side in (before, after)]
        found.append(_change(f"field “{name}” right", "", *pair, units.percent, points=True))
    return [change for change in found if {change.before, change.after} != {units.MISSING}]


def _change(name: str, unit: str, before: Any, after: Any, show: Any, points: bool = False) -> Change:
    first, second = number(before), number(after)
    difference = units.MISSING
    if first is not None and second is not None:
        if points:
            difference = f"{100 * (second - first):+.1f} points".replace("-", "\N{MINUS SIGN}")
        elif first > 0:
            difference = units.signed_percent(second / first - 1)
    return Change(name, unit, show(before), show(after), difference)


def exports_section(files: RunFiles) -> list[Export] | None:
    """The base and the trained model, then each format; None before anything was exported."""
    exports = _exports(files)
    if not exports:
        return None
    base_task, trained_task = (units.percent(dig(_side(files, side), "task.metric")) for side in ("before", "after"))
    return [
        Export("base model", *[units.MISSING] * 4, base_task, "", []),
        Export("as trained", units.MISSING, "1.0000", "0", "100.0%", trained_task, "", []),
        *itertools.starmap(_export, exports.items()),
    ]


def _exports(files: RunFiles) -> dict[str, dict[str, Any]]:
    """Facts of each format: what result.json says of all of them (rejected ones too), and the manifests of those published."""
    said = files.result.get("exports")
    found = {str(k): v for k, v in said.items() if isinstance(v, dict)} if isinstance(said, dict) else {}
    for name, manifest in files.manifests.items():
        found[name] = {**found.get(name, {}), **manifest}
    return found


def _export(name: str, facts: dict[str, Any]) -> Export:
    figures = next((facts[key] for key in ("verification", "figures") if isinstance(facts.get(key), dict)), facts)
    failures = [str(f) for f in facts.get("failures") or figures.get("failures") or []]
    error = facts.get("error") or figures.get("error")
    failures += [str(error)] if error else []
    passed = figures.get("passed", facts.get("passed", "files" in facts and not failures))
    return Export(
        name=name,
        size=units.file_size(facts.get("bytes")),
        perplexity_ratio=units.decimals(figures.get("perplexity_ratio")),
        mean_kl=units.significant(figures.get("mean_kl")),
        top1=units.percent(figures.get("top1_agreement")),
        task=units.percent(dig(figures, "task.metric")),
        verdict="passed" if passed and not failures else "rejected",
        failures=failures,
    )


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
