"""What every phase of a run takes of one GPU, by component. GiB = 2^30 bytes.

load         weights, and a quantized matrix in bf16 and fp32 while it is read
first step   moments come as parameters are stepped (fp32 masters are there from the start)
steady step  backward pass or optimizer step, whichever is larger
evaluate     no gradients but zero3's; or answers (answers.py), by a model that was loaded for it
save         copies go to the host tensor by tensor, and sharded weights are gathered there: nothing more on the GPU
resume       states are read on the host and go to the GPU one tensor at a time
merge        tensor by tensor on the host
quantize     formats that calibrate: one layer at a time (calibration.py); others stream
verify       a process of its own, beside the context of the first: one model in bf16, whole on one GPU or spread over
             them, and the log-probabilities of a row (verification.py)
"""

from __future__ import annotations

from dataclasses import replace

from loadmaster.config.schema import Job
from loadmaster.preflight.answers import SAMPLES
from loadmaster.preflight.calibration import CALIBRATED, quantizing
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.memory import (
    Bytes,
    backward_and_step_bytes,
    communicator_bytes,
    context_bytes,
    gathered_forward,
    phases_in_training,
    resident,
)
from loadmaster.preflight.plan import MemoryGib, PhasesGib
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import units
from loadmaster.preflight.step import evaluation_batch
from loadmaster.preflight.verification import answering_bytes, answers_at_a_time, verifying


def phase_bytes(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> dict[str, Bytes]:
    """Peak of one GPU by component in each phase, in the order in which they come."""
    training = phases_in_training(shape, hardware, setup)
    train, rests = training["train"], training["save"]
    first = max(backward_and_step_bytes(shape, hardware, setup, first=True), key=lambda b: b.total)
    context = Bytes(context=context_bytes(hardware))
    return {
        "load": training["load"],
        "first_step": first,
        "steady_step": train,
        "evaluate": max(training["evaluate"], answering(job, shape, hardware, setup)[0], key=lambda b: b.total),
        "save": rests,
        "resume": rests,
        "merge": context,
        "quantize": quantizing(job, shape, hardware) if set(job.export.formats) & set(CALIBRATED) else context,
        "verify": verifying(job, shape, hardware, setup).bytes,
    }


def answering(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> tuple[Bytes, int]:
    """The evaluate stage's answers, where it asks for some, and how many are asked at a time: weights, what is
    gathered or dequantized of them, and what the answers take. A GPU is asked half as many where it has no room."""
    has_task = job.evaluation.task != "none"
    if not has_task and (setup.spreads_weights or job.data.validation is None or job.data.format == "text"):
        return Bytes(), 0
    batch = evaluation_batch(shape, setup).at_peak
    gathered = gathered_forward(shape, setup, sum(batch.values()))
    if setup.shards > 1 and setup.reshard_after_forward and (embedding := units(shape, setup).embedding):
        gathered += embedding.gathered  # whole as long as answers are made (training/sharding.py)
    beside = Bytes(
        weights=resident(shape, setup)[0] if setup.offload != "all" else 0.0,
        quantization=batch["quantization"],
        context=context_bytes(hardware),
        communication=communicator_bytes(hardware) + batch["communication"] + gathered,
    )
    answers, budget = answers_at_a_time(job), hardware.budget_gib(job.plan.reserve) * GIB
    answers = answers if has_task else min(answers, SAMPLES)
    halved = job.evaluation.batch_size == "auto" and not hardware.is_cpu
    while True:
        need = replace(beside, activations=answering_bytes(job, shape, setup.width, answers))
        if need.total <= budget or answers == 1 or not halved:
            return need, answers
        answers //= 2


def phases_gib(phases: dict[str, Bytes]) -> PhasesGib:
    total = {name: round(part.total / GIB, 4) for name, part in phases.items()}
    return PhasesGib(
        **total,
        train=max(total["first_step"], total["steady_step"]),
        export=max(total["merge"], total["quantize"], total["verify"]),
    )


def components_gib(phases: dict[str, Bytes]) -> dict[str, MemoryGib]:
    return {name: part.gib() for name, part in phases.items()}
