"""What would fail at hour three fails in the first minute.

Before step 1 the run goes once through everything it will do: forward, backward and optimizer step on the
fullest micro-batch, an evaluation batch, a checkpoint written, read back and compared. Then weights,
optimizer and random generators are put back bit for bit, so the run is the same with or without it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from loadmaster import processors
from loadmaster.data import MicroBatch, PreparedData
from loadmaster.errors import TrainingFailed
from loadmaster.models.recompute import checkpoint_the_rest
from loadmaster.out_of_memory import ran_out, seen
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.prediction import Measured, held_against, sentence
from loadmaster.training.batches import losses, worst_rows
from loadmaster.training.checkpoint import Checkpoints
from loadmaster.training.metrics import allocated_gib, most, peak_memory, reset_peak
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed
from loadmaster.training.rng import restore_rng, rng_state
from loadmaster.training.session import Session
from loadmaster.training.start import Parts

FP8_WORDS = ("scaled_mm", "float8", "fp8", "cublas", "cutlass")
"""In what PyTorch says where it has no such kernel."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
ODD = -7046029254386353131
"""2**64 by the golden ratio, as a signed number: its multiples are spread evenly."""
PIECE = 2**22
"""Elements at a time, for which there are 96 MiB besides."""


@dataclass(frozen=True)
class Rehearsed:
    """Peaks in GiB, and seconds, of the worst step with evaluation and saving."""

    peak_allocated_gib: float
    peak_reserved_gib: float
    peak_device_gib: float
    seconds: float
    step_s: float = 0.0
    """Of a step when all is compiled and cached, for each micro-batch in it."""
    loaded_gib: float = 0.0
    """Allocated before the first step."""
    resting_gib: float = 0.0
    """Allocated between two steps."""
    kept_layers: int = 0
    """Decoder layers that keep their activations beside others that are checkpointed."""
    parts_s: dict[str, float] = field(default_factory=dict)
    """Seconds of each part: the first step, in which all is compiled, the second, the evaluation, the checkpoint."""


def rehearse_run(
    session: Session, prepared: PreparedData, checkpoints: Checkpoints, scratch: Path, lr: float,
    echo: Callable[[str], None],
) -> Rehearsed:
    """The rehearsal, at the learning rate of step 1: what the warm-up would have saved is not refused.

    Where memory runs out with layers that keep their activations for speed alone, once more with all checkpointed.
    """
    rows, plan = prepared.train, session.plan
    picked = worst_rows(rows, plan.micro_batch_size * session.world.size)
    worst = session.split(picked)[:1] * min(2, plan.gradient_accumulation_steps)

    def step(batches: list[MicroBatch]) -> torch.Tensor:
        count = max(1, sum(losses(row, session.job.objective) for row in picked))
        _, norm = session.gradients(batches, count, lr)
        session.optimizer.step(lr)
        return norm

    def evaluate() -> None:
        if prepared.validation is None:
            return
        session.model.eval()
        with torch.no_grad():
            session.loss(session.split(worst_rows(prepared.validation, plan.micro_batch_size))[0])
        session.strategy.settle(session.loss)

    in_fp8 = plan.precision == "fp8"
    arguments = (step, evaluate, worst, session.trained, session.optimizer, checkpoints, scratch, in_fp8)
    try:
        return replace(rehearse(*arguments), kept_layers=plan.kept_layers)
    except TrainingFailed as error:
        chosen = plan.kept_layers and session.job.checkpointed_layers == "auto"  # what was written is not replaced
        if not chosen or session.world.size > 1 or not ran_out(error.__cause__):
            raise
    echo(
        f"note: out of GPU memory in the rehearsal with the activations of {plan.kept_layers} layers kept; "
        f"all {plan.model.layers} are checkpointed instead, which is slower"
    )
    checkpoint_the_rest(session.model)
    reset_peak(session.device)
    return rehearse(*arguments)


