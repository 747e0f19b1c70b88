"""Task metrics: how many generated answers are right. Pure functions of answers and references.

Every metric returns "metric", the headline figure between 0 and 1 (the share of answers that are exactly
right), and "rows"; a metric may add figures that say where the wrong ones go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from loadmaster.errors import DataError

Metric = Callable[[Sequence[str], Sequence[str]], dict[str, Any]]


def task_metric(name: str, answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """The figures of metric `name` (a key of METRICS) for `answers`, each against its reference.

    Raises DataError when there is nothing to score, or a reference is not what the metric needs.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    if not references:
        raise DataError(
            f"evaluation.task={name} has no held-out conversation to score: give data.validation, or none as task"
        )
    return METRICS[name](answers, references)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """{"metric": share of answers equal to their reference but for white space at the ends, "rows"}."""
    right = [answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True)]
    return {"metric": fmean(right), "rows": len(right)}


def json_fields(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """How well answers match references that are JSON objects.

    metric: share of answers that are the reference: the same fields with the same values, none more.
    valid_json: share that are, from first to last character, one JSON object.
    field_match: share of the reference's fields whose value is right, mean over rows.
    per_field: the same for each field, over the rows whose reference has it.
    rows: answers scored.
    An answer that is not a JSON object (broken, with text around it, a field twice, NaN or Infinity, a bare list
    or number) has every field wrong. The order of fields and the spacing do not matter; types do: "1" is not 1.
    """
    exact, valid, field_match = [], [], []
    per_field: dict[str, list[bool]] = {}
    for row, (answer_text, reference_text) in enumerate(zip(answers, references, strict=True)):
        reference = parse_object(reference_text)
        if reference is None:
            raise DataError(
                f"evaluation.task=json_fields needs references that are JSON objects; number {row + 1} of the held-out "
                f"answers is {reference_text[:80]!r}. Use evaluation.task=exact_match, or none"
            )
        answer = parse_object(answer_text)
        found = {} if answer is None else answer
        fields_right = {name: name in found and _same(found[name], value) for name, value in reference.items()}
        for name, right in fields_right.items():
            per_field.setdefault(name, []).append(right)
        right = answer is not None and all(fields_right.values()) and len(found) == len(reference)
        exact.append(right)
        valid.append(answer is not None)
        field_match.append(fmean(fields_right.values()) if reference else float(right))
    return {
        "metric": fmean(exact),
        "valid_json": fmean(valid),
        "field_match": fmean(field_match),
        "per_field": {name: fmean(rights) for name, rights in per_field.items()},
        "rows": len(exact),
    }


METRICS: dict[str, Metric] = {"json_fields": json_fields, "exact_match": exact_match}


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole of `text` is, or None."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError):  # broken, or nested deeper than the parser goes
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a field given twice: parsers differ in which one they keep."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values. Python's own takes true for 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
