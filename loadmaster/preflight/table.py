"""The plan as people read it: a bar for each component against the budget, then why, then what else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadmaster import catalog
from loadmaster.preflight.explain import RUNNER_UP
from loadmaster.preflight.plan import FIRST, MemoryGib, PhasesGib, Plan
from loadmaster.preflight.setup import sharding_words
from loadmaster.streams import Output
from loadmaster.tables import figure, memory_table, print_table
from loadmaster.words import counted

ELSEWHERE_ROWS = 6
RUNNERS_UP = 4
LONG_VERIFICATION = 0.2
"""Share of a run's hours from which its verification is named beside them."""


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Verdict and settings, memory by component and phase, speed and price, reasons, runners-up or alternatives."""
    console = console or Output()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    if plan.refusal:
        verdict = f"[red]cannot run as asked[/]: {escape(plan.refusal)}"
    line(f"[bold]{escape(plan.model.name)}[/] ({_billions(plan.model.parameters)}) on {_place(plan)}: {verdict}")
    if plan.planned_with:
        line(f"with {plan.planned_with} it is")
    if plan.has_figures:
        _print_figures(plan, console, line)
    if plan.fits:
        line(_speed(plan))
    if plan.trace:
        found = plan.trace
        line(f"traced, {found['of']}: {found['traced_gib']:.3f} GiB, replayed {found['replayed_gib']:.3f}")
    runners_up = [text for text in plan.reasons if text.startswith(RUNNER_UP)]
    for text in plan.reasons:
        if text not in runners_up[RUNNERS_UP:]:
            line(f"- {escape(text)}")
        elif text == runners_up[-1]:
            line(f"- and {len(runners_up) - RUNNERS_UP} more of them in plan.json")
    for option in plan.alternatives:
        line(f"[yellow]would fit:[/] {_alternative(option)}")
    if plan.elsewhere:
        print_elsewhere(plan, console)
    for subject, text in plan.basis.items() if plan.has_figures or plan.alternatives else ():
        line(f"[dim]{subject.replace('_', ' ')}: {escape(text)}[/]")


def _print_figures(plan: Plan, console: Console, line: Callable[[str], None]) -> None:
    line(_settings(plan))
    print_table(memory_table(_memory(plan), plan.budget_gib, console), console)
    peaks = ", ".join(f"{name.replace('_', ' ')} {gib:.1f}" for name, gib in _phases(plan.phases_gib).items())
    on_cpu = plan.hardware.gpu == "cpu"
    where, host = ("of host memory", "") if on_cpu else ("on each GPU", f"host memory {plan.host_memory_gib:.0f} GiB, ")
    line(f"peaks in GiB {where}: {peaks}; {host}disk {plan.disk_gib:.0f} GiB")
    if plan.peak_gib and not on_cpu:
        seen = plan.peak_gib
        counts = f"allocated {seen.allocated:.2f}, reserved {seen.reserved:.2f}, by the card {seen.device:.2f}"
        line(f"GiB as counted: {counts}")


def _phases(gib: PhasesGib) -> dict[str, float]:
    """Each phase in the order of a run; train and export, which sum some of them up, are left out."""
    order = ("load", "first_step", "steady_step", "evaluate", "save", "resume", "merge", "quantize", "verify")
    return {name: getattr(gib, name) for name in order}


def print_elsewhere(plan: Plan, console: Console) -> None:
    """The job on other machines: the first ones by the objective, and the cheapest."""
    shown = plan.elsewhere[:ELSEWHERE_ROWS]
    cheapest = min(plan.elsewhere, key=lambda row: row["cost_usd"] or row["usd_per_million_tokens"] or math.inf)
    shown += [cheapest] if cheapest not in shown else []
    table = Table(box=None, pad_edge=False)
    for heading in ("on", "plan", "GiB a GPU", "tokens/s", "run hours", "$/h", "run $", "$ a million tokens"):
        table.add_column(heading, justify="left" if heading in ("on", "plan") else "right")
    in_hours = "{:.2f}" if any((row["hours"] or 0) >= 1 for row in shown) else "{:.3f}"  # what is in order shows
    for row in shown:
        nodes = f"{row['nodes']} nodes of " if row["nodes"] > 1 else ""
        parts = [row["precision"], *([row["sharding"]] if row["sharding"] != "none" else [])]
        parts += _recomputed(row["activation_checkpointing"], row.get("checkpointed_layers"), plan.model.layers)
        parts += [f"{row['offload']} in host memory"] if row["offload"] != "none" else []
        parts += [counted(row["micro_batch_size"], "row")]
        asked = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size
        parts += [f"batch.global_size={row['global_size']}"] if row["global_size"] != asked else []
        is_here = all(row[name] == getattr(plan.hardware, name) for name in ("gpu", "count", "nodes"))
        marks = [""] + ["this plan"] * is_here + ["cheapest"] * (row is cheapest)
        table.add_row(
            f"{nodes}{row['count']}x {row['gpu']}{', '.join(marks)}", ", ".join(parts), f"{row['needs_gib']:.1f}",
            figure(row["tokens_per_second"], "{:,.0f}"), figure(row["hours"], in_hours),
            figure(row["usd_per_hour"], "{:.2f}"), figure(row["cost_usd"], "{:.2f}"),
            figure(row["usd_per_million_tokens"], "{:.3f}"),
        )
    left = len(plan.elsewhere) - len(shown)
    more = f" (and {left} more in plan.json)" if left else ""
    dates = " and ".join(sorted({row["price"].rpartition(" of ")[2] for row in shown if row["price"]}))
    objective, order = plan.elsewhere_order, "best first by plan.objective"
    if objective in FIRST:
        order = f"{FIRST[objective]} (plan.objective={objective}; of equals within 2% the cheaper)"
    said = f"machines of the catalogue that hold it{more}, {order}, at list prices of {dates}"
    said += "; a plan made for one may be some per cent faster than this quick search found"
    console.print(f"{said}:", highlight=False, soft_wrap=True)
    print_table(table, console)


def print_comparison(key: str, plans: dict[str, Plan], console: Console | None = None) -> None:
    """Plans of the same job side by side, one for each value of `key`."""
    table = Table(box=None, pad_edge=False)
    table.add_column(key, no_wrap=True)
    for heading in ("on", "fits", "plan"):
        table.add_column(heading, no_wrap=heading != "plan")
    for heading in ("GiB of budget", "tokens/s", "hours", "$/h", "$"):
        table.add_column(heading, justify="right", no_wrap=True)
    for value, plan in plans.items():
        price = plan.price if plan.fits and plan.price else {}
        table.add_row(
            escape(value),
            _place(plan),
            "yes" if plan.fits else "no",
            _brief(plan) if plan.has_figures else "",
            f"{plan.memory_gib.total:.1f} of {plan.budget_gib:.1f}" if plan.has_figures else "",
            figure(plan.tokens_per_second, "{:,.0f}"),
            figure(plan.hours, "{:.2f}"),
            figure(price.get("usd_per_hour"), "{:.2f}"),
            figure(plan.cost_usd, "{:.2f}"),
        )
    print_table(table, console or Output())


def _memory(plan: Plan) -> Iterator[tuple[str, float, str]]:
    for item in fields(MemoryGib):
        gib = getattr(plan.memory_gib, item.name)
        if gib or item.name not in ("quantization", "communication"):
            yield item.name, gib, "red" if gib > plan.budget_gib else "bold" if item.name == "total" else "cyan"


def _brief(plan: Plan) -> str:
    """The plan in a few words; `print_plan` has all of it."""
    parts = [plan.method, plan.precision, plan.optimizer]
    parts += [plan.sharding] if plan.sharding not in ("none", "ddp") else []
    parts += _recomputed(plan.activation_checkpointing, plan.checkpointed_layers, plan.model.layers)
    parts += [f"{plan.offload} offloaded"] if plan.offload != "none" else []
    rows, times = plan.micro_batch_size, plan.gradient_accumulation_steps
    parts += [plan.planned_with] if plan.planned_with else []
    return f"{', '.join(parts)}, {counted(rows, 'row')} x {times} a step"


def _recomputed(kind: str, layers: int | None, of: int) -> list[str]:
    if layers is not None:
        return [f"checkpointing {layers} of {of} layers"]
    return {"none": [], "full": ["checkpointing"]}.get(kind, [f"{kind} checkpointing"])


def _place(plan: Plan) -> str:
    hardware = plan.hardware
    if hardware.gpu == "cpu":
        return "the CPU" if plan.world_size == 1 else f"{plan.world_size} CPU processes"
    nodes = f"{hardware.nodes} nodes of " if hardware.nodes > 1 else ""
    return f"{nodes}{hardware.count}x {hardware.gpu}"


def _settings(plan: Plan) -> str:
    optimizer = plan.optimizer + (" with fp32 master weights" if plan.master_weights else "")
    optimizer += " stepped in the backward pass" if plan.optimizer_in_backward else ""
    parts = [plan.method, plan.precision, optimizer]
    parts += [] if plan.sharding == "none" else [f"sharding {sharding_words(plan)}"]
    parts += [] if plan.offload == "none" else [f"offload {plan.offload}"]
    some = plan.checkpointed_layers
    of = "" if some is None else f" of the first {some} of {plan.model.layers} layers"
    parts.append(f"activation checkpointing {plan.activation_checkpointing}{of}")
    parts += ["layers compiled"] if plan.compile else []
    rows, times = plan.micro_batch_size, plan.gradient_accumulation_steps
    parts.append(f"{counted(rows, 'row')} of {plan.sequence_length} tokens at a time")
    parts += [f"{times} times a step"] if times > 1 else []
    return ", ".join(parts)


def _speed(plan: Plan) -> str:
    speed = plan.tokens_per_second
    if speed is None:
        known = plan.hardware.gpu in ("cpu", *catalog.gpus())
        why = "that of the model's experts is not modelled" if known else "the card is not in the catalogue"
        return f"speed: not predicted, {why}"
    said = f"{_rate(speed)} (modelled)"
    within = "" if plan.hardware.gpu == "cpu" else " with start, load and export"
    verification = plan.verification or {}
    moving = verification.get("moving_hours", 0.0) if verification.get("in_hours", True) else 0.0
    if plan.hours and moving > LONG_VERIFICATION * plan.hours and plan.hardware.gpu != "cpu":
        within += f" ({moving:.1f} h of them moving layers to verify exports: fewer with fewer export.formats,"
        within += " none with stop_after=train)"
    said += "" if plan.hours is None else f", {plan.hours:.2f} h{within}"
    if plan.price:
        said += "" if plan.cost_usd is None else f", ${plan.cost_usd:.2f}"
        listed = ", ".join(plan.price[key] for key in ("provider", "date") if plan.price[key])
        listed += ", community hosts" if plan.price.get("hosts") == "community" else ""
        said += f" at ${plan.price['usd_per_hour']:.2f}/h ({listed})"
    return said


def _rate(tokens_per_second: float) -> str:
    rounded = round(tokens_per_second)
    return f"{counted(rounded, 'token')}/s" if rounded else "less than 1 token/s"


def _alternative(option: dict[str, Any]) -> str:
    rate = "" if option["usd_per_hour"] is None else f", ${option['usd_per_hour']:.2f}/h"
    total = "" if option["cost_usd"] is None else f", ${option['cost_usd']:.2f} in {option['hours']:.1f} h"
    speed = "" if option["tokens_per_second"] is None else f", {_rate(option['tokens_per_second'])}"
    place = "" if option["hardware"] in option["change"] else f" on {option['hardware']}"
    return (
        f"{escape(option['change'])}{place} ({escape(option['plan'])}; {option['needs_gib']:.1f} of "
        f"{option['budget_gib']:.1f} GiB{speed}{rate}{total})"
    )


def _billions(parameters: int) -> str:
    many = f"{parameters / 1e9:.2f} billion" if parameters >= 9.995e8 else f"{parameters / 1e6:.3g} million"
    return f"{many} parameters"
