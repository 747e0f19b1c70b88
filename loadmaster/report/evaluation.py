"""What the model could do before, and can do now."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from loadmaster.files import as_object
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
class Sample:
    prompt: str
    reference: str
    before: str | None
    before_right: bool | None
    after: str | None
    after_right: bool | None


def evaluation_section(files: RunFiles) -> list[Change] | None:
    before, after = (side(files, name) for name in ("before", "after"))
    if not before and not after:
        return None

    def pair(key: str) -> tuple[Any, Any]:
        return dig(before, key), dig(after, key)

    of = {"held_out.pairs": "of a pair", "held_out.answers": "of a labelled answer"}
    unit = next((said for key, said in of.items() if pair(key)[1]), "nats per token")
    found = [
        _change("loss", unit, *pair("held_out.loss"), units.decimals),
        _change("perplexity", "", *pair("held_out.perplexity"), lambda v: units.significant(v, 4)),
        _change("chosen answers preferred", "", preferred(before), preferred(after), units.percent, points=True),
        _change("reward of desirable answers", "", *pair("held_out.reward_desirable"), units.decimals),
        _change("reward of undesirable answers", "", *pair("held_out.reward_undesirable"), units.decimals),
        _change("answers right", "the task metric", *pair("task.metric"), units.percent, points=True),
        _change("answers that are valid JSON", "", *pair("task.valid_json"), units.percent, points=True),
        _change("fields right", "", *pair("task.field_match"), units.percent, points=True),
    ]
    first, second = map(as_object, pair("task.per_field"))
    for name in second or first:
        found.append(_change(name, "", first.get(name), second.get(name), units.percent, points=True, is_part=True))
    return [change for change in found if {change.before, change.after} != {units.MISSING}]


def preferred(figures: dict[str, Any]) -> Any:
    """The share of pairs whose chosen answer is preferred; None where all are ties."""
    held_out = as_object(dig(figures, "held_out"))
    return None if are_ties(held_out) else held_out.get("reward_accuracy")


def are_ties(figures: dict[str, Any]) -> bool:
    """Whether no answer of a pair is preferred to the other: the model is its own reference still."""
    return figures.get("reward_accuracy") == figures.get("reward_margin") == 0


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


def samples_section(files: RunFiles) -> list[Sample] | None:
    """Answers before and after to the same prompts, in the order in which they were generated."""
    before, after = (_samples(side(files, name)) for name in ("before", "after"))
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


def _samples(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the task's answers, or those that were asked for to be read alone."""
    return rows(dig(figures, "task.samples")) or rows(figures.get("samples"))


def side(files: RunFiles, name: str) -> dict[str, Any]:
    return as_object(files.evaluation.get(name))


def _cut(text: Any) -> str:
    whole = str(text)
    more = len(whole) - LONGEST_SAMPLE
    return whole if more <= 0 else f"{whole[:LONGEST_SAMPLE]}… ({more:,} more characters)"
