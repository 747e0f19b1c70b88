"""What there is to try of a tier: precisions, shardings, activation checkpointing, micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.preflight.batch import divisors
from loadmaster.preflight.candidate import Candidate, can_offload, evaluate, fixed, kept_layers, may_compile
from loadmaster.preflight.compiled import kept_bytes
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.least import least_bytes
from loadmaster.preflight.memory import host_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape

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

Split = tuple[str, int, bool]
"""sharding, replicas, reshard after forward"""


class Enumeration:
    """Of a tier's candidates: each sharding and checkpointing with every micro-batch up to the first that fails; and of
    a full fine-tune all rows at once, which may fit where fewer do not: nothing accumulates beside their activations.

    Where all layers recomputed do not fit, and would not without their inputs, nothing else of that sharding is tried.
    Whole layers, and a whole copy on each GPU, come nearest to fitting only where sharded ones do, so they are left out
    where weights alone do not fit.
    explain=False leaves out whatever is ruled out without a replay, micro-batches too large to gain anything, and,
    unless memory is all that counts, what recomputes or shards where there is room enough without.
    """

    def __init__(self, job: Job, shape: ModelShape, hardware: Hardware, tier: dict[str, Any], explain: bool = True):
        self.job, self.shape, self.hardware, self.tier, self.explain = job, shape, hardware, tier, explain
        self.full = tier["method"] == "full"
        self.rows = job.batch.global_size // hardware.world_size
        self.checkpointings = checkpointings(job, hardware)
        self.sizes = self._micro_batch_sizes()
        open_ = job.micro_batch_size == "auto" and self.rows > 1
        self.at_once = self.rows if self.full and open_ else None
        self.shardings = shardings(job, hardware, tier["offload"], not self.full and job.lora.dora)
        if tier["in_backward"]:  # under ddp gradients lie in its buckets
            self.shardings = [split for split in self.shardings if split[0] != "ddp"]
        self.short: dict[tuple, Candidate] = {}
        """Of a full fine-tune, what did not fit in the first precision."""

    def candidates(self) -> Iterator[Candidate]:
        roomy_in = set()
        for precision, split in product(precisions(self.job, self.hardware, self.tier), self.shardings):
            if precision in roomy_in:
                continue
            ways, lean = self.checkpointings, self.checkpointings[CHECKPOINTING.index("full") :]
            leanest = self._leanest(precision, split, lean)
            if lean and not any(made.fits for made in leanest):
                yield from leanest
                near = all(map(inputs_are_too_much, leanest))
                if not near or "offload" in lean or not can_offload(self.hardware):
                    continue
                ways = ("offload",)
            tier = {**self.tier, "precision": precision}
            for checkpointing in ways:
                unasked = checkpointing == "selective" != self.job.activation_checkpointing
                if unasked and not selective_keeps_less(self.job, self.shape, self.hardware, tier):
                    continue
                tried = self._by_size(precision, split, checkpointing)
                yield from filter(None, tried)
                if self.at_once and tried[-1] is not None and gradients_are_too_much(tried[-1]):
                    yield from filter(None, [self._candidate(precision, split, checkpointing, self.at_once)])
                if self._roomy(split, tried):
                    if not self._shares(split):
                        roomy_in.add(precision)
                    break

    def _leanest(self, precision: str, split: Split, lean: tuple[str, ...]) -> list[Candidate]:
        """With all layers recomputed, of as few rows as there may be; of all rows too, where that may be less."""

        def of(size: int) -> list[Candidate]:
            return [made for way in lean if (made := self._candidate(precision, split, way, size)) is not None]

        found = of(self.sizes[0])
        return found + of(self.at_once) if self.at_once and found and all(map(gradients_are_too_much, found)) else found

    def _by_size(self, precision: str, split: Split, checkpointing: str) -> list[Candidate | None]:
        """Micro-batches up to the first that does not fit; None for one that need not be looked at."""
        tried = []
        for size in self.sizes:
            made = self._candidate(precision, split, checkpointing, size)
            tried.append(made)
            if made is None or not made.fits:
                break
        return tried

    def _roomy(self, split: Split, tried: list[Candidate | None]) -> bool:
        """Whether nothing that recomputes, in a quick search, can be more than EQUAL_SPEED faster."""
        if self.explain or self.job.plan.objective == "memory":
            return False
        last, sharded = tried[-1], split[0] not in ("none", "ddp")
        fit = [made.setup for made in tried if made is not None and made.fits]
        enough = any(setup.checkpointing == "none" and setup.tokens >= ENOUGH_TOKENS for setup in fit)
        return enough and (not sharded or (last is not None and last.fits))

    def _shares(self, split: Split) -> bool:
        """Whether GPUs have weights to gather or an update to share, which another sharding may do faster."""
        return split[0] not in ("none", "ddp") or (split[0] == "ddp" and self.full)

    def _micro_batch_sizes(self) -> list[int]:
        job, hardware, rows = self.job, self.hardware, self.rows
        if self.tier["in_backward"]:
            return [rows]
        if job.micro_batch_size != "auto":
            return [job.micro_batch_size]
        most = MOST_CPU_ROWS if hardware.is_cpu else rows
        if not self.explain and hardware.world_size == 1:
            most = min(most, max(1, MOST_TOKENS // job.sequence_length))
        return [size for size in divisors(rows) if size <= most]

    def _candidate(self, precision: str, split: Split, checkpointing: str, size: int) -> Candidate | None:
        """None for what may not be compiled as was asked, and for what cannot fit and comes not nearest to it."""
        job, shape, hardware = self.job, self.shape, self.hardware
        if (twin := (split, checkpointing, size)) in self.short:
            return self.short[twin]  # what does not fit in bf16 does not in fp8: casts come beside the same weights
        if job.compile is True and not may_compile(job, checkpointing, size * job.sequence_length):
            return None
        sharding, replicas, reshard = split
        setup = Setup(
            **{**self.tier, "precision": precision},
            **fixed(job, hardware, self.tier["method"], checkpointing, size * job.sequence_length),
            sharding=sharding, replicas=replicas, reshard_after_forward=reshard, checkpointing=checkpointing,
            kept_layers=kept_layers(job, shape, checkpointing), micro_batch_size=size,
            gradient_accumulation_steps=self.rows // size,
        )
        a_copy_each = sharding == "ddp" and len(self.shardings) > 1
        nearest = self.explain and not (setup.keeps_weights or a_copy_each)
        if not (nearest or conceivable(job, shape, hardware, setup)):
            return None
        made = evaluate(job, shape, hardware, setup)
        if self.full and not made.fits:
            self.short[twin] = made
        return made


def checkpointings(job: Job, hardware: Hardware) -> tuple[str, ...]:
    if job.activation_checkpointing != "auto":
        return (job.activation_checkpointing,)
    offload = (job.sequence_length >= LONG_ROW or job.plan.objective == "memory") and can_offload(hardware)
    return (*CHECKPOINTING, "offload") if offload else CHECKPOINTING


def selective_keeps_less(job: Job, shape: ModelShape, hardware: Hardware, tier: dict[str, Any]) -> bool:
    """Enough less than layers that keep what they like: not where the compiler is known to make all again that is cheap
    to make. (With DoRA and experts it is about a tenth, which some layers recomputed whole save faster.) Not under DoRA
    in layers whose compiled code was not looked at, which may have more at once than eager ones."""
    setup = Setup(**tier, **fixed(job, hardware, tier["method"], "selective", 0), sharding="none", checkpointing="none")
    second = shape.is_second(shape.layers - 1)
    known = kept_bytes(shape, setup, second)
    if setup.compiled and setup.dora and kept_bytes(shape, replace(setup, checkpointing="selective"), second) is None:
        return False
    return not setup.compiled or bool(setup.adapters and setup.lora_dropout) or known is None


def precisions(job: Job, hardware: Hardware, tier: dict[str, Any]) -> tuple[str, ...]:
    """Where the hardware has fp8 units and nothing was written, a frozen base may be in fp8, or full's products."""
    full = job.sequence_length % 16 == 0 and job.sharding not in ("zero1", "zero2", "zero3")  # tried with FSDP2 alone
    able = (tier["method"] == "lora" and not job.lora.dora) or (tier["method"] == "full" and full)
    open_ = job.precision == "auto" and able and hardware.has_fp8
    return (tier["precision"], "fp8") if open_ else (tier["precision"],)


def shardings(job: Job, hardware: Hardware, offload: str, whole: bool) -> list[Split]:
    """Fully sharded over all GPUs, or over each node's, or not. whole: weights are not cut, for DoRA.

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


def inputs_are_too_much(failed: Candidate) -> bool:
    """Whether what fits not, all recomputed, might with layers' inputs in host memory and MLPs by pieces."""
    return failed.memory.needed_gib - failed.budget_gib <= failed.memory.train.activations / GIB


def gradients_are_too_much(failed: Candidate) -> bool:
    """Whether what fits not might if no gradients of earlier micro-batches lay beside it."""
    return 0 < failed.memory.needed_gib - failed.budget_gib <= failed.memory.train.gradients / GIB


def conceivable(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> bool:
    """Whether what is needed at least, and what lies in host memory, leaves room for anything."""
    if least_bytes(shape, hardware, setup) > hardware.budget_gib(job.plan.reserve) * GIB:
        return False
    has = hardware.host_memory_gib
    return hardware.is_cpu or has is None or host_bytes(shape, setup) <= has * GIB
