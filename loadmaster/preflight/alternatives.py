"""What would fit where nothing does: settings changed, more of the same machines, other machines and their price."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from loadmaster import catalog
from loadmaster.config.schema import Job
from loadmaster.preflight.batch import dividing, with_rows
from loadmaster.preflight.candidate import Candidate
from loadmaster.preflight.explain import describe
from loadmaster.preflight.hardware import Hardware, from_catalog, priced, rentable
from loadmaster.preflight.hours import least_overhead_hours, run_hours, run_usd
from loadmaster.preflight.plan import rounded
from loadmaster.preflight.refusals import COUNTED, TYPED, uncounted_adapters
from loadmaster.preflight.search import search
from loadmaster.preflight.shape import ModelShape

MOST_NODES = 32
GPUS_OF_A_NODE = 8
"""Of a full one, whatever the GPU."""


def alternatives(job: Job, shape: ModelShape, hardware: Hardware, dataset_tokens: int | None) -> list[dict[str, Any]]:
    """What would fit: settings changed on this hardware, more of the same machines, then others, cheapest first."""
    def here(changes: Iterator[tuple[str, Job]]) -> Iterator[dict[str, Any]]:
        for text, changed in changes:
            if best := search(changed, shape, hardware, explain=False).best:
                yield _alternative(text, best, changed, dataset_tokens)

    found = list(here(relaxations(job, shape, hardware))) or list(here(_left_open(job, shape, least=2)))
    others = _on_others(job, shape, hardware, dataset_tokens)
    if not (found or others):  # neither one change nor another machine by itself does
        text, opened = next(_left_open(job, shape, least=1), ("", job))
        shorter = list(_shorter(opened, text))
        found = list(islice(here(iter(shorter)), 1))
        most = shape.max_position or job.sequence_length  # longer ones take longer to replay, and no server takes them
        known = [each for each in shorter if each[1].sequence_length <= most]
        tried = ([(text, opened)] if text else []) + ([] if found else known)
        on_others = (_on_others(changed, shape, hardware, dataset_tokens, text) for text, changed in tried)
        others = next(filter(None, on_others), [])
    return found + others


def _on_others(
    job: Job, shape: ModelShape, hardware: Hardware, dataset_tokens: int | None, changes: str = ""
) -> list[dict[str, Any]]:
    """More of the same machines, then of each other GPU the cheapest that holds the job; changes: made to it before."""
    cheapest: dict[str, dict[str, Any]] = {}
    for other in rentable():
        so_far = cheapest.get(other.gpu)
        if (other.gpu, other.count, other.nodes) == (hardware.gpu, hardware.count, hardware.nodes):
            continue
        if so_far is None or _least_price(job, shape, other, so_far) < _price(so_far):
            tried = _on(job, shape, other, dataset_tokens, changes)
            if tried and (so_far is None or _price(tried) < _price(so_far)):
                cheapest[other.gpu] = tried
    same = [] if hardware.gpu in cheapest else _more_of_the_same(job, shape, hardware, dataset_tokens, changes)
    return same + sorted(cheapest.values(), key=_price)


def _price(option: dict[str, Any]) -> tuple[float, float]:
    """Of the run, then of an hour."""
    return option["cost_usd"] or math.inf, option["usd_per_hour"] or math.inf


def _least_price(job: Job, shape: ModelShape, machine: Hardware, beside: dict[str, Any]) -> tuple[float, float]:
    """What `_price` is on another machine at least, whatever the plan there: all but the training takes as long."""
    rate = priced(machine, job.plan.prices_usd_per_hour).usd_per_hour
    if rate is None:
        return math.inf, math.inf
    least = math.inf if beside["hours"] is None else round(rate * least_overhead_hours(job, shape, rented=True), 2)
    return least, round(rate, 2)


def _more_of_the_same(
    job: Job, shape: ModelShape, hardware: Hardware, dataset_tokens: int | None, changes: str
) -> list[dict[str, Any]]:
    """The fewest full nodes of this GPU on which the job fits."""
    if hardware.gpu not in catalog.gpus():
        return []
    for nodes in range(1, MOST_NODES + 1):
        if found := _on(job, shape, from_catalog(hardware.gpu, GPUS_OF_A_NODE, nodes), dataset_tokens, changes):
            return [found]
    return []


def _on(
    job: Job, shape: ModelShape, machine: Hardware, dataset_tokens: int | None, changes: str
) -> dict[str, Any] | None:
    """The job on another machine, its global batch rounded up to the number of GPUs; None if it does not fit."""
    rows = dividing(job, machine.world_size)
    adjusted = with_rows(job, rows)
    best = search(adjusted, shape, machine, explain=False).best
    if best is None:
        return None
    changed = [changes] * bool(changes) + [f"batch.global_size={rows}"] * (rows != job.batch.global_size)
    text = machine.label + (f" with {' '.join(changed)}" if changed else "")
    return _alternative(text, best, adjusted, dataset_tokens)


PLAIN = "lora.dora=false"
OPEN = ("micro_batch_size", "activation_checkpointing", "checkpointed_layers", "offload", "sharding", "precision")
"""Fields that a plan fills in where they are auto; and the optimizer's name and master weights."""


