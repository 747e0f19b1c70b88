"""What more nodes would bring: the plan for each number of nodes, by the communication model, and where that stops.

    efficiency   tokens a second of a GPU, over those of a GPU on the fewest nodes that fit
    it pays      as long as the tokens a second that added GPUs bring are half of what as many of the first ones do

The job keeps its batch.global_size as long as that gives every GPU a row; beyond, the batch grows with the GPUs, and
the table says so: another batch is another training run. All of it is modelled; no run on several nodes was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from loadmaster import catalog
from loadmaster.config.schema import Job
from loadmaster.errors import ConfigError, Problem
from loadmaster.preflight.hardware import find_hardware
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.plan import Plan

PAYS = 0.5
"""Least share of the first GPUs' speed that an added GPU has to bring."""
MOST_NODES = 1024


@dataclass(frozen=True)
class Step:
    nodes: int
    global_size: int
    plan: Plan
    efficiency: float | None
    """None where the plan does not fit."""
    marginal: float | None
    """The same of the GPUs that were added since the step before; None for the first that fits."""

    @property
    def usd_per_billion_tokens(self) -> float | None:
        price = self.plan.price
        if not self.plan.fits or price is None or not self.plan.tokens_per_second:
            return None
        return price["usd_per_hour"] / 3600 / self.plan.tokens_per_second * 1e9


def parse_nodes(text: str) -> list[int]:
    """`1..64`: powers of two from 1 to 64 and the end itself; `1,3,8`: these. Raises ConfigError for anything else."""
    first, dots, last = text.partition("..")
    numbers = [first, last] if dots else text.split(",")
    if not all(n.isdigit() and 0 < int(n) <= MOST_NODES for n in numbers) or (dots and int(first) > int(last)):
        remedy = f"--nodes 1..64, or --nodes 1,2,6 (from 1 to {MOST_NODES})"
        raise ConfigError([Problem("--nodes", text, "command line", "is no range or list of node counts", remedy)])
    if not dots:
        return sorted({int(n) for n in numbers})
    start, end = int(first), int(last)
    return sorted({start, end, *(2**k for k in range(MOST_NODES.bit_length()) if start < 2**k < end)})


def scaling(job: Job, nodes: list[int], dataset_tokens: int | None) -> list[Step]:
    """The job planned on each number of nodes of the machine that it names.

    Raises ConfigError for a job on the CPU or on a card that the catalogue has no speed for.
    """
    machine = find_hardware(replace(job.hardware, nodes=1))
    if machine.gpu not in catalog.gpus():
        remedy = "hardware=h100_80gb_x8, or any GPU of the catalogue with hardware.gpu and hardware.count"
        problem = Problem("hardware.gpu", machine.gpu, "the job", "has no modelled links between nodes", remedy)
        raise ConfigError([problem])
    steps: list[Step] = []
    for count in nodes:
        world = machine.count * count
        rows = math.ceil(job.batch.global_size / world) * world
        hardware = replace(job.hardware, gpu=machine.gpu, count=machine.count, nodes=count)
        here = replace(job, hardware=hardware, batch=replace(job.batch, global_size=rows))
        plan = make_plan(here, dataset_tokens, with_alternatives=False)
        steps.append(_step(count, rows, plan, [s for s in steps if s.efficiency is not None]))
    return steps


def _step(nodes: int, rows: int, plan: Plan, before: list[Step]) -> Step:
    if not plan.fits or not plan.tokens_per_second:
        return Step(nodes, rows, plan, None, None)
    if not before:
        return Step(nodes, rows, plan, 1.0, None)
    first, last = before[0].plan, before[-1].plan
    each = first.tokens_per_second / first.world_size
    added = plan.tokens_per_second - last.tokens_per_second
    return Step(
        nodes, rows, plan, plan.tokens_per_second / plan.world_size / each,
        added / (plan.world_size - last.world_size) / each,
    )  # fmt: skip


def verdict(steps: list[Step]) -> str:
    """A sentence: up to where more nodes pay."""
    fit = [s for s in steps if s.efficiency is not None]
    if not fit:
        return f"nothing fits on up to {steps[-1].nodes} nodes; `loadmaster plan` says what would"
    last = fit[0]
    for step in fit[1:]:
        if step.marginal < PAYS:
            return (
                f"pays up to {_nodes(last.nodes)}: of those added up to {step.nodes}, a GPU brings {step.marginal:.0%} "
                f"of what one of the first {fit[0].plan.world_size} does"
            )
        last = step
    return f"pays up to {_nodes(last.nodes)}, the most that was asked for"


def print_scaling(job: Job, steps: list[Step], console: Console | None = None) -> None:
    console = console or Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("nodes", "GPUs", "rows a step", "plan", "tokens/s", "efficiency", "hours", "$/h", "$ a billion"):
        table.add_column(heading, justify="left" if heading == "plan" else "right", no_wrap=True)
    for step in steps:
        plan, cost = step.plan, step.usd_per_billion_tokens
        rows = f"{step.global_size}{'' if step.global_size == job.batch.global_size else '*'}"
        said = [str(step.nodes), str(plan.world_size), rows]
        if step.efficiency is None:
            table.add_row(*said, f"does not fit: {plan.memory_gib.total:.0f} of {plan.budget_gib:.0f} GiB")
            continue
        inside = " in each node" if plan.replicas > 1 else ""
        inside += "" if plan.reshard_after_forward else ", whole layers"
        kept = "" if plan.activation_checkpointing == "none" else ", checkpointing"
        table.add_row(
            *said, f"{plan.sharding}{inside}{kept}, {plan.micro_batch_size} x {plan.gradient_accumulation_steps}",
            f"{plan.tokens_per_second:,.0f}", f"{step.efficiency:.0%}",
            "" if plan.hours is None else f"{plan.hours:.2f}",
            "" if plan.price is None else f"{plan.price['usd_per_hour']:.2f}", "" if cost is None else f"{cost:,.0f}",
        )  # fmt: skip
    Console(file=console.file, width=max(console.width, 110)).print(table)  # whole, also in a log
    notes = [verdict(steps)]
    if any(step.global_size != job.batch.global_size for step in steps):
        rows = job.batch.global_size
        notes.append(f"* batch.global_size={rows} does not divide over them: another batch, so another training run")
    largest = next((m["max_nodes"] for m in catalog.machines() if m["gpu"] == steps[-1].plan.hardware.gpu), 1)
    if steps[-1].nodes > largest:
        notes.append(f"clusters that can be rented have up to {_nodes(largest)}; more is simulated")
    notes.append("modelled: bytes over the links' published bandwidths; no run on several nodes was measured")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def _nodes(count: int) -> str:
    return f"{count} node{'' if count == 1 else 's'}"
