"""From a job to a Plan: enumerate what is open, drop what does not fit, rank the rest by the objective.

Order of preference, most faithful first: method (as plan.methods lists them), then what lives on the GPU, then
optimizer states. Inside one such tier everything that fits competes on the objective. What the user wrote is
kept or refused with the number that would fit; only `auto` is chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.errors import ConfigError
from loadmaster.preflight.candidate import (
    Candidate,
    can_offload,
    closeness,
    conceivable,
    evaluate,
    fixed,
    gradients_are_too_much,
    inputs_are_too_much,
    kept_layers,
    may_compile,
)
from loadmaster.preflight.compiled import kept_bytes
from loadmaster.preflight.hardware import GIB, Hardware, priced
from loadmaster.preflight.refusals import divisors, impossible_on_cpu, refuse, without_uncounted_adapters
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tiers import tiers

CHECKPOINTING = ("none", "selective", "full")
"""What auto chooses from; and offload for rows of LONG_ROW tokens or more, where memory is all that counts, and where
layers' inputs are what is too much."""
LONG_ROW = 32768
MOST_CPU_ROWS = 4
"""Larger micro-batches gain nothing on a CPU."""
MOST_TOKENS = 32768
"""Of a micro-batch on one GPU; where only the best plan is asked for, larger ones are passed over: they gain < 1%."""
ENOUGH_TOKENS = 4096
"""Of a micro-batch whose activations are all kept: nothing else in its precision is more than EQUAL_SPEED faster, where
GPUs have no weights to gather and no update to share."""
SPARE = 0.03
"""Of the budget, left free by layers that are kept for speed alone: beside plan.reserve, which is as much by default,
for memory reserved was up to 6.1% over what was allocated."""
EQUAL_SPEED = 0.02
"""Plans this close in speed are equal: the one with less memory is taken."""


@dataclass(frozen=True)
class Found:
    best: Candidate | None
    others: list[Candidate]
    """Fitting plans that lost, best first, one of each kind."""
    nearest: list[Candidate]
    """Of every more faithful tier, the plan that came nearest to fitting."""
    refusals: list[str]
    """Settings that cannot work on this hardware at all."""


def search(job: Job, shape: ModelShape, hardware: Hardware, explain: bool = True) -> Found:
    """The best plan of the first tier in which one fits. explain=False: only that, without what came nearest.

    Raises ConfigError for what a CPU cannot do at all, however small the model.
    """
    problems = list(impossible_on_cpu(job, hardware)) if hardware.is_cpu else []
    if problems:
        raise ConfigError(problems)
    hardware, job = priced(hardware, job.plan.prices_usd_per_hour), without_uncounted_adapters(job, shape)
    refusals = list(refuse(job, shape, hardware))
    if refusals:
        return Found(None, [], [], refusals)
    nearest, host_is_short = [], {}
    for tier in tiers(job, hardware):
        place = tier["method"], tier["offload"]
        if explain and tier["offload"] != "none" and not host_is_short.get(place, True):
            continue  # lighter states on the host leave the GPUs no more room
        candidates = list(enumerate_tier(job, shape, hardware, tier, explain))
        fit = [c for c in candidates if c.fits]
        if fit:
            fit.sort(key=ranking(job, fit))
            if mixed := keeping_more(job, fit[0], explain):
                fit = sorted([*mixed, *fit], key=ranking(job, [*mixed, *fit]))
            return Found(fit[0], _one_of_each_kind(fit), nearest, [])
        nearest += [min(candidates, key=closeness)] if explain else []
        host_is_short[place] = any(c.memory.needed_gib <= c.budget_gib for c in candidates)
    return Found(None, [], nearest, [])


