"""What was written in a job and cannot work on some hardware, whatever its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loadmaster.config.fields import written
from loadmaster.config.schema import Job
from loadmaster.errors import IN_THE_JOB, Problem
from loadmaster.preflight.batch import dividing, divisors, with_rows
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.shape import ModelShape
from loadmaster.words import counted

PACKED_FROM = 8.0
"""Compute capability, of PyTorch's variable-length attention, which takes bf16 and fp16 alone."""
COUNTED = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linears of a mixture of experts whose adapters a plan can count."""
TYPED = f"lora.targets=[{','.join(COUNTED)}]"
UNCOUNTED = "{name} is a mixture of experts, whose expert tensors get adapters that no plan counts"


def impossible_on_cpu(job: Job, hardware: Hardware) -> Iterator[Problem]:
    """Written settings that no processor does; on a GPU the like is refused with the machines that could."""
    if job.precision in ("bf16", "fp8"):
        message = "this runs on the CPU, which trains in fp32 here"
        yield Problem("precision", job.precision, IN_THE_JOB, message, "precision=fp32 or auto, or hardware with a GPU")
    if job.sharding not in ("auto", "none") and hardware.world_size == 1:
        message = "one process on the CPU has nothing to share or shard"
        yield Problem("sharding", job.sharding, IN_THE_JOB, message, "sharding=none or auto, or hardware.count=2")
    if job.offload not in ("auto", "none") and hardware.world_size == 1:
        message = "what one process on the CPU trains is in host memory already"
        yield Problem("offload", job.offload, IN_THE_JOB, message, "offload=none or auto, or hardware with a GPU")
    if job.sharding == "none" and hardware.world_size > 1:
        message = f"{hardware.world_size} processes would each train a model of their own"
        yield Problem("sharding", "none", IN_THE_JOB, message, "sharding=ddp, fsdp or auto, or hardware.count=1")
    rows = job.batch.global_size
    if rows % hardware.world_size:
        message = f"does not divide over {hardware.world_size} processes"
        works = f"batch.global_size={dividing(job, hardware.world_size)}"
        yield Problem("batch.global_size", rows, IN_THE_JOB, message, works)


@dataclass(frozen=True)
class Refusal:
    """Why a job cannot run on some hardware. field, value: what was written that cannot, if it is a field of the job;
    the sentence begins with them then."""

    text: str
    field: str | None = None
    value: object = None

    def __str__(self) -> str:
        return f"{self.field}={written(self.value)}{self.text}" if self.field else self.text

    def row(self) -> dict[str, str | None]:
        """Of plan.json's `rejected`."""
        value = written(self.value) if self.field else None
        return {"plan": "", "reason": str(self), "field": self.field, "value": value}


