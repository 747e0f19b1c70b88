"""From a job to a Plan: enumerate what is open, drop what does not fit, rank the rest by the objective.

Order of preference, most faithful first: method (as plan.methods lists them), then optimizer states, then
what lives in host memory. Inside one such tier everything that fits competes on the objective. What the
user wrote is kept or refused with the number that would fit; only `auto` is chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.preflight.hardware import Hardware, find_hardware, rentable
from loadmaster.preflight.memory import Memory, memory
from loadmaster.preflight.plan import HardwareSummary, ModelSummary, Plan
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape, find_shape
from loadmaster.preflight.speed import model_flops, tokens_per_second

CHECKPOINTING = ("none", "full")
"""What auto chooses from; selective is planned when asked for."""
FULL_STATES = (("adamw", True), ("adamw", False), ("adamw_8bit", False), ("adafactor", False))
"""Optimizer and fp32 master weights for full fine-tuning, most faithful first."""
MOST_ALTERNATIVES = 6


@dataclass(frozen=True)
class Candidate:
    setup: Setup
    memory: Memory
    tokens_per_second: float | None
    hardware: Hardware
    budget_gib: float

    @property
    def fits(self) -> bool:
        host = self.hardware.host_memory_gib
        return self.memory.needed_gib <= self.budget_gib and (host is None or self.memory.host_gib <= host)

    @property
    def missing_gib(self) -> float:
        host = self.hardware.host_memory_gib
        lacking_host = 0.0 if host is None else self.memory.host_gib - host
        return max(self.memory.needed_gib - self.budget_gib, lacking_host, 0.0)


@dataclass(frozen=True)
class Found:
    best: Candidate | None
    others: list[Candidate]
    """Fitting plans that lost, best first."""
    nearest: list[Candidate]
    """Smallest plan of every tier that does not fit."""
    refusals: list[str]
    """Settings that cannot work on this hardware at all."""


def make_plan(job: Job, dataset_tokens: int | None = None) -> Plan:
    """The plan for a job; `fits` is False when there is none, with what came nearest and what would do.

    dataset_tokens: tokens of one epoch, for hours and dollars; None leaves them out unless max_steps is set.
    """
    shape, hardware = find_shape(job.model), find_hardware(job.hardware)
    found = search(job, shape, hardware)
    if found.best is not None:
        return to_plan(job, shape, found.best, found, dataset_tokens)
    nearest = min(found.nearest, key=lambda c: c.missing_gib, default=None) or _fallback(job, shape, hardware)
    plan = to_plan(job, shape, nearest, found, dataset_tokens)
    return replace(plan, fits=False, alternatives=alternatives(job, shape, hardware, dataset_tokens))


def search(job: Job, shape: ModelShape, hardware: Hardware) -> Found:
    refusals = list(refuse(job, hardware))
    if refusals:
        return Found(None, [], [], refusals)
    nearest = []
    for tier in tiers(job, hardware):
        candidates = list(fitting(job, shape, hardware, tier))
        fit = [c for c in candidates if c.fits]
        if fit:
            fit.sort(key=ranking(job))
            return Found(fit[0], fit[1:], nearest, [])
        nearest.append(min(candidates, key=lambda c: c.missing_gib))
    return Found(None, [], nearest, [])


def refuse(job: Job, hardware: Hardware) -> Iterator[str]:
    """What was written and cannot work on this hardware, whatever its memory."""
    if job.precision == "fp8" and not hardware.has_fp8:
        yield f"precision=fp8: {hardware.gpu} has no fp8 matrix units (compute capability 8.9 or later has); use bf16"
    if job.precision == "bf16" and hardware.is_cpu:
        yield "precision=bf16: a CPU trains in fp32; use fp32 or auto"
    if job.sharding not in ("auto", "none") and hardware.world_size == 1:
        yield f"sharding={job.sharding}: there is one GPU; use none or auto"
    if job.sharding == "none" and hardware.world_size > 1:
        yield f"sharding=none: there are {hardware.world_size} GPUs; use ddp, fsdp or auto"
    world, rows = hardware.world_size, job.batch.global_size
    if rows % world:
        yield (
            f"batch.global_size={rows} does not divide over {world} GPUs; use {math.ceil(rows / world) * world}"
        )
    elif job.micro_batch_size != "auto" and (rows // world) % job.micro_batch_size:
        works = ", ".join(map(str, divisors(rows // world)))
        yield (
            f"micro_batch_size={job.micro_batch_size} does not divide the {rows // world} rows that each GPU has of "
            f"batch.global_size={rows}; these do: {works}"
        )


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def tiers(job: Job, hardware: Hardware) -> Iterator[dict[str, Any]]:
    methods = job.plan.methods if job.method == "auto" else [job.method]
    precision = job.precision
    if precision == "auto":
        precision = "fp32" if hardware.is_cpu else "bf16"
    offloads = ("none",) if job.offload == "auto" else (job.offload,)
    for method in methods:
        auto_offloads = ("none", "optimizer") if method == "full" and job.offload == "auto" and not hardware.is_cpu else offloads
        for offload in auto_offloads:
            for optimizer, master in states(job, method, offload, precision):
                yield {
                    "method": method, "precision": precision, "optimizer": optimizer, "master_weights": master,
                    "offload": offload,
                }


def states(job: Job, method: str, offload: str, precision: str) -> Iterator[tuple[str, bool]]:
    ladder = (("adamw", True),) if method != "full" or offload != "none" else FULL_STATES
    if precision == "fp32":
        ladder = tuple(dict.fromkeys((name, False) for name, _ in ladder))
    if job.optimizer.name != "auto":
        masters = list(dict.fromkeys(master for name, master in ladder if name == job.optimizer.name)) or [
            method != "full" and precision != "fp32"
        ]
        ladder = tuple((job.optimizer.name, master) for master in masters)
    if job.optimizer.master_weights != "auto":
        ladder = tuple(dict.fromkeys((name, job.optimizer.master_weights) for name, _ in ladder))
    yield from ladder


def fitting(job: Job, shape: ModelShape, hardware: Hardware, tier: dict[str, Any]) -> Iterator[Candidate]:
    """Candidates of a tier: each sharding and checkpointing with every micro-batch up to the first that fails."""
    if hardware.world_size == 1:
        shardings = ("none",)
    else:
        shardings = ("ddp", "fsdp") if job.sharding == "auto" else (job.sharding,)
    checkpointings = CHECKPOINTING if job.activation_checkpointing == "auto" else (job.activation_checkpointing,)
    rows = job.batch.global_size // hardware.world_size
    sizes = divisors(rows) if job.micro_batch_size == "auto" else [job.micro_batch_size]
    if hardware.is_cpu and len(sizes) > 1:
        sizes = [size for size in sizes if size <= 4]
    for sharding in shardings:
        for checkpointing in checkpointings:
            for size in sizes:
                setup = Setup(
                    **tier, sharding=sharding, checkpointing=checkpointing, micro_batch_size=size,
                    gradient_accumulation_steps=rows // size, sequence_length=job.sequence_length,
                    world_size=hardware.world_size, gpus_per_node=hardware.count, lora_rank=job.lora.rank,
                    lora_targets=tuple(job.lora.targets) if isinstance(job.lora.targets, list) else job.lora.targets,
                    lora_dropout=job.lora.dropout,
                )
                candidate = evaluate(job, shape, hardware, setup)
                yield candidate
                if not candidate.fits:
                    break


def evaluate(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> Candidate:
    return Candidate(
        setup, memory(shape, hardware, setup), tokens_per_second(shape, hardware, setup), hardware,
        hardware.memory_gib * (1 - job.plan.reserve),
    )


def ranking(job: Job):
    if job.plan.objective == "memory":
        return lambda c: (c.memory.needed_gib, -(c.tokens_per_second or 0))
    return lambda c: (-(c.tokens_per_second or 0), c.memory.needed_gib)


def _fallback(job: Job, shape: ModelShape, hardware: Hardware) -> Candidate:
    """The plan that is printed when the settings themselves are refused."""
    tier = next(tiers(job, hardware))
    setup = Setup(**tier, sharding="none" if hardware.world_size == 1 else "fsdp", sequence_length=job.sequence_length,
                  world_size=hardware.world_size, gpus_per_node=hardware.count, lora_rank=job.lora.rank)
    return evaluate(job, shape, hardware, setup)


def alternatives(job: Job, shape: ModelShape, hardware: Hardware, dataset_tokens: int | None) -> list[dict[str, Any]]:
    """What would fit: one setting changed on this hardware, then other machines, cheapest first."""
    found = []
    for change in relaxations(job):
        result = search(change["job"], shape, hardware)
        if result.best is not None:
            found.append(_alternative(change["text"], result.best, change["job"], dataset_tokens))
    machines = []
    for machine in rentable():
        if machine.gpu == hardware.gpu and machine.count == hardware.count and machine.nodes == hardware.nodes:
            continue
        rows = math.ceil(job.batch.global_size / machine.world_size) * machine.world_size
        adjusted = replace(job, batch=replace(job.batch, global_size=rows)) if rows != job.batch.global_size else job
        best = search(adjusted, shape, machine).best
        if best is not None:
            text = machine.label + ("" if rows == job.batch.global_size else f" with batch.global_size={rows}")
            machines.append(_alternative(text, best, adjusted, dataset_tokens))
    machines.sort(key=lambda a: (a["cost_usd"] or math.inf, a["usd_per_hour"] or math.inf))
    return found[:MOST_ALTERNATIVES] + machines[:MOST_ALTERNATIVES]


def relaxations(job: Job) -> Iterator[dict[str, Any]]:
    if job.micro_batch_size != "auto":
        yield {"text": "micro_batch_size=auto", "job": replace(job, micro_batch_size="auto")}
    for name in ("activation_checkpointing", "offload", "sharding", "precision"):
        if getattr(job, name) != "auto":
            yield {"text": f"{name}=auto", "job": replace(job, **{name: "auto"})}
    if job.optimizer.name != "auto" or job.optimizer.master_weights != "auto":
        yield {
            "text": "optimizer.name=auto",
            "job": replace(job, optimizer=replace(job.optimizer, name="auto", master_weights="auto")),
        }
    for method in ("full", "lora", "qlora"):
        if job.method not in ("auto", method):
            yield {"text": f"method={method}", "job": replace(job, method=method)}
    for length in (job.sequence_length // 2, job.sequence_length // 4):
        if length >= 256:
            yield {"text": f"sequence_length={length}", "job": replace(job, sequence_length=length)}


def _alternative(text: str, best: Candidate, job: Job, dataset_tokens: int | None) -> dict[str, Any]:
    hours = run_hours(job, best, dataset_tokens)
    rate = best.hardware.usd_per_hour
    return {
        "change": text,
        "hardware": best.hardware.label,
        "plan": describe(best.setup),
        "needs_gib": round(best.memory.needed_gib, 2),
        "budget_gib": round(best.budget_gib, 2),
        "tokens_per_second": None if best.tokens_per_second is None else round(best.tokens_per_second, 1),
        "hours": None if hours is None else round(hours, 2),
        "usd_per_hour": rate,
        "cost_usd": None if hours is None or rate is None else round(hours * rate, 2),
        "price": best.hardware.price_note,
    }


def describe(setup: Setup) -> str:
    parts = [setup.method, setup.precision, setup.optimizer + (" with fp32 master weights" if setup.master_weights else "")]
    if setup.sharding != "none":
        parts.append(setup.sharding)
    if setup.offload != "none":
        parts.append(f"{setup.offload} in host memory")
    parts.append(f"activation checkpointing {setup.checkpointing}")
    parts.append(f"micro-batch {setup.micro_batch_size}")
    return ", ".join(parts)


def steps(job: Job, dataset_tokens: int | None) -> int | None:
    """Optimizer steps of the run; None when the dataset's size is not known."""
    if job.max_steps is not None:
        return job.max_steps
    if dataset_tokens is None:
        return None
    rows = math.ceil(dataset_tokens / job.sequence_length)
    return math.ceil(math.ceil(rows / job.batch.global_size) * job.epochs)