def rehearse(
    run_step: Callable[[list[MicroBatch]], torch.Tensor],
    evaluate_batch: Callable[[], None],
    worst: list[MicroBatch],
    trained: list[tuple[str, nn.Parameter]],
    optimizer: TrainingOptimizer,
    checkpoints: Checkpoints,
    scratch: Path,
    in_fp8: bool = False,
) -> Rehearsed:
    """Run everything once and restore all state. Raises TrainingFailed with the part that failed; where memory ran out
    a process of its own restores all as well, and torch's error is the cause.

    run_step: takes a step and gives its gradients' norm.
    worst: the fullest micro-batch, twice where a step accumulates: gradients then meet activations.
    in_fp8: products run on FP8 units, which a card or a build of PyTorch may refuse.
    """
    parts, world, local = Parts(), checkpoints.world, checkpoints.placed.part
    weights = {name: local(parameter).to("cpu", copy=True) for name, parameter in trained}
    generators = rng_state()
    part = "the fullest micro-batch"

    def put_back() -> None:
        with torch.no_grad():
            for name, parameter in trained:
                local(parameter).copy_(weights[name])
        optimizer.zero_grad()
        optimizer.reset()
        restore_rng(*generators)

    loaded = resting = allocated_gib(world.device)
    try:
        # Twice: gradients of the second backward pass meet the optimizer's states, as in every later step.
        parts.ended("before")
        norms = [run_step(worst)]
        parts.ended("first_step")
        norms.append(run_step(worst))
        resting = allocated_gib(world.device)
        # Both: rounding.py makes -0 of a GPU's NaN, whose bits are all set, and bitsandbytes passes NaN by.
        finite = all(map(math.isfinite, norms)) and all(is_finite(local(parameter)) for _, parameter in trained)
        parts.ended("second_step")
        if world.any(not finite):
            raise TrainingFailed(
                "an optimizer step of the rehearsal had gradients, or made weights, that are not finite\n"
                "fix: lower optimizer.lr, or look for a gradient that overflows (a very long row, a broken checkpoint)"
            )
        part = "an evaluation batch"
        evaluate_batch()
        parts.ended("evaluation")
        part = "saving and reloading a checkpoint"
        _save_and_reload(scratch, trained, optimizer, checkpoints)
        parts.ended("checkpoint")
    except RuntimeError as error:
        if ran_out(error):
            had = seen()
            if world.size == 1:  # of several, the others are in another collective than a restore's (zero.py) would be
                put_back()
            raise TrainingFailed(
                f"out of GPU memory in the rehearsal, at {part}{had}. Another program on the card holds some of it "
                "(nvidia-smi lists them), or the preflight's plan was too large: then set a smaller micro_batch_size "
                "or sequence_length, or activation_checkpointing=full"
            ) from error
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            if in_fp8 and any(word in str(error).lower() for word in FP8_WORDS):
                raise TrainingFailed(
                    f"an FP8 product was refused in the rehearsal, at {part} ({' '.join(str(error).split())[:200]}).\n"
                    "fix: precision=bf16 trains without"
                ) from error
            raise
        cause = getattr(error, "inner_exception", None) or error
        # Of a compiler that failed, what it said; the command before that fills a screen.
        reason = " ".join(str(getattr(cause, "output", None) or cause).split())[:400]
        raise TrainingFailed(
            f"the decoder layers, or adamw_bf16's step, could not be compiled ({type(cause).__name__}: {reason}).\n"
            "fix: compile=false trains without, and so does another optimizer; a C compiler (gcc) and Python's headers "
            "are what is usually missing, or a folder that programs may be run from (TORCHINDUCTOR_CACHE_DIR)"
        ) from error
    finally:
        if world.lead:
            shutil.rmtree(scratch, ignore_errors=True)
    peaks = most(world.gather(peak_memory(world.device)))
    put_back()
    parts.ended("after")
    step_s = parts.seconds["second_step"] / len(worst)
    return Rehearsed(
        **peaks, seconds=parts.total_s, step_s=step_s, loaded_gib=loaded, resting_gib=resting, parts_s=parts.seconds
    )


