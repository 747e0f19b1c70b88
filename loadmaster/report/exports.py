"""What each exported format can still do: the lab report of the quality gate, and its picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from loadmaster.files import as_object
from loadmaster.report import units
from loadmaster.report.evaluation import side
from loadmaster.report.export_chart import NARROW, WIDE, Point, draw_exports
from loadmaster.report.inputs import RunFiles, dig, number


@dataclass(frozen=True)
class Measured:
    """A figure, and the limit that it was held against (empty where there was none)."""

    value: str
    limit: str = ""


NONE = Measured(units.MISSING)


@dataclass(frozen=True)
class Export:
    name: str
    size: str
    perplexity_ratio: Measured
    mean_kl: Measured
    p99_kl: Measured
    top1: Measured
    flipped: Measured
    task: Measured
    verdict: str = ""
    """passed, rejected, or empty for the rows that are not exports."""
    notes: tuple[str, ...] = ()
    """Why it was rejected; which of several candidates was taken."""


def exports_section(files: RunFiles) -> list[Export] | None:
    """The base and the trained model, each format, and what an attempt after them did not get published."""
    exports, rejected = published(files), _figures(files, "rejected_exports")
    if not exports and not rejected:
        return None
    base_task, trained_task = (number(dig(side(files, name), "task.metric")) for name in ("before", "after"))
    rows = [
        Export("base model", units.MISSING, NONE, NONE, NONE, NONE, NONE, Measured(units.percent(base_task))),
        Export("as trained", units.MISSING, Measured("1.0000"), Measured(_mean_kl(0.0)), Measured("0.0000"),
               Measured("100.00%"), Measured("0.0%"), Measured(units.percent(trained_task))),
    ]
    for name, facts in exports.items():
        rows += [_export(name, facts, trained_task), *_others(name, facts)]
    again = " (made again, not published)"
    for name, facts in rejected.items():
        shown = name + again * (name in exports)
        rows += [_export(shown, facts, trained_task), *_others(shown, facts)]
    return rows


def exports_chart(files: RunFiles) -> tuple[Markup, Markup] | None:
    """For a wide screen and for a phone; None where fewer than two formats have a size and a KL to compare."""
    points = []
    for name, facts in (published(files) | _figures(files, "rejected_exports")).items():
        figures = _verification(facts)
        size, kl = number(facts.get("bytes")), number(dig(figures, "mean_kl"))
        if size is not None and kl is not None:
            limit = number(dig(figures, "limits.max_mean_kl"))
            points.append(Point(name, size / 1e6, kl, limit, figures.get("passed") is True))
    return (draw_exports(points, WIDE), draw_exports(points, NARROW)) if len(points) > 1 else None


def _mean_kl(value: Any) -> str:
    return units.decimals(value, 5)  # of bf16 four would be zeros


def published(files: RunFiles) -> dict[str, dict[str, Any]]:
    """Facts of each format: what result.json says of all of them, and the manifests of those that were published."""
    found = _figures(files, "exports")
    for name, manifest in files.manifests.items():
        found[name] = {**found.get(name, {}), **manifest}
    return found


def _figures(files: RunFiles, key: str) -> dict[str, dict[str, Any]]:
    return {str(k): v for k, v in as_object(files.result.get(key)).items() if isinstance(v, dict)}


def _verification(facts: dict[str, Any]) -> dict[str, Any]:
    """A manifest has the figures under a name of their own, result.json has them bare."""
    return facts["verification"] if isinstance(facts.get("verification"), dict) else facts


def _export(name: str, facts: dict[str, Any], trained_task: float | None) -> Export:
    figures = _verification(facts)

    def measured(key: str, show: Callable[[Any], str], bound: str, sign: str) -> Measured:
        limit = dig(figures, f"limits.{bound}")
        return Measured(show(dig(figures, key)), "" if number(limit) is None else f"{sign} {show(limit)}")

    retention = number(dig(figures, "limits.min_task_retention"))
    least = None if retention is None or trained_task is None else retention * trained_task
    return Export(
        name=name,
        size=units.file_size(facts.get("bytes")),
        perplexity_ratio=measured("perplexity_ratio", units.decimals, "max_perplexity_ratio", "at most"),
        mean_kl=measured("mean_kl", _mean_kl, "max_mean_kl", "at most"),
        p99_kl=measured("p99_kl", units.decimals, "max_p99_kl", "at most"),
        top1=measured("top1_agreement", lambda v: units.percent(v, 2), "min_top1_agreement", "at least"),
        flipped=measured("flipped_answers", units.percent, "max_flipped_answers", "at most"),
        task=Measured(
            units.percent(dig(figures, "task.metric")), "" if not least else f"at least {units.percent(least)}"
        ),
        verdict="passed" if figures.get("passed") is True else "rejected",
        notes=(*map(str, figures.get("failures") or []), *_chosen(figures)),
    )


def _others(name: str, facts: dict[str, Any]) -> list[Export]:
    """The candidates of a format that were scored and not taken."""
    figures = _verification(facts)
    candidates = figures.get("candidates")
    if not isinstance(candidates, dict):
        return []
    return [
        Export(
            f"{name}: {other}", units.MISSING, Measured(units.decimals(dig(scores, "perplexity_ratio"))),
            Measured(_mean_kl(dig(scores, "mean_kl"))), Measured(units.decimals(dig(scores, "p99_kl"))),
            Measured(units.percent(dig(scores, "top1_agreement"), 2)),
            Measured(units.percent(dig(scores, "flipped_answers"))),
            Measured(units.percent(dig(scores, "task.metric"))),
        )
        for other, scores in candidates.items() if other != figures.get("candidate")
    ]


def _chosen(figures: dict[str, Any]) -> list[str]:
    """Which candidate was taken, where a format had several."""
    candidates = figures.get("candidates")
    if not isinstance(candidates, dict):
        return []
    scores = (f"{name} {_mean_kl(dig(score, 'mean_kl'))}" for name, score in candidates.items())
    return [f"{figures.get('candidate')} was taken, by mean KL: {', '.join(scores)}"]
