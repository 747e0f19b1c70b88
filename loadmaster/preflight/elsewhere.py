"""The same job priced on every machine of the catalogue that holds it.

Method, precision and optimizer are those of the plan; sharding, activation checkpointing and micro-batch are chosen
anew, for each machine has others that are best; so is what lives in host memory, where the plan needs that at all. Of a
GPU's clusters only the smallest that is needed is priced. The global batch is kept where it divides over the GPUs, and
else rounded up, which is said.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.preflight.batch import dividing, with_rows
from loadmaster.preflight.candidate import Candidate
from loadmaster.preflight.hardware import Hardware, rentable
from loadmaster.preflight.hours import run_hours, run_usd
from loadmaster.preflight.plan import rounded
from loadmaster.preflight.search import EQUAL_SPEED, search


def elsewhere(job: Job, chosen: Candidate, dataset_tokens: int | None) -> list[dict[str, Any]]:
    """Machines as dicts for plan.json, first what the objective prefers."""
    found, held = [], set()
    for machine in rentable():
        if machine.nodes > 1 and machine.gpu in held:
            continue
        best = _best_on(machine, job, chosen)
        if best is not None:
            held.add(machine.gpu)
            found.append(_row(job, best, dataset_tokens))
    return sorted(found, key=lambda row: _rank(row, job.plan.objective))


def _rank(row: dict[str, Any], objective: str) -> tuple[float, ...]:
    """By the objective; what is as fast (or as large) as another within 2% is ranked by what it costs."""
    cost = row["cost_usd"] or row["usd_per_million_tokens"] or math.inf
    seconds = row["hours"] or 1 / (row["tokens_per_second"] or 1e-9)
    first = {"time": seconds, "cost": cost, "memory": row["needs_gib"]}[objective]
    return round(math.log(first) / math.log(1 + EQUAL_SPEED)), cost, seconds


def _best_on(machine: Hardware, job: Job, chosen: Candidate) -> Candidate | None:
    """The best plan there; the plan itself on the machine that it was made for."""
    here = chosen.hardware
    if (machine.gpu, machine.count, machine.nodes) == (here.gpu, here.count, here.nodes):
        return chosen
    setup = chosen.setup
    job = replace(
        with_rows(job, dividing(job, machine.world_size)),
        method=setup.method,
        offload="none" if setup.offload == "none" else job.offload,
        sharding="auto" if job.sharding == "none" or machine.world_size == 1 else job.sharding,
        optimizer=replace(
            job.optimizer, name=setup.optimizer, master_weights=setup.master_weights, in_backward=setup.in_backward
        ),
        precision=setup.precision if setup.precision != "fp8" or machine.has_fp8 else "auto",
    )
    if here.is_cpu:  # in fp32, weights that are their own masters; on a GPU that is another job
        states = replace(job.optimizer, master_weights="auto" if setup.optimizer == "adamw" else setup.master_weights)
        job = replace(job, precision="bf16", optimizer=states)
    return search(job, chosen.shape, machine, explain=False).best


def _row(job: Job, best: Candidate, dataset_tokens: int | None) -> dict[str, Any]:
    hardware, setup, speed = best.hardware, best.setup, best.tokens_per_second
    hours, rate = run_hours(with_rows(job, setup.global_size), best, dataset_tokens), hardware.usd_per_hour
    return {
        "gpu": hardware.gpu,
        "count": hardware.count,
        "nodes": hardware.nodes,
        "precision": setup.precision,
        "sharding": setup.sharding,
        "replicas": setup.replicas,
        "reshard_after_forward": setup.reshard_after_forward,
        "offload": setup.offload,
        "activation_checkpointing": setup.checkpointing,
        "checkpointed_layers": setup.checkpointed_layers(best.shape),
        "micro_batch_size": setup.micro_batch_size,
        "global_size": setup.global_size,
        "needs_gib": round(best.memory.needed_gib, 2),
        "budget_gib": round(best.budget_gib, 2),
        "tokens_per_second": rounded(speed, 1),
        "hours": rounded(hours, 3),
        "usd_per_hour": rounded(rate, 2),
        "cost_usd": run_usd(hours, rate),
        "usd_per_million_tokens": None if rate is None or not speed else round(rate / 3600 / speed * 1e6, 4),
        "price": hardware.price_note,
    }
