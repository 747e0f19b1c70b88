"""The plan as people read it: a bar for each component against the budget, then why, then what else."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadmaster.preflight.plan import MemoryGib, Plan

BAR_WIDTH = 40


def print_plan(plan: Plan, console: Console | None = None) -> None:
    console = console or Console()
    hardware = plan.hardware
    place = "CPU" if hardware.gpu == "cpu" else f"{hardware.nodes} x {hardware.count} x {hardware.gpu}"
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    console.print(f"[bold]{escape(plan.model.name)}[/] ({plan.model.parameters / 1e9:.2f}B) on {place}: {verdict}")
    console.print(
        f"{plan.method}, {plan.precision}, {plan.optimizer}, sharding {plan.sharding}, offload {plan.offload}, "
        f"checkpointing {plan.activation_checkpointing}, {plan.micro_batch_size} x {plan.gradient_accumulation_steps} rows "
        f"of {plan.sequence_length} tokens on each GPU"
    )
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("component", "left"), ("GiB", "right"), (f"of {plan.budget_gib:.1f} GiB", "left")):
        table.add_column(heading, justify=justify)
    for item in fields(MemoryGib):
        value = getattr(plan.memory_gib, item.name)
        share = value / plan.budget_gib if plan.budget_gib else 0
        filled = min(BAR_WIDTH, round(share * BAR_WIDTH))
        style = "red" if share > 1 else "cyan" if item.name != "total" else "bold"
        table.add_row(item.name, f"{value:.2f}", f"[{style}]{'█' * filled}[/]{'·' * (BAR_WIDTH - filled)}")
    console.print(table)
    phases = ", ".join(f"{f.name} {getattr(plan.phases_gib, f.name):.1f}" for f in fields(plan.phases_gib))
    console.print(f"peaks in GiB: {phases}; host memory {plan.host_memory_gib:.0f} GiB, disk {plan.disk_gib:.0f} GiB")
    if plan.tokens_per_second:
        time = "" if plan.hours is None else f", {plan.hours:.2f} h"
        cost = "" if plan.cost_usd is None else f", ${plan.cost_usd:.2f}"
        console.print(f"{plan.tokens_per_second:,.0f} tokens/s (modelled){time}{cost}")
    for reason in plan.reasons:
        console.print(f"- {escape(reason)}")
    for alternative in plan.alternatives:
        rate = "" if alternative["usd_per_hour"] is None else f", ${alternative['usd_per_hour']:.2f}/h"
        console.print(
            f"  would fit: {escape(alternative['change'])} ({alternative['plan']}; "
            f"{alternative['needs_gib']:.1f} of {alternative['budget_gib']:.1f} GiB{rate})"
        )
