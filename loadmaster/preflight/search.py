"""From a job to a Plan: enumerate what is open, drop what does not fit, rank the rest by the objective.

Order of preference, most faithful first: method (as plan.methods lists them), then what lives on the GPU, then
optimizer states. Inside one such tier everything that fits competes on the objective. What the user wrote is
kept or refused with the number that would fit; only `auto` is chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from loadmaster.config.schema import Job
from loadmaster.errors import ConfigError
from loadmaster.preflight.batch import divisors
from loadmaster.preflight.candidate import Candidate, closeness, evaluate, fixed, kept_layers
from loadmaster.preflight.compiled import kept_bytes
from loadmaster.preflight.enumeration import ENOUGH_TOKENS, Enumeration
from loadmaster.preflight.hardware import GIB, Hardware, priced
from loadmaster.preflight.refusals import Refusal, impossible_on_cpu, refuse, without_uncounted_adapters
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tiers import tiers

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
    refusals: list[Refusal]
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
        candidates = list(Enumeration(job, shape, hardware, tier, explain).candidates())
        fit = with_others(job, [c for c in candidates if c.fits])
        if fit:
            fit.sort(key=ranking(job, fit))
            if mixed := keeping_more(job, fit[0], explain):
                fit = with_others(job, [*mixed, *fit])
                fit.sort(key=ranking(job, fit))
            return Found(fit[0], _one_of_each_kind(job, fit), nearest, [])
        nearest += [min(candidates, key=closeness)] if explain else []
        host_is_short[place] = any(c.memory.needed_gib <= c.budget_gib for c in candidates)
    return Found(None, [], nearest, [])


def with_others(job: Job, fit: list[Candidate]) -> list[Candidate]:
    """Under kto, what an answer is compared with is in its micro-batch: of rows that are not packed none is to be alone
    where more fit."""
    if job.objective != "kto" or job.data.packing:
        return fit
    return [c for c in fit if c.setup.micro_batch_size > 1] or fit


def keeping_more(job: Job, best: Candidate, explain: bool) -> list[Candidate]:
    """The best plan that recomputes all layers, with as many of the last ones kept instead as there is room for: in
    micro-batches of its own size, and in smaller ones, of ENOUGH_TOKENS and of one row, which leave room for more.

    explain=False: only of ENOUGH_TOKENS (of its own size as well where weights come from host memory for each), and a
    few layers may be left out, for a search over many machines is quick.
    """
    setup = best.setup
    written = job.activation_checkpointing != "auto" or job.plan.objective == "memory"
    if setup.checkpointing != "full" or written or best.hardware.is_cpu:
        return []
    rows, sizes = setup.micro_batch_size * setup.gradient_accumulation_steps, {setup.micro_batch_size}
    if job.micro_batch_size == "auto" and not setup.in_backward:
        enough = [size for size in divisors(rows) if size * setup.sequence_length >= ENOUGH_TOKENS]
        least = min([*enough, setup.micro_batch_size])
        few = {least} | (sizes if setup.offload == "all" else set())
        sizes = sizes | {1, least} if explain else few
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
    known = kept_bytes(shape, setup, shape.is_second(shape.layers - 1)) if setup.compiled else None
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
    )


def _one_of_each_kind(job: Job, fit: list[Candidate]) -> list[Candidate]:
    """The best of every other combination of precision, sharding and checkpointing, as if there were no others, and
    the second best plan, where it is the best one with another micro-batch; the best first."""
    kinds: dict[tuple, list[Candidate]] = {}
    for candidate in fit:
        setup = candidate.setup
        kind = setup.precision, setup.sharding, setup.replicas, setup.checkpointing, setup.kept_layers > 0
        kinds.setdefault(kind, []).append(candidate)
    first, *others = kinds.values()
    found = [min(each, key=ranking(job, each)) for each in others] + [c for c in fit[1:2] if c in first]
    return sorted(found, key=ranking(job, found)) if found else []


def smallest(job: Job, shape: ModelShape, hardware: Hardware) -> Candidate:
    """What is shown when the settings themselves are refused: the first tier with one row at a time."""
    tier = next(tiers(job, hardware))
    if hardware.is_cpu:
        tier["precision"] = "fp32"
    sharding = "none" if hardware.world_size == 1 else "fsdp"
    checkpointing = "full" if job.activation_checkpointing == "auto" else job.activation_checkpointing
    rest = fixed(job, hardware, tier["method"], checkpointing, job.sequence_length)
    kept = kept_layers(job, shape, checkpointing)
    setup = Setup(**tier, sharding=sharding, checkpointing=checkpointing, kept_layers=kept, **rest)
    return evaluate(job, shape, priced(hardware, job.plan.prices_usd_per_hour), setup)
