"""Serving plans as people read them: a bar for each part of the card, then what fits, then what it costs."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadmaster.preflight.serving import ServingPlan, machines_for
from loadmaster.preflight.serving_speed import Traffic
from loadmaster.streams import Output
from loadmaster.tables import figure, memory_table, print_table

REASONING_FACTOR = 8
"""Answers with long reasoning, as an example."""
BEST_OF = 8
ROUNDING = 1.01
"""Over the budget, by which parts that fill it may be more: each is rounded."""


def print_serving(plan: ServingPlan, variants: dict[str, ServingPlan]) -> None:
    """One server: memory of each card, tokens of cache, requests, price; and the same card under `variants`."""
    console = Output()
    place = f"{plan.gpus}x {plan.gpu}"
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    console.print(f"[bold]{escape(plan.model)}[/] {plan.format} on {place}: {verdict}", highlight=False)
    print_table(_memory(plan, console), console)
    lines = [
        f"cache: {plan.cache_tokens:,} tokens at {_kib(plan.cache_bytes_per_token)} ({plan.cache_dtype}), "
        f"{plan.concurrent_requests:,.1f} requests of {plan.context:,} tokens at once",
        f"checkpoint: {plan.weights_gb:,.2f} GB",
    ]
    if plan.tokens_per_second is not None and plan.first_token_s is not None:
        lines.append(
            f"speed (modelled): first token after {1000 * plan.first_token_s:,.0f} ms when idle, "
            f"{plan.tokens_per_second:,.0f} answer tokens/s when full"
        )
    if plan.pod_usd_per_hour is not None:
        per_million = plan.usd_per_million_tokens
        million = "" if per_million is None else f", ${per_million:.2f} a million tokens"
        flex = "" if plan.flex_usd_per_hour is None else f"; Flex worker ${plan.flex_usd_per_hour:.2f}/h while it runs"
        lines.append(f"price: Pod ${plan.pod_usd_per_hour:.2f}/h{million}{flex} ({plan.prices})")
    else:
        lines.append(f"price: none is known of {plan.gpu}")
    lines += [f"- {note}" for note in plan.notes]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)
    if plan.fits and variants:
        print_table(_comparison({"as asked": plan, **variants}, first="traffic"), console)


def _kib(size: float) -> str:
    return f"{size / 1024:,.0f} KiB" if size >= 10 * 1024 else f"{size / 1024:.3g} KiB"


def print_held(plan: ServingPlan, requests: float) -> None:
    """Whether one such server holds the requests that were asked for, and how many of them do."""
    machines = machines_for(plan, requests)
    asked = f"the {requests:,g} requests at once that were asked for"
    said = f"{plan.gpus}x {plan.gpu} holds {asked}"
    if machines != 1:
        enough = "and no number of such machines does" if machines is None else f"{machines:,} such machines do"
        said = f"{plan.gpus}x {plan.gpu} does not hold {asked}: {enough}"
    Output().print(said, style="green" if machines == 1 else "red", highlight=False, soft_wrap=True)


def print_servers(plans: list[ServingPlan]) -> None:
    """Several machines side by side: tokens of cache, requests at once, answer tokens a second, dollars."""
    print_table(_comparison({f"{p.gpus}x {p.gpu}": p for p in plans}, first="machine"), Output())


def what_if(traffic: Traffic, known: int | None = None) -> dict[str, Traffic]:
    """The multipliers on occupancy that people forget; known: the model's positions, of which requests have no more."""
    longer = replace(traffic, output_tokens=traffic.output_tokens * REASONING_FACTOR)
    found = {f"best of {BEST_OF}": replace(traffic, samples=BEST_OF)} if traffic.samples < BEST_OF else {}
    if longer.prompt_tokens + longer.output_tokens <= (known or math.inf):
        found[f"answers {REASONING_FACTOR}x as long"] = longer
    return found


def _memory(plan: ServingPlan, console: Console) -> Table:
    parts = {
        "weights": plan.weights_gib_per_gpu,
        "server": plan.server_gib_per_gpu,
        "cache": plan.cache_gib_per_gpu,
    }
    style = "red" if sum(parts.values()) > plan.budget_gib_per_gpu * ROUNDING else "cyan"
    return memory_table(((name, gib, style) for name, gib in parts.items()), plan.budget_gib_per_gpu, console)


def _comparison(plans: dict[str, ServingPlan], first: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in ("cache tokens", "requests at once", "tokens/s", "Pod $/h", "Flex $/h", "$ a million tokens"):
        table.add_column(heading, justify="right")
    for name, plan in plans.items():
        table.add_row(
            name, f"{plan.cache_tokens:,}", f"{plan.concurrent_requests:,.1f}",
            figure(plan.tokens_per_second, "{:,.0f}"), figure(plan.pod_usd_per_hour, "{:.2f}"),
            figure(plan.flex_usd_per_hour, "{:.2f}"), figure(plan.usd_per_million_tokens, "{:.2f}"),
        )
    return table
