"""The top of the page: what the run is, how far it came, and the figures that matter most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loadmaster.config.schema import STAGES
from loadmaster.files import as_object
from loadmaster.report import units
from loadmaster.report.evaluation import preferred, side
from loadmaster.report.inputs import RunFiles, dig, number

MEASURED_PEAK = "peak_device_gib"
"""What must fit into the device, and so what the plan's total (which counts the context) is compared with."""
PLANNED_WITH = "with start, load and export"
"""What a GPU's hours and dollars have in them; of a CPU nothing is planned but training."""


@dataclass(frozen=True)
class Header:
    recipe: str
    model: str
    place: str
    what: str


@dataclass(frozen=True)
class Stage:
    name: str
    state: str
    """done, failed, partial, stale or waiting; the page's symbol and colour go by it."""
    text: str


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    note: str
    before: str = ""
    unit: str = ""
    """Printed small after the value, where it is not a part of it."""


def header(files: RunFiles) -> Header:
    plan = files.plan
    return Header(
        recipe=str(files.job("recipe") or "run"),
        model=str(dig(plan, "model.name") or files.job("model.name") or "model not known yet"),
        place=place(plan),
        what=", ".join(
            str(part) for part in (plan.get("method"), plan.get("precision"), plan.get("optimizer")) if part
        ),
    )


def place(plan: dict[str, Any]) -> str:
    """The hardware in words: `CPU`, `1 x h100_80gb`, `2 nodes of 8 x h100_80gb`."""
    gpu, count, nodes = (dig(plan, f"hardware.{key}") for key in ("gpu", "count", "nodes"))
    if gpu is None:
        return ""
    if gpu == "cpu":
        return "CPU"
    each = f"{count} \N{MULTIPLICATION SIGN} {gpu}"
    return each if nodes in (None, 1) else f"{nodes} nodes of {each}"


def stages(files: RunFiles) -> list[Stage]:
    last = files.job("stop_after")
    asked = STAGES[: STAGES.index(last) + 1] if last in STAGES else STAGES
    found, newest = [], ""
    for name in STAGES:
        record = files.stages.get(name)
        if isinstance(record, dict):
            took, finished = units.seconds(record.get("seconds")), str(record.get("finished") or "")
            if name == "train" and (step := resumed_after(files)):
                took += f", resumed after step {step}"
            taken, steps = files.result.get("taken_step"), files.result.get("steps")
            if name == "train" and taken not in (None, steps):
                took += f", the weights are those of step {taken} of {steps}"
            if finished < newest:
                found.append(Stage(name, "stale", f"{took}, before an earlier stage ran again"))
            else:
                found.append(Stage(name, "done", took))
            newest = max(newest, finished)
        elif dig(files.result, "failure.stage") == name:
            trained = name == "train" and files.metrics
            after = f" after {units.things(files.metrics[-1].get('step'), 'step')}" if trained else ""
            found.append(Stage(name, "failed", f"failed{after}"))
        elif begun := _begun(files, name):
            found.append(Stage(name, *begun))
        else:
            text = "not run yet" if name in asked else f"not asked for (stop_after={last})"
            found.append(Stage(name, "waiting", text))
    return found


def _begun(files: RunFiles, stage: str) -> tuple[str, str] | None:
    """State of a stage that left something behind but did not finish."""
    if stage == "plan" and files.plan:
        return ("failed", "does not fit") if files.plan.get("fits") is False else ("partial", "not finished")
    if stage == "train" and files.metrics:
        return "partial", f"{units.things(files.metrics[-1].get('step'), 'step')} so far"
    if stage == "evaluate" and files.evaluation:
        return "partial", "not finished"
    if stage == "export" and files.manifests:
        return "partial", "not finished"
    return None


def headlines(files: RunFiles) -> list[Figure]:
    figures = [_task(files), _held_out(files), _speed(files), _peak(files), _wall(files), _cost(files)]
    return [figure for figure in figures if figure is not None]


def _task(files: RunFiles) -> Figure | None:
    before, after = (dig(files.evaluation, f"{side}.task.metric") for side in ("before", "after"))
    if number(before) is None and number(after) is None:
        return None
    rows = dig(files.evaluation, "after.task.rows") or dig(files.evaluation, "before.task.rows")
    task = {"json_fields": "whole JSON answers right", "exact_match": "answers right"}.get(
        str(files.job("evaluation.task")), "answers right"
    )
    note = f"{task}, {units.count(rows)} held-out rows"
    return Figure("Task metric", units.percent(after), note, units.percent(before))