def enumerate_tier(
    job: Job, shape: ModelShape, hardware: Hardware, tier: dict[str, Any], explain: bool = True
) -> Iterator[Candidate]:
    """Candidates of a tier: each sharding and checkpointing with every micro-batch up to the first that fails; and of a
    full fine-tune all rows at once, which may fit where fewer do not: nothing accumulates beside their activations.

    Where all layers recomputed do not fit, and would not without their inputs, nothing else of that sharding is tried.
    Whole layers, and a whole copy on each GPU, come nearest to fitting only where sharded ones do, so they are left out
    where weights alone do not fit.
    explain=False leaves out whatever is ruled out without a replay, micro-batches too large to gain anything, and,
    unless memory is all that counts, what recomputes or shards where there is room enough without.
    """
    checkpointings: tuple[str, ...] = (job.activation_checkpointing,)
    if job.activation_checkpointing == "auto":
        offload = (job.sequence_length >= LONG_ROW or job.plan.objective == "memory") and can_offload(hardware)
        checkpointings = (*CHECKPOINTING, "offload") if offload else CHECKPOINTING
    rows = job.batch.global_size // hardware.world_size
    sizes = divisors(rows) if job.micro_batch_size == "auto" else [job.micro_batch_size]
    at_once = sizes[-1:] if tier["method"] == "full" and len(sizes) > 1 else []
    if tier["in_backward"]:
        sizes = [rows]
    elif job.micro_batch_size == "auto":
        most = MOST_CPU_ROWS if hardware.is_cpu else rows
        if not explain and hardware.world_size == 1:
            most = min(most, max(1, MOST_TOKENS // job.sequence_length))
        sizes = [size for size in sizes if size <= most]
    shared = shardings(job, hardware, tier["offload"], tier["method"] != "full" and job.lora.dora)
    if tier["in_backward"]:  # under ddp gradients lie in its buckets
        shared = [way for way in shared if way[0] != "ddp"]

    short: dict[tuple, Candidate] = {}  # of a full fine-tune, what did not fit in the first precision

    def candidate(precision: str, split: tuple[str, int, bool], checkpointing: str, size: int) -> Candidate | None:
        sharding, replicas, reshard = split
        if (twin := (split, checkpointing, size)) in short:
            return short[twin]  # what does not fit in bf16 does not in fp8: casts come beside the same weights
        if job.compile is True and not may_compile(job, checkpointing, size * job.sequence_length):
            return None
        setup = Setup(
            **{**tier, "precision": precision}, **fixed(job, hardware, checkpointing, size * job.sequence_length),
            sharding=sharding, replicas=replicas, reshard_after_forward=reshard, checkpointing=checkpointing,
            kept_layers=kept_layers(job, shape, checkpointing), micro_batch_size=size,
            gradient_accumulation_steps=rows // size,
        )  # fmt: skip
        nearest = explain and not (setup.keeps_weights or (sharding == "ddp" and len(shared) > 1))
        if not (nearest or conceivable(job, shape, hardware, setup)):
            return None
        made = evaluate(job, shape, hardware, setup)
        if tier["method"] == "full" and not made.fits:
            short[twin] = made
        return made

    roomy_in, quick = set(), not explain and job.plan.objective != "memory"
    for precision, split in product(precisions(job, hardware, tier), shared):
        if precision in roomy_in:
            continue
        ways, lean = checkpointings, checkpointings[CHECKPOINTING.index("full") :]
        leanest = [made for way in lean if (made := candidate(precision, split, way, sizes[0])) is not None]
        if at_once and leanest and all(map(gradients_are_too_much, leanest)):
            leanest += [made for way in lean if (made := candidate(precision, split, way, at_once[0])) is not None]
        if lean and not any(made.fits for made in leanest):
            yield from leanest
            near = all(map(inputs_are_too_much, leanest))
            if not near or "offload" in lean or not can_offload(hardware):
                continue
            ways = ("offload",)
        sharded = split[0] not in ("none", "ddp")
        shares = sharded or (split[0] == "ddp" and tier["method"] == "full")
        useful = selective_keeps_less(job, shape, hardware, {**tier, "precision": precision})
        for checkpointing in ways:
            if checkpointing == "selective" != job.activation_checkpointing and not useful:
                continue
            roomy = False
            for size in sizes:
                made = candidate(precision, split, checkpointing, size)
                if made is None:
                    break
                yield made
                if not made.fits:
                    break
                roomy = roomy or (checkpointing == "none" and size * job.sequence_length >= ENOUGH_TOKENS)
            if at_once and made is not None and gradients_are_too_much(made):
                yield from filter(None, [candidate(precision, split, checkpointing, at_once[0])])
            if roomy and quick and (not sharded or (made is not None and made.fits)):
                roomy_in |= set() if shares else {precision}
                break


def keeping_more(job: Job, best: Candidate, explain: bool) -> list[Candidate]:
    """The best plan that recomputes all layers, with as many of the last ones kept instead as there is room for: in
    micro-batches of its own size, and in smaller ones, of ENOUGH_TOKENS and of one row, which leave room for more.

    explain=False: only of ENOUGH_TOKENS, and a few layers may be left out, for a search over many machines is quick.
    """
    setup = best.setup
    written = job.activation_checkpointing != "auto" or job.plan.objective == "memory"
    if setup.checkpointing != "full" or written or best.hardware.is_cpu:
        return []
    rows, sizes = setup.micro_batch_size * setup.gradient_accumulation_steps, {setup.micro_batch_size}
    if job.micro_batch_size == "auto" and not setup.in_backward:
        enough = [size for size in divisors(rows) if size * setup.sequence_length >= ENOUGH_TOKENS]
        least = min([*enough, setup.micro_batch_size])
        sizes = sizes | {1, least} if explain else {least}
    setups = [replace(setup, micro_batch_size=size, gradient_accumulation_steps=rows // size) for size in sorted(sizes)]
    return [found for each in setups if (found := _filled(job, best, each, explain)) is not None]


def _filled(job: Job, best: Candidate, setup: Setup, exactly: bool) -> Candidate | None:
    """`setup` with as many layers kept as fit; None where not one does. Not exactly: the first guess that fits will
    do."""
    shape = best.shape

    def keeping(layers: int) -> Candidate:
        return evaluate(job, shape, best.hardware, replace(setup, kept_layers=layers))

    low, high = 0, shape.layers
    found, most = best if setup == best.setup else keeping(0), (1 - SPARE) * best.budget_gib
    known = kept_bytes(shape, setup, shape.has_experts(shape.layers - 1)) if setup.compiled else None
    each = (known - setup.width * shape.hidden_size) * setup.tokens / GIB if known else 0.0
    while high - low > 1 and found.memory.needed_gib <= most and (exactly or not low):
        more = (high - low) // 2
        if known:  # what is needed grows almost in a line
            more = min(math.floor((most - found.memory.needed_gib) / max(each, 1e-6)), high - low - 1)
        if more < 1:
            break
        tried = keeping(low + more)
        if tried.fits and tried.memory.needed_gib <= most:
            low, found = low + more, tried
        else:
            high, each = low + more, (tried.memory.needed_gib - found.memory.needed_gib) / more
    return found if low else None


def selective_keeps_less(job: Job, shape: ModelShape, hardware: Hardware, tier: dict[str, Any]) -> bool:
    """Enough less than layers that keep what they like: not where the compiler is known to make all again that is cheap
    to make. (With DoRA and experts it is about a tenth, which some layers recomputed whole save faster.)"""
    setup = Setup(**tier, **fixed(job, hardware, "selective", 0), sharding="none", checkpointing="none")
    known = kept_bytes(shape, setup, shape.has_experts(shape.layers - 1))
    return not setup.compiled or bool(setup.adapters and setup.lora_dropout) or known is None


def precisions(job: Job, hardware: Hardware, tier: dict[str, Any]) -> tuple[str, ...]:
    """Where the hardware has fp8 units and nothing was written, a frozen base may be in fp8, or full's products."""
    full = job.sequence_length % 16 == 0 and job.sharding not in ("zero1", "zero2", "zero3")  # tried with FSDP2 alone
    able = (tier["method"] == "lora" and not job.lora.dora) or (tier["method"] == "full" and full)
    open_ = job.precision == "auto" and able and hardware.has_fp8
    return (tier["precision"], "fp8") if open_ else (tier["precision"],)


def shardings(job: Job, hardware: Hardware, offload: str, whole: bool = False) -> list[tuple[str, int, bool]]:
    """(sharding, replicas, reshard after forward): fully sharded over all GPUs, or over each node's. whole: not cut.

    Layers that stay whole come before those that are gathered twice: they are never slower.
    """
    if hardware.world_size == 1:
        return [("none", 1, True)]
    if whole and job.sharding == "auto":
        return [("ddp", 1, True)]
    names = (job.sharding,) if job.sharding != "auto" else ("ddp", "fsdp") if offload == "none" else ("fsdp",)
    found = [(name, 1, True) for name in names if name != "fsdp"]
    if "fsdp" in names:
        hybrid = hardware.nodes > 1 and hardware.count > 1
        keeps = (True,) if offload == "all" else (False, True)
        found += [("fsdp", replicas, reshard) for replicas in (1, hardware.nodes)[: 1 + hybrid] for reshard in keeps]
    return found


def ranking(job: Job, fit: list[Candidate]) -> Callable[[Candidate], tuple]:
    """Sort key. On one machine the cheapest plan is the fastest, since hours are what is paid for."""
    if job.plan.objective == "memory":
        return lambda c: (c.memory.needed_gib, -(c.tokens_per_second or 0))
    fastest = max(c.tokens_per_second or 0 for c in fit)
    near = fastest * (1 - EQUAL_SPEED)
    # Whole weights on each GPU have nothing to gather, so they come before sharded ones that are as fast.
    # fp8 rounds the base, so it has to win by more than that.
    return lambda c: (
        -min(c.tokens_per_second or 0, near), c.setup.precision == "fp8", c.setup.state_shards > 1, c.memory.needed_gib
    )  # fmt: skip


def _one_of_each_kind(fit: list[Candidate]) -> list[Candidate]:
    """The best of every other combination of precision, sharding and checkpointing, then the best micro-batch."""

    def kind_of(candidate: Candidate) -> tuple:
        setup = candidate.setup
        return setup.precision, setup.sharding, setup.replicas, setup.checkpointing, setup.kept_layers > 0

    seen, kept = {kind_of(fit[0])}, []
    for candidate in fit[1:]:
        kind = kind_of(candidate)
        if kind not in seen:
            seen.add(kind)
            kept.append(candidate)
    return kept + [c for c in fit[1:2] if c not in kept]


def smallest(job: Job, shape: ModelShape, hardware: Hardware) -> Candidate:
    """What is shown when the settings themselves are refused: the first tier with one row at a time."""
    tier = next(tiers(job, hardware))
    if hardware.is_cpu:
        tier["precision"] = "fp32"
    sharding = "none" if hardware.world_size == 1 else "fsdp"
    checkpointing = "full" if job.activation_checkpointing == "auto" else job.activation_checkpointing
    rest = fixed(job, hardware, checkpointing, job.sequence_length)
    kept = kept_layers(job, shape, checkpointing)
    setup = Setup(**tier, sharding=sharding, checkpointing=checkpointing, kept_layers=kept, **rest)
    return evaluate(job, shape, priced(hardware, job.plan.prices_usd_per_hour), setup)
