"""Which curves a run has: loss, rewards of preferences, learning rate, throughput and gradient norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from loadmaster.report.charts import Curve, Key, draw
from loadmaster.report.evaluation import are_ties
from loadmaster.report.inputs import RunFiles, dig, number

WIDE, NARROW, COLUMN = (960, 300), (360, 240), (300, 200)
"""CSS pixels: the loss over the whole page and on a phone, and a chart in one of three columns."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    legend: list[Key]
    drawing: Markup
    wide: Markup | None = None
    """The drawing for a wide screen, where there is a separate one."""


@dataclass(frozen=True)
class CurvesSection:
    charts: list[Chart]
    steps: int
    skipped: tuple[int, ...]


def curves_section(files: RunFiles) -> CurvesSection | None:
    if not files.metrics:
        return None
    skipped = tuple(row["step"] for row in files.metrics if "loss" in row and number(row["loss"]) is None)
    charts = [_chart(curve) for curve in curves_of(files, skipped) if len(curve.x)]
    return CurvesSection(charts, files.metrics[-1]["step"], skipped)


def _chart(curve: Curve) -> Chart:
    is_main = curve.title == "Loss"
    return Chart(
        curve.title, curve.unit, curve.legend, Markup(draw(curve, *(NARROW if is_main else COLUMN))),
        Markup(draw(curve, *WIDE)) if is_main else None,
    )


def curves_of(files: RunFiles, skipped: tuple[int, ...]) -> list[Curve]:
    metrics = files.metrics
    planned, clip = number(files.plan.get("tokens_per_second")), number(files.job("optimizer.max_grad_norm"))
    eval_x, eval_y = series(metrics, "eval_loss")
    norm_x, norm_y = series(metrics, "grad_norm")
    judged = [row for row in metrics if not are_ties(row)]
    clips = bool(clip) and bool(norm_y) and max(norm_y) > clip / 3
    return [
        Curve("Loss", _loss_unit(files), "training, each step", *series(metrics, "loss"), missing=skipped,
              others=(("held-out", eval_x, eval_y),) if eval_x else ()),
        Curve("Chosen preferred", "share of pairs", "each step", *series(judged, "reward_accuracy"), from_zero=True),
        Curve("Reward margin", _margin_unit(files), "each step", *series(metrics, "reward_margin")),
        Curve("Learning rate", "at each step", "learning rate", *series(metrics, "lr"), smooth=False, from_zero=True),
        Curve("Throughput", "tokens/s", "measured", *series(metrics, "tokens_per_second"), smooth=False, from_zero=True,
              lines=(("planned", planned),) if planned else ()),
        Curve("Gradient norm", "L2, before clipping", "each step", norm_x, norm_y, may_be_log=True,
              lines=((f"clipped above {clip:g}", clip),) if clips and clip else ()),
    ]


def _loss_unit(files: RunFiles) -> str:
    """Preference losses are means over pairs, or over the labelled answers that kto takes."""
    if files.job("objective") in (None, "sft"):
        return "nats per token"
    return "of a labelled answer" if dig(files.result, "data.format") == "unpaired" else "of a pair"


def _margin_unit(files: RunFiles) -> str:
    if dig(files.result, "data.format") == "unpaired":
        return "desirable less undesirable"
    return "log odds ratio" if files.job("objective") == "orpo" else "chosen less rejected"


def series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Steps and finite values of one logged figure."""
    pairs = [(row["step"], number(row.get(key))) for row in metrics]
    known = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    return tuple(step for step, _ in known), tuple(value for _, value in known)
