"""What the verification of exports takes: bytes of each GPU, of host memory and disk, and the time of what is moved.

    one GPU        where it holds the model: weights, a row's activations, its logits with both log-probabilities
    several        layers over the GPUs of one node (the lead's), then host memory, then disk (placement.py)
    time           forward passes x (bytes in host memory / copies over PCIe + bytes on disk / its reads)

The largest model decides: an export in bf16, for quantized ones are scored with the weights that they stand for. The
time is modelled; that of computing is in the overhead of a run (speed.py). No run on several GPUs was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from loadmaster.config.schema import EvaluationConfig, Job
from loadmaster.preflight.answers import answer_bytes
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.memory import Bytes, context_bytes, replay_key
from loadmaster.preflight.placement import Placement, Room, place
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import frozen_form
from loadmaster.preflight.step import evaluation_batch
from loadmaster.preflight.weights import base_bytes

REFERENCE_BYTES = 2**30
"""Log-probabilities of the trained model that are kept in host memory, at most."""
ANSWERS_AT_A_TIME = 16
"""loadmaster.evaluation.AUTO_BATCH_SIZE; a test holds the two equal."""
ANSWERS, ANSWER_TOKENS = 16, 64
"""Greedy answers that are compared where there is no task, and their longest length."""
PROMPTS_A_ROW = 4
"""Documents in a packed row: prompts that are answered are taken to be as long. A judgement."""
ASKED_OF_A_TASK = 128
"""Prompts of a task whose number is not set (evaluation.max_rows). A judgement."""
OTHER_PASSES = 4 * 32 + 2 * 4
"""Of an export: recorded answers one by one (export/smoke.py), and that tokens end a turn (live_checks.stops)."""


@dataclass(frozen=True)
class VerificationNeed:
    bytes: Bytes
    """Of the GPU that holds most; of the first with the whole model, where it fits nowhere."""
    placement: Placement | None
    """None: the model fits nowhere on this machine."""
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    passes: int = 0
    """Forward passes of all models together, each of which moves what is not on a GPU."""
    seconds: float = 0.0
    """Of moving."""
    working: float = 0.0
    """Bytes of the first GPU besides weights and adapters."""
    passing: float = 0.0
    """And of each other one."""

    @property
    def is_whole(self) -> bool:
        """One GPU holds the model."""
        return self.placement is not None and self.placement.is_whole

    def summary(self) -> dict[str, Any]:
        """For plan.json."""
        layers = None if self.placement is None else {
            "gpus": list(self.placement.gpus), "host": self.placement.host, "disk": self.placement.disk,
        }  # fmt: skip
        return {
            "fits": self.placement is not None, "layers": layers,
            "working_gib": round(self.working / GIB, 3), "passing_gib": round(self.passing / GIB, 3),
            "host_gib": round(self.host_bytes / GIB, 2), "disk_gib": round(self.disk_bytes / GIB, 2),
            "passes": self.passes, "moving_hours": round(self.seconds / 3600, 3),
        }  # fmt: skip


def verifying(job: Job, shape: ModelShape, hardware: Hardware, setup: Setup) -> VerificationNeed:
    """The trained model, then each export by itself, scored on a row and asked for answers."""
    exported = float(setup.width * shape.parameters)
    adapters = setup.width * setup.trainable(shape) if setup.adapters else 0.0
    trained = base_bytes(shape, setup.method, setup.precision) + adapters
    working = _working(job, shape, setup)
    context = (1 if hardware.is_cpu else 2) * context_bytes(hardware)
    beside = working.total, max(working.activations, _compared(shape, setup, layers_alone=True))
    whole = replace(working, weights=max(exported, trained), context=context)
    if hardware.is_cpu:
        return VerificationNeed(whole, Placement((shape.layers,)), working=beside[0], passing=beside[1])
    free = hardware.memory_gib * (1 - job.plan.reserve) * GIB - context
    room = Room(
        (free,) * hardware.count, _host_room(hardware), True, beside[0] + adapters, beside[1] + adapters
    )  # fmt: skip
    layers, rest = _sizes(shape, setup, exported)
    placement = place(layers, rest, room)
    frozen = frozen_form(setup) is not None
    if frozen and place(*_sizes(shape, setup, trained - adapters), replace(room, disk=False)) is None:
        placement = None
    if placement is None or placement.is_whole:
        return VerificationNeed(whole, placement, working=beside[0], passing=beside[1])
    each = max(layers)
    moved = each if placement.host or placement.disk else 0.0
    on_gpus = [replace(working, weights=rest + adapters + placement.gpus[0] * each + moved, context=context)]
    inside = Bytes(activations=beside[1], context=context)
    on_gpus += [replace(inside, weights=adapters + count * each) for count in placement.gpus[1:] if count]
    host, disk = placement.host * each, placement.disk * each
    passes = forward_passes(job, setup)
    host_rate = hardware.host_gb_per_s * 1e9 * value("efficiency", "pageable_link")
    seconds = passes * (host / host_rate + disk / (value("overhead", "load_gb_per_s") * 1e9))
    return VerificationNeed(max(on_gpus, key=lambda b: b.total), placement, host, disk, passes, seconds, *beside)


def _working(job: Job, shape: ModelShape, setup: Setup) -> Bytes:
    """Of a row while it is scored, of answers, or of a matrix while it is compared, whichever is most."""
    scored = min(job.sequence_length, REFERENCE_BYTES // (4 * shape.vocabulary_size))
    row = replace(setup, micro_batch_size=1, sharding="none", replicas=1, offload="none", precision="bf16")
    batch = evaluation_batch(shape, replay_key(replace(row, method="full"), keep=False)).at_peak
    logits = (2 + 5 * 4) * scored * shape.vocabulary_size  # bf16; fp32 logits, both log-probabilities, exp and product
    answers = answering_bytes(job, shape, setup.width) if job.evaluation.task != "none" else 0.0
    scoring = Bytes(
        activations=max(batch["activations"] if logits >= answers else 0.0, answers),
        logits=logits if logits >= answers else 0.0,
    )
    return max(scoring, Bytes(quantization=_compared(shape, setup)), key=lambda b: b.total)


def _compared(shape: ModelShape, setup: Setup, layers_alone: bool = False) -> float:
    """Of the largest tensor that is held against the live model's (export/live_checks.py): the live one in fp32, the
    exported one in bf16; under adapters their product and the sum, and of a frozen one the stored base and its sum."""
    each = 4 + 2 + (8 if setup.adapters else 0) + (8 if frozen_form(setup) else 0) + (4 if setup.dora else 0)
    matrix = max(m.weight for m in shape.matrices())
    experts = 2 * shape.experts * shape.expert_size * shape.hidden_size
    outside = 0 if layers_alone else shape.embedding_parameters
    return float(max(each * matrix, (4 + 2) * max(experts, outside)))


def _sizes(shape: ModelShape, setup: Setup, weights: float) -> tuple[list[float], float]:
    """(bytes of each layer, bytes of embeddings, final norm and head) of a model of so many bytes."""
    rest = setup.width * (shape.embedding_parameters + shape.head_parameters + shape.hidden_size)
    return [(weights - rest) / shape.layers] * shape.layers, float(rest)


def _host_room(hardware: Hardware) -> float | None:
    """Host memory of a node beside its processes and what is kept of the trained model."""
    if hardware.host_memory_gib is None:
        return None
    processes = (hardware.count + 1) * value("context", "host_process_gib")
    return max(0.0, (hardware.host_memory_gib - processes) * GIB - REFERENCE_BYTES)


def answering_bytes(job: Job, shape: ModelShape, width: int) -> float:
    """Of the answers that are generated at a time."""
    prompt = job.sequence_length / PROMPTS_A_ROW
    return answer_bytes(shape, width, answers_at_a_time(job), prompt, job.evaluation.max_new_tokens)


def answers_at_a_time(job: Job) -> int:
    answers = ANSWERS_AT_A_TIME if job.evaluation.batch_size == "auto" else job.evaluation.batch_size
    return answers if job.evaluation.max_rows is None else min(answers, job.evaluation.max_rows)


def forward_passes(job: Job, setup: Setup) -> int:
    """Of the trained model, its base and every export: one a row, one a token of a batch of answers."""
    rows = job.export.verification_rows
    each = rows + answer_passes(job.evaluation)
    formats = set(job.export.formats)
    scored = len(formats) + ("int4" in formats)
    merges = 2 * rows if setup.method == "qlora" and formats - {"adapter"} else 0  # no answers are generated
    return each + rows + merges + scored * each + len(formats) * OTHER_PASSES


def answer_passes(evaluation: EvaluationConfig, prompts: int | None = None) -> int:
    """Forward passes of one model that answers: one a token of a batch.

    prompts: that are held out, of which some are asked; None: not known yet.
    """
    batch = ANSWERS_AT_A_TIME if evaluation.batch_size == "auto" else evaluation.batch_size
    most, tokens = evaluation.max_rows, evaluation.max_new_tokens
    if evaluation.task == "none":
        most, tokens = ANSWERS, min(tokens, ANSWER_TOKENS)
    there = (most or ASKED_OF_A_TASK) if prompts is None else prompts
    return math.ceil(min(most or there, there) / batch) * tokens