def run_hours(job: Job, candidate: Candidate, dataset_tokens: int | None) -> float | None:
    count = steps(job, dataset_tokens)
    if count is None or not candidate.tokens_per_second:
        return None
    tokens = count * job.batch.global_size * job.sequence_length
    return tokens / candidate.tokens_per_second / 3600


def to_plan(job: Job, shape: ModelShape, chosen: Candidate, found: Found, dataset_tokens: int | None) -> Plan:
    setup, hardware = chosen.setup, chosen.hardware
    hours = run_hours(job, chosen, dataset_tokens)
    rate = hardware.usd_per_hour
    return Plan(
        fits=found.best is not None,
        model=ModelSummary(
            name=shape.name, parameters=shape.parameters, trainable_parameters=setup.trainable(shape),
            layers=shape.layers, hidden_size=shape.hidden_size, vocabulary_size=shape.vocabulary_size,
            family=shape.family, estimate=shape.estimate,
            flops_per_token=model_flops(shape, job.sequence_length, setup.adapters),
        ),
        hardware=HardwareSummary(
            gpu=hardware.gpu, count=hardware.count, nodes=hardware.nodes, memory_gib=round(hardware.memory_gib, 2),
            host_memory_gib=None if hardware.host_memory_gib is None else round(hardware.host_memory_gib, 2),
        ),
        method=setup.method, precision=setup.precision, sharding=setup.sharding, offload=setup.offload,
        activation_checkpointing=setup.checkpointing, optimizer=setup.optimizer, master_weights=setup.master_weights,
        micro_batch_size=setup.micro_batch_size, gradient_accumulation_steps=setup.gradient_accumulation_steps,
        sequence_length=setup.sequence_length, memory_gib=chosen.memory.train.gib(), phases_gib=chosen.memory.phases,
        budget_gib=round(chosen.budget_gib, 2), host_memory_gib=chosen.memory.host_gib, disk_gib=chosen.memory.disk_gib,
        tokens_per_second=None if chosen.tokens_per_second is None else round(chosen.tokens_per_second, 1),
        hours=None if hours is None else round(hours, 4),
        cost_usd=None if hours is None or rate is None else round(hours * rate, 2),
        reasons=reasons(shape, chosen, found),
        rejected=[rejection(c) for c in found.nearest] + [{"plan": "", "reason": text} for text in found.refusals],
    )


