"""Method, precision, optimizer states and what lives in host memory: the tiers of a search, most faithful first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.refusals import needs_adapter
from loadmaster.preflight.zero_settings import ZERO

FULL_STATES = (("adamw", True), ("adamw_bf16", False), ("adamw_8bit", False), ("adafactor", False))
"""Optimizer and fp32 master weights for full fine-tuning, most faithful first: AdamW without masters takes more than
adamw_bf16, and rounds its weights as that does (docs/training.md)."""
HOST_STATES = FULL_STATES[:1] + FULL_STATES[2:]
"""The same in host memory, where adamw_bf16's compiled step is not tried by itself."""


def tiers(job: Job, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Method, precision, optimizer and offload of each tier, most faithful first."""
    methods = job.plan.methods if job.method == "auto" else [job.method]
    if needs_adapter(job):
        methods = [method for method in methods if method != "full"]
    if job.precision == "fp8":  # qlora's base is in nf4
        without = {"qlora"} if job.sequence_length % 16 == 0 else {"qlora", "full"}
        methods = [method for method in methods if method not in without] or methods
    if job.lora.dora:
        few_bits = {"qlora", "lora"} if job.precision == "fp8" else {"qlora"}
        methods = [method for method in methods if method not in few_bits] or methods
    precision = job.precision if job.precision != "auto" else "fp32" if hardware.is_cpu else "bf16"
    for method in methods:
        for offload in offloads(job, method, hardware):
            ladder = states(job, method, offload, precision)
            for (optimizer, master), in_backward in product(ladder, stepping(job, hardware, method, offload)):
                yield {
                    "method": method, "precision": precision, "optimizer": optimizer, "master_weights": master,
                    "offload": offload, "in_backward": in_backward,
                }


def offloads(job: Job, method: str, hardware: Hardware) -> tuple[str, ...]:
    if job.optimizer.in_backward is True:
        return ("none",)
    if job.offload != "auto" or hardware.is_cpu or hardware.host_memory_gib is None:  # not known: only if written
        return ("none" if job.offload == "auto" else job.offload,)
    sharded = hardware.world_size > 1 and job.sharding in ("auto", "fsdp", "zero3")
    if method != "full":
        return ("none", "all") if sharded and not job.lora.dora else ("none",)
    return ("none", "optimizer", "all") if sharded else ("none", "optimizer")


def stepping(job: Job, hardware: Hardware, method: str, offload: str) -> tuple[bool, ...]:
    """Whether the optimizer steps inside the backward pass: the same update, but all that a step has is one batch."""
    if job.optimizer.in_backward != "auto":
        return (job.optimizer.in_backward,)
    rows = job.batch.global_size // hardware.world_size
    able = method == "full" and offload == "none" and job.sharding in ("auto", "none", "fsdp")
    able = able and not job.optimizer.max_grad_norm and job.micro_batch_size in ("auto", rows)
    return (False, True) if able else (False,)


def states(job: Job, method: str, offload: str, precision: str) -> Iterator[tuple[str, bool]]:
    ladder = FULL_STATES if offload == "none" else HOST_STATES
    before = offload != "none" and job.method == "auto"  # adapters come before lighter states on the host
    if method != "full" or job.sharding in ZERO or before:  # DeepSpeed keeps fp32 masters
        ladder = FULL_STATES[:1]
    if job.optimizer.name == "adamw" and ladder is FULL_STATES:  # by that name, masters or not
        ladder = (("adamw", True), ("adamw", False))
    if precision == "fp32":  # as adamw_bf16's moments are then
        ladder = tuple(dict.fromkeys((name, False) for name, _ in ladder if name != "adamw_bf16"))
    if job.optimizer.name != "auto":
        known = [master for name, master in ladder if name == job.optimizer.name]
        masters = known or [job.optimizer.name == "adamw" and precision != "fp32"]
        ladder = tuple((job.optimizer.name, master) for master in masters)
    if job.optimizer.master_weights != "auto":
        ladder = tuple(dict.fromkeys((name, job.optimizer.master_weights) for name, _ in ladder))
    yield from ladder
