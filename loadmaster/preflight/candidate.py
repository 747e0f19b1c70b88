"""One plan for a job on some hardware: what it needs, whether that is there, and how fast it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loadmaster.config.job_rules import MLP_TOKENS
from loadmaster.config.schema import Job
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.memory import Memory, memory
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.speed import tokens_per_second

FORWARDS = {"dpo": 1, "kto": 3}
"""Of a preference objective (loadmaster.models.preference): of the reference; kto's twice more for how far it moved.
Where all weights are trained the reference is asked before the first step (hours.reference_hours)."""
FORWARDS_WHOLE = {"kto": 1}
"""Of these, what is left to each step where all weights are trained: of the model itself."""


@dataclass(frozen=True)
class Candidate:
    shape: ModelShape
    setup: Setup
    memory: Memory
    hardware: Hardware
    budget_gib: float

    @cached_property
    def tokens_per_second(self) -> float | None:
        """Replayed when first asked for: of most plans that do not fit it never is."""
        return tokens_per_second(self.shape, self.hardware, self.setup)

    @property
    def fits(self) -> bool:
        return self.missing_gib <= 0

    @property
    def missing_gib(self) -> float:
        """What lacks on a GPU, or on the host where that is more."""
        host = self.hardware.host_memory_gib
        return max(self.memory.needed_gib - self.budget_gib, -math.inf if host is None else self.memory.host_gib - host)


def closeness(candidate: Candidate) -> tuple[float, float]:
    return max(0.0, candidate.missing_gib), candidate.memory.needed_gib


def kept_layers(job: Job, shape: ModelShape, checkpointing: str) -> int:
    """Of the last layers, those that the job leaves out of full checkpointing."""
    written = checkpointing == "full" and job.checkpointed_layers != "auto"
    return max(0, shape.layers - job.checkpointed_layers) if written else 0


def may_compile(job: Job, checkpointing: str, tokens: int) -> bool:
    """Not MLPs that run by pieces, nor layers whose weights DeepSpeed gathers. tokens: of a micro-batch."""
    return (checkpointing != "offload" or tokens <= MLP_TOKENS) and job.sharding != "zero3"


def fixed(job: Job, hardware: Hardware, method: str, checkpointing: str, tokens: int) -> dict[str, Any]:
    """What a setup of `method` takes from job and hardware as it is; what runs by pieces is not compiled."""
    targets = job.lora.targets
    able = may_compile(job, checkpointing, tokens) and not hardware.is_cpu
    return {
        "sequence_length": job.sequence_length,
        "forwards": (FORWARDS_WHOLE if method == "full" else FORWARDS).get(job.objective, 0),
        "objective": job.objective,
        "compiled": able if job.compile == "auto" else job.compile,
        "world_size": hardware.world_size,
        "gpus_per_node": hardware.count,
        "lora_rank": job.lora.rank,
        "lora_targets": tuple(targets) if isinstance(targets, list) else targets,
        "lora_dropout": job.lora.dropout,
        "dora": job.lora.dora,
        "modules_to_save": tuple(job.lora.modules_to_save),
    }


def evaluate(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> Candidate:
    return Candidate(shape, setup, memory(shape, hardware, setup), hardware, hardware.budget_gib(job.plan.reserve))


def can_offload(hardware: Hardware) -> bool:
    """Whether layers' inputs may go to host memory: nothing does on a CPU, nor where its size is not known."""
    return not hardware.is_cpu and hardware.host_memory_gib is not None
