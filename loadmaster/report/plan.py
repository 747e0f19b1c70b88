"""The plan and its memory, as the page shows them: what was decided, by whom, why, and what else was possible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loadmaster.files import as_object
from loadmaster.preflight.plan import FIRST
from loadmaster.report import units
from loadmaster.report.inputs import RunFiles, dig, number, rows
from loadmaster.report.overview import MEASURED_PEAK, PLANNED_WITH, off_by, place, predicted_gib, predicted_peak

COMPONENTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer states", "activations": "activations",
    "logits": "logits and loss", "quantization": "quantization", "communication": "communication buffers",
    "context": "context and workspaces",
}
MEASURED = {
    "peak_allocated_gib": ("allocated by tensors", "the allocator's own count"),
    "peak_reserved_gib": ("reserved by the allocator", "tensors and what it keeps for reuse"),
    MEASURED_PEAK: ("in use on the device", "everything, context included; this is what must fit"),
}
FIELDS = {"optimizer": "optimizer.name", "learning_rate": "optimizer.lr"}
"""The job's, where the plan's name is another."""


@dataclass(frozen=True)
class Decision:
    name: str
    value: str
    by: str
    """`job` where the user wrote it, `preflight` where it was auto, empty where it is not a setting."""


@dataclass(frozen=True)
class Part:
    """A share of a bar. share: of the bar's full length, 0 to 1; key: names its colour in the style sheet."""

    key: str
    label: str
    gib: float
    share: float


@dataclass(frozen=True)
class Bar:
    parts: list[Part]
    total: float
    budget: float | None
    budget_at: float
    """Where the budget lies on the bar, 0 to 1."""


@dataclass(frozen=True)
class Phase:
    label: str
    gib: float
    budget_at: float
    """Where the budget lies on its bar, 0 to 1."""
    parts: list[Part]


@dataclass(frozen=True)
class PlanSection:
    fits: bool
    refusal: str | None
    """Why it cannot run, where memory is not why."""
    planned_with: str | None
    """What was changed of a job that cannot run as asked, for these figures."""
    place: str
    decisions: list[Decision]
    amounts: list[tuple[str, str]]
    """What follows from the decisions, with units."""
    bar: Bar
    phases: list[Phase]
    reasons: list[str]
    rejected: list[dict[str, Any]]
    alternatives: list[dict[str, Any]]
    runners_up: list[dict[str, Any]]
    elsewhere: list[dict[str, Any]]
    elsewhere_order: str
    """Of those machines, in words; empty where the plan does not say."""
    basis: list[tuple[str, str]]
    """Where the figures come from, and what they leave out."""


@dataclass(frozen=True)
class Comparison:
    name: str
    note: str
    gib: float
    share: float
    difference: str


@dataclass(frozen=True)
class MemorySection:
    predicted: float
    predicted_share: float
    measured: list[Comparison]
    parts: list[dict[str, Any]]


def plan_section(files: RunFiles) -> PlanSection | None:
    plan = files.plan
    if not plan:
        return None
    rejected = rows(plan.get("rejected"))
    is_refused = plan.get("fits") is False and bool(rejected) and not any(row.get("plan") for row in rejected)
    runners_up = [row.get("difference") for row in rows(plan.get("runners_up"))]  # they have a table of their own
    return PlanSection(
        fits=plan.get("fits") is not False,
        refusal=str(rejected[0].get("reason")) if is_refused else None,
        planned_with=plan.get("planned_with"),
        place=place(plan),
        decisions=decisions(files),
        amounts=amounts(plan),
        bar=memory_bar(plan),
        phases=_phases(plan),
        reasons=[str(reason) for reason in plan.get("reasons") or [] if reason not in runners_up],
        rejected=rejected,
        alternatives=rows(plan.get("alternatives")),
        runners_up=rows(plan.get("runners_up")),
        elsewhere=[{**row, "place": machine(row), "plan": _there(row, plan)} for row in rows(plan.get("elsewhere"))],
        elsewhere_order=FIRST.get(str(plan.get("elsewhere_order")), ""),
        basis=[(str(key).replace("_", " "), str(text)) for key, text in as_object(plan.get("basis")).items()],
    )


def machine(row: dict[str, Any]) -> str:
    nodes = number(row.get("nodes")) or 1
    return (f"{nodes:.0f} nodes of " if nodes > 1 else "") + f"{row.get('count')}x {row.get('gpu')}"


def _there(row: dict[str, Any], plan: dict[str, Any]) -> str:
    """The plan on another machine; a batch that had to be another one makes it another training run."""
    parts = [row.get("precision"), *([row.get("sharding")] if row.get("sharding") != "none" else [])]
    some = row.get("checkpointed_layers")
    of = f"{some} of {as_object(plan.get('model')).get('layers')} layers"
    parts += [f"activation checkpointing {row.get('activation_checkpointing') if some is None else of}"]
    parts += [f"{row['offload']} in host memory"] if row.get("offload", "none") != "none" else []
    parts += [units.things(row.get("micro_batch_size"), "row")]
    size = number(row.get("global_size"))
    parts += [] if size in (None, _rows_per_step(plan)) else [f"batch.global_size={size:.0f}"]
    return ", ".join(map(str, parts))


def _rows_per_step(plan: dict[str, Any]) -> float | None:
    keys = ("micro_batch_size", "gradient_accumulation_steps", "hardware.count", "hardware.nodes")
    factors = [number(dig(plan, key)) for key in keys]
    return None if None in factors else math.prod(factor for factor in factors if factor is not None)


def _checkpointing(plan: dict[str, Any]) -> str:
    kind, layers = str(plan.get("activation_checkpointing", units.MISSING)), plan.get("checkpointed_layers")
    of = f", the first {layers} of {as_object(plan.get('model')).get('layers')} layers"
    return kind if layers is None else kind + of