def told(rehearsal: Rehearsed, plan: Plan) -> list[str]:
    """What is said of it: its time and peak, and where the plan was far off."""
    on_gpu = plan.peak_gib is not None and plan.hardware.gpu != "cpu"
    predicted = plan.peak_gib.allocated if on_gpu else plan.memory_gib.total  # on a CPU the whole process is counted
    lines = [
        f"rehearsal passed in {rehearsal.seconds:.1f} s: worst step, evaluation, save and reload; "
        f"peak {rehearsal.peak_allocated_gib:.2f} GiB, predicted {predicted:.2f} GiB"
    ]
    said = sentence(held_against(plan, measured(rehearsal)))
    return [*lines, f"note: {said}"] if said else lines


def measured(rehearsal: Rehearsed) -> Measured:
    return Measured(
        rehearsal.peak_allocated_gib, rehearsal.peak_reserved_gib, rehearsal.peak_device_gib,
        rehearsal.loaded_gib, rehearsal.resting_gib,
    )


def is_finite(part: torch.Tensor) -> bool:
    """By its largest value: torch.isfinite takes twice the memory of what it looks at."""
    return not part.numel() or bool(torch.linalg.vector_norm(part, float("inf")).isfinite())


def _save_and_reload(
    scratch: Path, trained: list[tuple[str, nn.Parameter]], optimizer: TrainingOptimizer, checkpoints: Checkpoints
) -> None:
    checkpoints.save(scratch, trained, optimizer, {"step": 0, "job_hash": "rehearsal"})
    checkpoints.wait()
    checkpoints.forget_figures()
    before = _digests(trained, optimizer, checkpoints.placed, checkpoints.world.local_size)
    checkpoints.load(scratch, trained, optimizer)
    after = _digests(trained, optimizer, checkpoints.placed, checkpoints.world.local_size)
    changed = [name for name, mark in before.items() if after.get(name) != mark]
    changed = [name for part in checkpoints.world.gather(changed) for name in part]
    if changed:
        raise TrainingFailed(f"a checkpoint did not read back as written: {', '.join(changed[:3])}")


def _digests(
    trained: list[tuple[str, nn.Parameter]], optimizer: TrainingOptimizer, placed: Placed, local_size: int
) -> dict[str, int | str]:
    """Of each weight and each state: copies of them all would not fit beside a large model's."""
    tensors = {name: placed.part(parameter) for name, parameter in trained} | optimizer.state()[0]
    host = {name: tensor for name, tensor in tensors.items() if tensor.device.type == "cpu"}
    with ThreadPoolExecutor(max(1, processors.usable() // local_size)) as pool:
        digests = dict(zip(host, pool.map(_sha256, host.values()), strict=True))
    return digests | {name: fingerprint(tensor) for name, tensor in tensors.items() if name not in host}


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def fingerprint(tensor: torch.Tensor) -> int:
    """64 bits that depend on every bit of a tensor and on its place, for what lies on a GPU: SHA-256 is made on the
    host, where all states of an 8B would go to twice.

    Elements as integers, their bits mixed and each times an odd number of its place, are added modulo 2**64, and so are
    pieces: one element that alone has changed always shows, and other changes all but about one in 2**64. Unmixed, a
    sign of 32 bits would meet no more than 33 bits of its place's number. (torch.hash_tensor has no places at all.)
    """
    whole = tensor.detach().contiguous().reshape(-1)
    whole = whole.view(INTEGERS[whole.element_size()])
    place = torch.arange(min(PIECE, whole.numel()), device=whole.device) * ODD
    place = (place ^ place >> 29) | 1  # in no order: what changes places shows
    total = 0
    for piece in whole.split(PIECE):
        mixed = piece.long().mul_(ODD)
        mixed ^= mixed >> 32  # no two numbers of 32 bits become the same
        total = (total * ODD + int(mixed.mul_(place[: len(piece)]).sum())) % 2**64
    return total