def _left_open(job: Job, shape: ModelShape, least: int) -> Iterator[tuple[str, Job]]:
    """The job with all that was written and could be auto left to the plan, and adapters that can be counted and
    sharded, where that changes so many things at least."""
    written = [name for name in OPEN if getattr(job, name) != "auto"]
    states = _written_states(job)
    uncounted = uncounted_adapters(job, shape) and job.method != "full"
    whole = job.lora.dora and job.method != "full"
    if uncounted + whole + len(written) + len(states) >= least:
        optimizer = replace(job.optimizer, name="auto", master_weights="auto")
        lora = replace(job.lora, targets=list(COUNTED) if uncounted else job.lora.targets, dora=False)
        plain = [TYPED] * uncounted + [PLAIN] * whole
        text = " ".join(plain + [f"{name}=auto" for name in written] + states)
        yield text, replace(job, optimizer=optimizer, lora=lora, **dict.fromkeys(written, "auto"))


def _written_states(job: Job) -> list[str]:
    names = ("name", "master_weights")
    return [f"optimizer.{name}=auto" for name in names if getattr(job.optimizer, name) != "auto"]


def relaxations(job: Job, shape: ModelShape, hardware: Hardware) -> Iterator[tuple[str, Job]]:
    """The job with one thing changed that the user wrote, and the words that change it."""
    gpus = hardware.world_size
    if uncounted_adapters(job, shape) and job.method != "full":
        yield TYPED, replace(job, lora=replace(job.lora, targets=list(COUNTED)))
    if job.batch.global_size % gpus:
        rows = dividing(job, gpus)
        yield f"batch.global_size={rows}", with_rows(job, rows)
    if job.micro_batch_size != "auto":
        yield "micro_batch_size=auto", replace(job, micro_batch_size="auto")
    for name in OPEN[1:]:
        if getattr(job, name) != "auto":
            names = [name] if name != "activation_checkpointing" or job.checkpointed_layers == "auto" else OPEN[1:3]
            yield " ".join(f"{each}=auto" for each in names), replace(job, **dict.fromkeys(names, "auto"))
    if states := _written_states(job):
        yield " ".join(states), replace(job, optimizer=replace(job.optimizer, name="auto", master_weights="auto"))
    here = job.offload in ("auto", "none") and job.sharding in ("auto", "none", "fsdp")
    if job.optimizer.in_backward == "auto" and job.method == "full" and here:
        stepped = replace(job, optimizer=replace(job.optimizer, in_backward=True, max_grad_norm=0.0))
        said = "optimizer.in_backward=true optimizer.max_grad_norm=0"
        yield said, stepped
        if job.batch.global_size > gpus:
            yield f"{said} batch.global_size={gpus}", with_rows(stepped, gpus)
    lora, plain = replace(job.lora, dora=False), f" {PLAIN}" if job.lora.dora else ""
    if plain and job.method != "full":
        yield PLAIN, replace(job, lora=lora)
    if job.precision not in ("auto", "fp8") and job.method == "lora" and not hardware.is_cpu:
        yield f"precision=fp8{plain}", replace(job, precision="fp8", lora=lora)
    for method in ("lora", "qlora"):
        if job.method not in ("auto", method) and (job.method, method) != ("qlora", "lora"):
            without = method == "qlora" and job.lora.dora
            open_ = "" if job.precision == "auto" else " precision=auto"
            yield (
                f"method={method}{open_}{plain if without else ''}",
                replace(job, method=method, precision="auto", lora=lora if without else job.lora),
            )
    yield from list(_shorter(job))[:2]


def _shorter(job: Job, changes: str = "") -> Iterator[tuple[str, Job]]:
    """The job with rows half as long, and again; changes: made to it before."""
    length, before = job.sequence_length, f"{changes} " if changes else ""
    while (length := length // 32 * 16) >= 256:  # fp8 products take sixteens
        yield f"{before}sequence_length={length}", replace(job, sequence_length=length)


def _alternative(text: str, best: Candidate, job: Job, dataset_tokens: int | None) -> dict[str, Any]:
    hours, rate = run_hours(job, best, dataset_tokens), best.hardware.usd_per_hour
    return {
        "change": text,
        "gpu": best.hardware.gpu,
        "hardware": best.hardware.label,
        "plan": describe(best.setup),
        "needs_gib": round(best.memory.needed_gib, 2),
        "budget_gib": round(best.budget_gib, 2),
        "tokens_per_second": rounded(best.tokens_per_second, 1),
        "hours": rounded(hours, 2),
        "usd_per_hour": rounded(rate, 2),
        "cost_usd": run_usd(hours, rate),
        "price": best.hardware.price_note,
    }
