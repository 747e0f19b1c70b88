"""What more nodes would bring: the plan for each number of nodes, by the communication model, and where that stops.

    efficiency   tokens a second of a GPU, over those of a GPU on the fewest nodes that fit
    it pays      as long as what added GPUs bring is half of what as many of the first ones do: in tokens a second, and
                 in runs an hour where the length of the run is known, as its start, loading and export stay

The job keeps its batch.global_size as long as that gives every GPU a row; beyond, the batch grows with the GPUs, and
the table says so: another batch is another training run. All of it is modelled; no run on several nodes was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from loadmaster import catalog
from loadmaster.config.schema import Job
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.preflight.batch import dividing, with_rows
from loadmaster.preflight.hardware import find_hardware, from_catalog, unknown_network
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.plan import Plan
from loadmaster.streams import Output
from loadmaster.tables import print_table
from loadmaster.words import counted

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
    run_marginal: float | None
    """The same in whole runs an hour; None also where the hours are not known."""

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
    counts = all(n.isascii() and n.isdigit() and 0 < int(n) <= MOST_NODES for n in numbers)
    if not counts or (dots and int(first) > int(last)):
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
        problem = Problem("hardware.gpu", machine.gpu, IN_THE_JOB, "has no modelled links between nodes", remedy)
        raise ConfigError([problem])
    steps: list[Step] = []
    for count in nodes:
        world = machine.count * count
        rows = dividing(job, world)
        hardware = replace(job.hardware, gpu=machine.gpu, count=machine.count, nodes=count)
        here = replace(with_rows(job, rows), hardware=hardware)
        plan = make_plan(here, dataset_tokens, with_alternatives=False)
        steps.append(_step(count, rows, plan, [s for s in steps if s.efficiency is not None]))
    return steps


def _step(nodes: int, rows: int, plan: Plan, before: list[Step]) -> Step:
    if not plan.fits or not plan.tokens_per_second:
        return Step(nodes, rows, plan, None, None, None)
    if not before:
        return Step(nodes, rows, plan, 1.0, None, None)
    plans = [before[0].plan, before[-1].plan, plan]
    rates = [plan.tokens_per_second for plan in plans]
    runs = None if plan.hours is None else [1 / plan.hours for plan in plans]
    return Step(
        nodes, rows, plan, rates[2] / plan.world_size / (rates[0] / plans[0].world_size), _marginal(plans, rates),
        runs and _marginal(plans, runs),
    )


def _marginal(plans: list[Plan], rates: list[float]) -> float:
    """Of a GPU that the third plan has more than the second, over the rate of one of the first's."""
    added = (rates[2] - rates[1]) / (plans[2].world_size - plans[1].world_size)
    return added / (rates[0] / plans[0].world_size)


def verdict(steps: list[Step], max_steps: int | None = None) -> str:
    """A sentence: up to where more nodes pay, in speed, and for this very run."""
    fit = [s for s in steps if s.efficiency is not None]
    if not fit:
        return f"nothing fits on up to {steps[-1].nodes} nodes; `loadmaster plan` says what would"
    fast = next((k for k, s in enumerate(fit[1:]) if s.marginal < PAYS), len(fit) - 1)
    paid = next((k for k, s in enumerate(fit[1:]) if s.run_marginal is not None and s.run_marginal < PAYS), fast)
    if paid < fast:
        here, more = fit[paid], fit[paid + 1]
        why = "start, loading and export are no shorter on more"
        if max_steps is not None and more.global_size > here.global_size:
            why = f"its {max_steps} steps have more rows there"
        said = "1 node is enough" if here.nodes == 1 else f"more than {here.nodes} nodes do not pay"
        longer = f"; by speed alone it would pay up to {_nodes(fit[fast].nodes)}"
        return f"for this run, {said}: {_compared(here, more)}, as {why}{longer}"
    said = f"pays up to {_nodes(fit[fast].nodes)}"
    if fast == len(fit) - 1:
        said += ", the most that was asked for"
        return said if fast == 0 else f"{said}: {_compared(fit[0], fit[fast])} on {fit[0].nodes}"
    worse = fit[fast + 1]
    return (
        f"{said}: of those added up to {worse.nodes}, a GPU brings {worse.marginal:.0%} of what one of the first "
        f"{fit[0].plan.world_size} does; {_compared(fit[fast], worse)}"
    )


def _compared(one: Step, other: Step) -> str:
    """Time and money of the run, or of a billion tokens where its length is not known."""
    hours, cost = (one.plan.hours, other.plan.hours), (one.plan.cost_usd, other.plan.cost_usd)
    if None in hours:
        cost = one.usd_per_billion_tokens, other.usd_per_billion_tokens
        said = f"{other.nodes} are {other.plan.tokens_per_second / one.plan.tokens_per_second:.1f} times as fast"
        money = "" if None in cost else f", and a billion tokens cost ${cost[1]:,.0f} instead of ${cost[0]:,.0f}"
        return f"{said}{money}"
    times = [_time(hour) for hour in hours]
    instead = f"{times[1]} instead of {times[0]}" if times[0] != times[1] else f"the same {times[0]}"
    money = "" if None in cost else f" and cost ${cost[1]:,.2f} instead of ${cost[0]:,.2f}"
    return f"{other.nodes} take {instead}{money}"


def _time(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:,.1f} h"


def print_scaling(job: Job, steps: list[Step], console: Console | None = None) -> None:
    console = console or Output()
    table = Table(box=None, pad_edge=False)
    figures = ("tokens/s", "efficiency", "hours", "$/h", "$ a billion tokens")
    for heading in ("nodes", "GPUs", "rows a step", "plan", *figures):
        table.add_column(heading, justify="left" if heading == "plan" else "right", no_wrap=heading != "plan")
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
        kept += "" if plan.checkpointed_layers is None else f" {plan.checkpointed_layers} of {plan.model.layers} layers"
        table.add_row(
            *said, f"{plan.sharding}{inside}{kept}, {plan.micro_batch_size} x {plan.gradient_accumulation_steps}",
            f"{plan.tokens_per_second:,.0f}", f"{step.efficiency:.0%}",
            "" if plan.hours is None else f"{plan.hours:.2f}",
            "" if plan.price is None else f"{plan.price['usd_per_hour']:.2f}", "" if cost is None else f"{cost:,.0f}",
        )
    print_table(table, console)
    notes = [verdict(steps, job.max_steps)]
    if all(step.plan.hours is None for step in steps):
        notes.append("hours are not known, as the data is not here; the length of a run decides too (max_steps)")
    if any(step.global_size != job.batch.global_size for step in steps):
        rows = job.batch.global_size
        notes.append(f"* batch.global_size={rows} does not divide over them: another batch, so another training run")
    largest = next((m["max_nodes"] for m in catalog.machines() if m["gpu"] == steps[-1].plan.hardware.gpu), 1)
    if steps[-1].nodes > largest:
        notes.append(f"clusters that can be rented have up to {_nodes(largest)}; more is simulated")
    last = steps[-1].plan.hardware
    notes += filter(None, [unknown_network(from_catalog(last.gpu, last.count, steps[-1].nodes))])
    notes.append("modelled: bytes over the links' published bandwidths; no run on several nodes was measured")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def _nodes(count: int) -> str:
    return counted(count, "node")