def _held_out(files: RunFiles) -> Figure | None:
    sides = [dig(files.evaluation, f"{name}.held_out") for name in ("before", "after")]
    if not any(isinstance(found, dict) for found in sides):
        return None
    before, after = map(as_object, sides)
    if "reward_accuracy" in after:
        shares = [preferred(side(files, name)) for name in ("before", "after")]
        known = [units.percent(share) for share in shares if share is not None]
        note = f"per pair; chosen answers preferred {' → '.join(known)}" if known else "per pair; neither preferred"
    elif "answers" in after:
        margins = [units.decimals(found.get("reward_margin"), 3) for found in (before, after)]
        note = f"per labelled answer; reward of desirable over undesirable {' → '.join(margins)}"
    else:
        perplexities = [units.significant(found.get("perplexity"), 4) for found in (before, after)]
        note = f"nats per token; perplexity {' → '.join(perplexities)}"
    return Figure("Held-out loss", units.decimals(after.get("loss"), 3), note, units.decimals(before.get("loss"), 3))


def _speed(files: RunFiles) -> Figure | None:
    measured, planned = files.result.get("tokens_per_second"), files.plan.get("tokens_per_second")
    utilisation = number(files.result.get("mfu"))
    notes = []
    if number(measured) is None and files.metrics:  # training has not ended, or failed
        measured, notes = files.metrics[-1].get("tokens_per_second"), ["over the last steps"]
    if number(measured) is None:
        return None if number(planned) is None else Figure(
            "Speed", units.count(planned), "planned, not measured yet", unit="tokens/s"
        )
    notes += [] if number(planned) is None else [f"planned {units.rate(planned)}"]
    notes += [] if utilisation is None else [f"{units.percent(utilisation)} of the peak FLOP/s"]
    return Figure("Speed", units.count(measured), "; ".join(notes), unit="tokens/s")


def _peak(files: RunFiles) -> Figure | None:
    predicted, measured = predicted_gib(files), number(files.result.get(MEASURED_PEAK))
    if predicted is None:
        return None
    if measured is None:
        return Figure("Peak memory", units.gib(predicted), "predicted, not measured yet")
    of_device = predicted_peak(files, MEASURED_PEAK)
    predicted = predicted if of_device is None or dig(files.plan, "hardware.gpu") == "cpu" else of_device
    note = f"predicted {units.gib(predicted)}, {off_by(predicted, measured)}"
    return Figure("Peak memory", units.gib(measured), note)


def predicted_gib(files: RunFiles) -> float | None:
    found = number(files.result.get("predicted_gib"))
    return number(dig(files.plan, "memory_gib.total")) if found is None else found


def predicted_peak(files: RunFiles, counter: str) -> float | None:
    """The prediction of one counter (peak_allocated_gib, ...), as the plan has it."""
    return number(dig(files.plan, f"peak_gib.{counter.removeprefix('peak_').removesuffix('_gib')}"))


def off_by(predicted: float, measured: float) -> str:
    """How far the prediction lies from the measurement, in per cent of the measurement."""
    if measured <= 0 or not math.isfinite(measured):
        return units.MISSING
    share = predicted / measured - 1
    return "exact" if abs(share) < 0.0005 else f"{100 * abs(share):.1f}% too {'high' if share > 0 else 'low'}"


def _wall(files: RunFiles) -> Figure | None:
    seconds = [number(record.get("seconds")) for record in files.stages.values() if isinstance(record, dict)]
    known = [value for value in seconds if value is not None]
    if not known:
        return None
    planned = number(files.plan.get("hours"))
    note = f"{len(known)} of {len(STAGES)} stages"
    if step := resumed_after(files):
        note += f"; of training what came after step {step}"
    if planned is not None:
        took = units.seconds(planned * 3600)
        on_cpu = dig(files.plan, "hardware.gpu") == "cpu"
        note += f"; training planned at {took}" if on_cpu else f"; planned at {took} {PLANNED_WITH}"
    return Figure("Wall time", units.seconds(sum(known)), note)


def resumed_after(files: RunFiles) -> int:
    """The step that the last process to train went on from: the seconds of the stage are its own alone."""
    return int(number(files.result.get("resumed_after_step")) or 0)


def _cost(files: RunFiles) -> Figure | None:
    cost = files.plan.get("cost_usd")
    return None if number(cost) is None else Figure("Cost", units.usd(cost), f"planned, {PLANNED_WITH}")