def rejection(candidate: Candidate) -> dict[str, Any]:
    need, budget = candidate.memory.needed_gib, candidate.budget_gib
    host, has = candidate.memory.host_gib, candidate.hardware.host_memory_gib
    reason = f"needs {need:.1f} GiB on each GPU of {budget:.1f}"
    if has is not None and host > has and need <= budget:
        reason = f"needs {host:.0f} GiB of host memory of {has:.0f}"
    return {
        "plan": describe(candidate.setup), "needs_gib": round(need, 2), "budget_gib": round(budget, 2),
        "host_memory_gib": host, "reason": reason,
    }


def reasons(shape: ModelShape, chosen: Candidate, found: Found) -> list[str]:
    said = []
    if found.best is None:
        return [*found.refusals, *[rejection(c)["plan"] + ": " + rejection(c)["reason"] for c in found.nearest]]
    if found.nearest:
        better = rejection(found.nearest[-1])
        said.append(f"the next more faithful plan ({better['plan']}) {better['reason']}")
    if found.others:
        second = found.others[0]
        if chosen.tokens_per_second and second.tokens_per_second:
            slower = 100 * (1 - second.tokens_per_second / chosen.tokens_per_second)
            said.append(f"the runner-up ({describe(second.setup)}) is {slower:.0f}% slower")
    said.append(f"uses {chosen.memory.needed_gib:.1f} of {chosen.budget_gib:.1f} GiB (peak of every phase)")
    if shape.estimate:
        said.append(f"an estimate: {shape.estimate}")
    return said