def decisions(files: RunFiles) -> list[Decision]:
    plan = files.plan
    rate = number(plan.get("learning_rate"))

    def row(name: str, key: str, value: str | None = None) -> Decision:
        given = files.job(FIELDS.get(key, key))
        by = "" if given is None else "preflight" if given == "auto" else "job"
        return Decision(name, str(plan.get(key, units.MISSING)) if value is None else value, by)

    master = ", fp32 master weights" if plan.get("master_weights") else ""
    master += ", in the backward pass" if plan.get("optimizer_in_backward") else ""
    return [
        row("method", "method"),
        row("precision", "precision"),
        row("optimizer", "optimizer", f"{plan.get('optimizer', units.MISSING)}{master}"),
        *([row("peak learning rate", "learning_rate", f"{rate:g}")] if rate is not None else []),
        row("sharding", "sharding"),
        row("offload", "offload"),
        row("activation checkpointing", "activation_checkpointing", _checkpointing(plan)),
        row("layers compiled", "compile", "yes" if plan.get("compile") else "no"),
        row("sequence length", "sequence_length", units.things(plan.get("sequence_length"), "token")),
        row("micro-batch", "micro_batch_size", units.things(plan.get("micro_batch_size"), "packed row")),
        row("gradient accumulation", "gradient_accumulation_steps",
            units.things(plan.get("gradient_accumulation_steps"), "micro-batch", "micro-batches")),
    ]


def amounts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    hours, cost, traced = number(plan.get("hours")), number(plan.get("cost_usd")), number(dig(plan, "trace.traced_gib"))
    rows_per_step = _rows_per_step(plan)
    length = number(plan.get("sequence_length"))
    on_cpu = dig(plan, "hardware.gpu") == "cpu"
    counted = "training time" if on_cpu else f"time {PLANNED_WITH}"
    return [
        ("parameters", units.parameters(dig(plan, "model.parameters"))),
        ("trained", units.parameters(dig(plan, "model.trainable_parameters"))),
        ("one optimizer step", units.things(rows_per_step, "row")),
        ("tokens in it, at most",
         units.count(None if rows_per_step is None or length is None else rows_per_step * length)),
        ("memory of the host" if on_cpu else "memory of one GPU", units.gib(dig(plan, "hardware.memory_gib"))),
        ("host memory needed per node", units.gib(plan.get("host_memory_gib"))),
        ("disk needed", units.gib(plan.get("disk_gib"))),
        ("speed, modelled", units.rate(plan.get("tokens_per_second"))),
        (f"{counted}, modelled", units.hours(hours) + ("" if cost is None else f", {units.usd(cost)}")),
        *([(f"traced, {dig(plan, 'trace.of')}", units.gib(traced))] if traced is not None else []),
    ]


def memory_bar(plan: dict[str, Any]) -> Bar:
    """Components of the training step's peak against the budget; the bar is as long as the larger of the two."""
    values = {key: number(dig(plan, f"memory_gib.{key}")) or 0.0 for key in COMPONENTS}
    total = number(dig(plan, "memory_gib.total")) or sum(values.values())
    budget = number(plan.get("budget_gib"))
    full = max(total, budget or 0.0) or 1.0
    parts = [Part(key, label, values[key], values[key] / full) for key, label in COMPONENTS.items()]
    return Bar(parts, total, budget, (budget or 0.0) / full)


def _phases(plan: dict[str, Any]) -> list[Phase]:
    """Each phase of the run with its components, on bars of one length; of an old plan only the totals."""
    found: dict[str, dict[str, float]] = {
        str(name): {key: number(as_object(parts).get(key)) or 0.0 for key in COMPONENTS}
        for name, parts in as_object(plan.get("phase_components_gib")).items()
    }
    if not found:
        totals = as_object(dig(plan, "phases_gib"))
        found = {str(name): {"phase": number(gib) or 0.0} for name, gib in totals.items() if number(gib)}
    budget = number(plan.get("budget_gib")) or 0.0
    full = max([*(sum(parts.values()) for parts in found.values()), budget], default=0.0) or 1.0
    return [
        Phase(
            name.replace("_", " "), sum(parts.values()), budget / full,
            [Part(key, COMPONENTS.get(key, "in all"), gib, gib / full) for key, gib in parts.items() if gib > 0],
        )
        for name, parts in found.items()
    ]


def memory_section(files: RunFiles) -> MemorySection | None:
    """Predicted against measured; None before anything was measured."""
    predicted = predicted_gib(files)
    measured = {key: number(files.result.get(key)) for key in MEASURED}
    known = {key: value for key, value in measured.items() if value is not None}
    if predicted is None or not known:
        return None
    names = MEASURED
    if dig(files.plan, "hardware.gpu") == "cpu":  # there the three figures are one
        known = {MEASURED_PEAK: max(known.values())}
        names = {MEASURED_PEAK: ("resident set of the process", "largest, as the system counts it")}
    full = max(predicted, *known.values(), 1e-9)
    on_cpu = dig(files.plan, "hardware.gpu") == "cpu"
    counted = {key: (None if on_cpu else predicted_peak(files, key)) or predicted for key in known}
    return MemorySection(
        predicted, predicted / full,
        [Comparison(*names[key], value, value / full, off_by(counted[key], value)) for key, value in known.items()],
        _parts(files),
    )


def _parts(files: RunFiles) -> list[dict[str, Any]]:
    """What the rehearsal's worst step took of each part, where a GPU could tell."""
    found = as_object(dig(files.result, "prediction.parts"))
    return [{"name": str(name), **as_object(row)} for name, row in found.items()]