def refuse(job: Job, shape: ModelShape, hardware: Hardware) -> Iterator[Refusal]:
    """What was written and cannot work on this hardware, whatever its memory."""
    if not hardware.is_cpu and 0 < hardware.compute_capability < PACKED_FROM:  # 0: the driver does not say
        yield Refusal(
            f"{hardware.label} has compute capability {hardware.compute_capability}; attention over packed documents "
            f"needs {PACKED_FROM} or later"
        )
    values = 4 if hardware.is_cpu else 8  # of 16 bytes, which are the steps that the rows of grouped products come in
    if shape.experts and (shape.hidden_size % values or shape.expert_size % values):
        yield Refusal(
            f"{shape.name} has experts of {shape.hidden_size} x {shape.expert_size}, and products of experts take "
            f"sizes that {values} divides; use another model"
        )
    if not hardware.is_cpu and job.precision == "fp32" and not shape.attention_softcap:
        text = ": attention over packed documents is in 16 bits on a GPU; use bf16"
        yield Refusal(text, "precision", "fp32")
    if job.precision == "fp8" and not hardware.has_fp8:
        text = f": {hardware.label} has no fp8 matrix units (compute capability 8.9 or later has); use bf16"
        yield Refusal(text, "precision", "fp8")
    if job.precision == "fp8" and job.method == "auto" and set(job.plan.methods) == {"qlora"}:
        yield Refusal(" is for method=lora or full, which plan.methods leaves out; use bf16", "precision", "fp8")
    if uncounted_adapters(job, shape) and job.method != "full":
        works = f"use {TYPED}{'' if needs_adapter(job) else ', or method=full'}"
        yield Refusal(f": {UNCOUNTED.format(name=shape.name)}; {works}", "lora.targets", job.lora.targets)
    if job.checkpointed_layers != "auto" and job.checkpointed_layers > shape.layers:
        has = f"{shape.name} has {counted(shape.layers, 'layer')}"
        yield Refusal(f": {has}; use auto for all", "checkpointed_layers", job.checkpointed_layers)
    world, rows = hardware.world_size, job.batch.global_size
    if job.sharding not in ("auto", "none") and world == 1:
        yield Refusal(": there is one GPU; use none or auto", "sharding", job.sharding)
    if job.sharding == "none" and world > 1:
        yield Refusal(f": there are {world} GPUs; use ddp, fsdp or auto", "sharding", "none")
    if job.offload == "all" and job.sharding in ("none", "ddp", "zero1", "zero2"):
        text = f" needs sharded weights; use sharding=fsdp or zero3 instead of {job.sharding}"
        yield Refusal(text, "offload", "all")
    if job.offload == "all" and world == 1:
        text = ": weights in host memory come to GPUs by shards, and there is one GPU; use optimizer or auto"
        yield Refusal(text, "offload", "all")
    if job.optimizer.in_backward is True and job.lora.dora and job.method != "full" and world > 1:
        text = " goes with fsdp and lora.dora=true with ddp; set one of the two to false"
        yield Refusal(text, "optimizer.in_backward", True)
    if rows % world:
        works = f"batch.global_size={dividing(job, world)}"
        yield Refusal(f" does not divide over {world} GPUs; use {works}", "batch.global_size", rows)
    elif job.optimizer.in_backward is True and job.micro_batch_size not in ("auto", rows // world):
        yield Refusal(
            f" takes a step after each micro-batch, and batch.global_size={rows} is "
            f"{counted(rows // world, 'row')} on each GPU; use micro_batch_size={rows // world}, "
            f"or batch.global_size={job.micro_batch_size * world}", "optimizer.in_backward", True,
        )
    elif job.micro_batch_size != "auto" and (rows // world) % job.micro_batch_size:
        works = ", ".join(map(str, divisors(rows // world)))
        yield Refusal(
            f" does not divide the {rows // world} rows that each GPU has of batch.global_size={rows}; these do: "
            f"{works}", "micro_batch_size", job.micro_batch_size,
        )


def with_a_batch_that_divides(job: Job, shape: ModelShape, hardware: Hardware) -> Job | None:
    """The job with the batch that its refusal names, where that is all that is wrong with it here."""
    changed = with_rows(job, dividing(job, hardware.world_size))
    return changed if changed is not job and not any(refuse(changed, shape, hardware)) else None


def uncounted_adapters(job: Job, shape: ModelShape) -> bool:
    """Whether peft would take the router and the 3-D tensors of experts for linears, at several times the size."""
    return bool(shape.experts) and job.lora.targets == "all-linear"


def needs_adapter(job: Job) -> bool:
    """Whether method=auto may not be full: an adapter is to be exported, or kto's rows are not packed, of which a
    reference is asked of the base under an adapter alone."""
    return "adapter" in job.export.formats or (job.objective == "kto" and not job.data.packing)


def without_uncounted_adapters(job: Job, shape: ModelShape) -> Job:
    """Of method=auto what can be planned: where no adapter can be counted, full, if that may be chosen."""
    able = job.method == "auto" and "full" in job.plan.methods and not needs_adapter(job)
    return replace(job, method="full") if able and uncounted_adapters(job, shape) else job
