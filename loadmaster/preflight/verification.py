"""What the verification of exports takes: bytes of each GPU, of host memory and disk, and the time of what is moved.

    one GPU        where it holds the model: weights, a row's activations, its logits with both log-probabilities
    several        layers over the GPUs of one node (the lead's), then host memory, then disk (placement.py)
    time           forward passes x (bytes in host memory / copies over PCIe + bytes on disk / its reads)

The largest model decides: what was trained in fp32, or an export in bf16, for quantized ones are scored with the
weights that they stand for. Of answers, so many are asked at a time as take least time: more take fewer passes, and
room that layers would have had. The time is modelled; that of computing is in the overhead of a run (hours.py). No run
on several GPUs was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.config.schema import EvaluationConfig, Job
from loadmaster.preflight.answers import LONGEST_SAMPLE_PROMPT, SAMPLE_TOKENS, answer_bytes
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.exports import counts_exports
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.memory import Bytes, context_bytes
from loadmaster.preflight.placement import Placement, Room, place
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.step import evaluation_batch
from loadmaster.preflight.weights import base_bytes

REFERENCE_BYTES = 2**30
"""Log-probabilities of the trained model that are kept in host memory, at most."""
ANSWERS_AT_A_TIME = 16
"""Where evaluation.batch_size is auto."""
ANSWERS, ANSWER_TOKENS = 16, 64
"""Greedy answers that are compared where there is no task, and their longest length."""
PROMPTS_A_ROW = 4
"""Documents in a packed row: prompts that are answered are taken to be as long. A judgement."""
ASKED_OF_A_TASK = 128
"""Prompts of a task whose number is not set (evaluation.max_rows). A judgement."""
NEARLY = 1.15
"""Of the least time: for that, no more answers are asked at a time. A judgement."""
OTHER_PASSES = 4 * 32 + 2 * 4
"""Of an export: recorded answers one by one (export/answers.py), and that tokens end a turn (live_checks.stops)."""


@dataclass(frozen=True)
class VerificationNeed:
    bytes: Bytes
    """Of the GPU that holds most; of the first with the whole model, where it fits nowhere."""
    placement: Placement | None
    """None: the model fits nowhere on this machine."""
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    passes: int = 0
    """Forward passes of all models together that move what is not on a GPU."""
    seconds: float = 0.0
    """Of moving."""
    working: float = 0.0
    """Bytes of the first GPU besides weights and adapters."""
    passing: float = 0.0
    """And of each other one."""
    answers: int = ANSWERS_AT_A_TIME
    """Asked at a time."""

    @property
    def is_whole(self) -> bool:
        """One GPU holds the model."""
        return self.placement is not None and self.placement.is_whole

    def summary(self) -> dict[str, Any]:
        """For plan.json."""
        layers = None if self.placement is None else {
            "gpus": list(self.placement.gpus), "host": self.placement.host, "disk": self.placement.disk,
        }
        return {
            "fits": self.placement is not None, "layers": layers,
            "working_gib": round(self.working / GIB, 3), "passing_gib": round(self.passing / GIB, 3),
            "host_gib": round(self.host_bytes / GIB, 2), "disk_gib": round(self.disk_bytes / GIB, 2),
            "passes": self.passes, "moving_hours": round(self.seconds / 3600, 3), "answers_at_a_time": self.answers,
        }


def verifying(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> VerificationNeed:
    """The trained model, then each export by itself, scored on a row and asked for answers."""
    usual = answers_at_a_time(job)
    scoring = _scoring(job, shape, setup)
    need = _verifying(job, shape, hardware, setup, scoring, usual)
    if job.evaluation.batch_size != "auto" or (need.placement and not need.seconds):
        return need
    most = prompts_asked(job.evaluation)
    halved, doubled = (usual // 2, usual // 4, usual // 8, 1), (2 * usual, 4 * usual, 8 * usual, most)
    found = [need] + [
        _verifying(job, shape, hardware, setup, scoring, answers)
        for answers in (*halved, *doubled)
        if 0 < answers <= most and answers != usual
    ]
    possible = [each for each in found if each.placement is not None]
    least = min((each.seconds for each in possible), default=0.0)
    return next((each for each in possible if each.seconds <= NEARLY * least), need)


def _verifying(
    job: Job, shape: ModelShape, hardware: Hardware, setup: Setup, scoring: Bytes, answers: int
) -> VerificationNeed:
    """With so many answers at a time; scoring: of a row, or of a matrix while it is compared."""
    frozen = setup.frozen_form is not None
    width = 2 if frozen else setup.width  # exports are loaded in bf16, what is trained in its own precision
    exported = float(width * shape.parameters)
    adapters = setup.width * setup.trainable(shape) if setup.adapters else 0.0
    trained = base_bytes(shape, setup.method, setup.precision) + adapters
    working = scoring
    if job.evaluation.task != "none":
        answering = Bytes(activations=answering_bytes(job, shape, setup.width, answers))
        working = max(scoring, answering, key=lambda b: b.total)
    context = (1 if hardware.is_cpu else 2) * context_bytes(hardware)
    passing = max(working.activations, _compared(shape, setup, layers_alone=True))
    whole = replace(working, weights=max(exported, trained), context=context)
    free = hardware.budget_gib(job.plan.reserve) * GIB - context
    each_gpu, host_room = (free,) * hardware.count, _host_room(hardware)
    if hardware.is_cpu:  # host memory in the place of the first GPU, then disk, as export/room.py has it
        each_gpu, host_room = (free - REFERENCE_BYTES,), 0.0
    room = Room(each_gpu, host_room, working=working.total + adapters, passing=passing + adapters)
    layers, rest = _sizes(shape, width, exported)
    placement = place(layers, rest, room)
    trained_layers, trained_rest = _sizes(shape, setup.width, trained - adapters)
    of_trained = place(trained_layers, trained_rest, replace(room, disk=not frozen))
    if of_trained is None:
        placement = None
    need = VerificationNeed(whole, placement, working=working.total, passing=passing, answers=answers)
    if placement is None or placement.is_whole:
        return need
    each = max(layers)
    moved = each if placement.host or placement.disk else 0.0
    on_gpus = [replace(working, weights=rest + adapters + placement.gpus[0] * each + moved, context=context)]
    inside = Bytes(activations=passing, context=context)
    on_gpus += [replace(inside, weights=adapters + count * each) for count in placement.gpus[1:] if count]
    passes, seconds = 0, 0.0
    of_exports, of_others = forward_passes(job, setup, answers)
    for there, size, times in ((placement, each, of_exports), (of_trained, max(trained_layers), of_others)):
        if there.host or there.disk:
            passes += times
            seconds += times * _moving_seconds(hardware, there.host * size, there.disk * size)
    return replace(
        need,
        bytes=max(on_gpus, key=lambda b: b.total),
        host_bytes=placement.host * each,
        disk_bytes=placement.disk * each,
        passes=passes,
        seconds=seconds,
    )


def _moving_seconds(hardware: Hardware, host: float, disk: float) -> float:
    """Of bytes that are brought to the first GPU from host memory and from disk."""
    link = hardware.host_gb_per_s * 1e9 * value("efficiency", "pageable_link")
    return host / link + disk / (value("overhead", "load_gb_per_s") * 1e9)


def _scoring(job: Job, shape: ModelShape, setup: Setup) -> Bytes:
    """Of a row while it is scored, or of a matrix while it is compared, whichever is more."""
    scored = min(job.sequence_length, REFERENCE_BYTES // (4 * shape.vocabulary_size))
    row = replace(setup, micro_batch_size=1, sharding="none", replicas=1, offload="none", precision="bf16")
    batch = evaluation_batch(shape, replace(row, method="full")).at_peak
    logits = (2 + 5 * 4) * scored * shape.vocabulary_size  # bf16; fp32 logits, both log-probabilities, exp and product
    scoring = Bytes(activations=batch["activations"], logits=logits)
    return max(scoring, Bytes(quantization=_compared(shape, setup)), key=lambda b: b.total)


def _compared(shape: ModelShape, setup: Setup, layers_alone: bool = False) -> float:
    """Of the largest tensor that is held against the live model's (export/live_checks.py): the live one in fp32, the
    exported one in bf16; under adapters their product and the sum, and of a frozen one the stored base and its sum."""
    each = 4 + 2 + (8 if setup.adapters else 0) + (8 if setup.frozen_form else 0) + (4 if setup.dora else 0)
    matrix = max(m.weight for m in shape.all_matrices)
    experts = 2 * shape.experts * shape.expert_size * shape.hidden_size
    outside = 0 if layers_alone else shape.embedding_parameters
    return float(max(each * matrix, (4 + 2) * max(experts, outside)))


def _sizes(shape: ModelShape, width: int, weights: float) -> tuple[list[float], float]:
    """(bytes of each layer, bytes of embeddings, final norm and head) of a model of so many bytes."""
    rest = width * (shape.embedding_parameters + shape.head_parameters + shape.hidden_size)
    return [(weights - rest) / shape.layers] * shape.layers, float(rest)


def _host_room(hardware: Hardware) -> float | None:
    """Host memory of a node beside its processes and what is kept of the trained model."""
    if hardware.host_memory_gib is None:
        return None
    processes = (hardware.count + 1) * value("context", "host_process_gib")
    return max(0.0, (hardware.host_memory_gib - processes) * GIB - REFERENCE_BYTES)


def answering_bytes(job: Job, shape: ModelShape, width: int, answers: int) -> float:
    """Of so many answers that are generated at a time: for the task, or to be read where there is none."""
    prompt, new = job.sequence_length / PROMPTS_A_ROW, job.evaluation.max_new_tokens
    if job.evaluation.task == "none":
        prompt, new = min(prompt, LONGEST_SAMPLE_PROMPT), min(new, SAMPLE_TOKENS)
    return answer_bytes(shape, width, answers, prompt, new)


def answers_at_a_time(job: Job) -> int:
    answers = ANSWERS_AT_A_TIME if job.evaluation.batch_size == "auto" else job.evaluation.batch_size
    return answers if job.evaluation.task == "none" else min(answers, job.evaluation.max_rows or answers)


def forward_passes(job: Job, setup: Setup, answers: int) -> tuple[int, int]:
    """(of every export, of the trained model and its base): one a row, one a token of a batch of answers."""
    rows = job.export.verification_rows
    each = rows + answer_passes(job.evaluation, answers)
    formats = set(job.export.formats)
    scored = len(formats) + ("int4" in formats)
    merges = 2 * rows if setup.method == "qlora" and formats - {"adapter"} else 0  # no answers are generated
    return merges + scored * each + len(formats) * OTHER_PASSES, each + rows


def answer_passes(evaluation: EvaluationConfig, answers: int, prompts: int | None = None) -> int:
    """Forward passes of one model that answers: one a token of a batch.

    answers: asked at a time.
    prompts: that are held out, of which some are asked; None: not known yet.
    """
    tokens = evaluation.max_new_tokens
    tokens = min(tokens, ANSWER_TOKENS) if evaluation.task == "none" else tokens
    return math.ceil(prompts_asked(evaluation, prompts) / answers) * tokens


def prompts_asked(evaluation: EvaluationConfig, prompts: int | None = None) -> int:
    """Of those that are held out; None: not known yet."""
    most = ANSWERS if evaluation.task == "none" else evaluation.max_rows
    there = (most or ASKED_OF_A_TASK) if prompts is None else prompts
    return min(most or there, there)


def can_export(job: Job, verification: dict[str, Any] | None) -> bool:
    """Whether the last stage that the job asks for can pass, by a plan's `verification`."""
    return verification is None or verification["fits"] or not counts_exports(job)
