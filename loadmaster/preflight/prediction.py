"""The plan's peak held against what the worst step on a real GPU took: how far off, and through which component.

allocated at load             weights, fp32 masters
allocated between steps       the same, and optimizer states
peak minus that               gradients, activations, logits, dequantized weights, gathered shards
reserved over allocated       fragmentation
device minus reserved         CUDA context, communicators
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loadmaster.preflight.hardware import GIB
from loadmaster.preflight.plan import Plan
from loadmaster.words import counted

FAR = 0.05
"""Share of the measured peak from which on a prediction is said to be off."""
MASTER_BYTES = 4
STEPS_FAR = 0.25
"""Share of the run's steps from which on the plan's are said to be off: it knows the data's size alone."""


@dataclass(frozen=True)
class Measured:
    """GiB of one GPU in the rehearsal's worst step."""

    allocated: float
    reserved: float
    device: float
    loaded: float
    """Allocated before the first step."""
    resting: float
    """Allocated after an optimizer step."""


def held_against(plan: Plan, measured: Measured) -> dict[str, Any] | None:
    """For result.json: predicted and measured GiB with the difference, in all and of each part; None on a CPU."""
    if plan.peak_gib is None or plan.hardware.gpu == "cpu":
        return None
    counters = {name: _row(value, getattr(measured, name)) for name, value in asdict(plan.peak_gib).items()}
    parts = {
        name: {"predicted_gib": round(predicted, 4), "measured_gib": round(seen, 4),
               "off_gib": round(predicted - seen, 4)}
        for name, (predicted, seen) in _parts(plan, measured).items()
    }
    return {**counters, "parts": parts}


def _parts(plan: Plan, measured: Measured) -> dict[str, tuple[float, float]]:
    """Name of a part -> (predicted, measured) GiB."""
    memory = plan.memory_gib
    masters = 0.0
    if plan.master_weights and memory.optimizer:
        shards = plan.world_size // plan.replicas if plan.sharding not in ("none", "ddp") else 1
        masters = MASTER_BYTES * plan.model.trainable_parameters / shards / GIB
    step = memory.gradients + memory.activations + memory.logits + memory.quantization
    outside = plan.peak_gib.device - plan.peak_gib.reserved
    gathered = max(0.0, memory.communication + memory.context - outside)  # of that, what torch allocates
    return {
        "weights": (memory.weights + masters, measured.loaded),
        "optimizer states": (memory.optimizer - masters, measured.resting - measured.loaded),
        "gradients, activations and loss": (step + gathered, measured.allocated - measured.resting),
        "fragmentation": (plan.peak_gib.reserved - plan.peak_gib.allocated, measured.reserved - measured.allocated),
        "CUDA context and communicators": (outside, measured.device - measured.reserved),
    }


def _row(predicted: float, measured: float) -> dict[str, float]:
    return {
        "predicted_gib": round(predicted, 4), "measured_gib": round(measured, 4),
        "difference": round(predicted / measured - 1, 4) if measured else 0.0,
    }


def sentence(found: dict[str, Any] | None) -> str | None:
    """What the user is told of a prediction that is more than FAR off; None of one that is not."""
    if found is None:
        return None
    far = {name: found[name] for name in ("allocated", "device") if abs(found[name]["difference"]) > FAR}
    if not far:
        return None
    name, row = max(far.items(), key=lambda item: abs(item[1]["difference"]))
    part, off = max(found["parts"].items(), key=lambda item: abs(item[1]["off_gib"]))
    return (
        f"the memory predicted for the worst step is {abs(row['difference']):.1%} too "
        f"{'high' if row['difference'] > 0 else 'low'} ({name}: {row['predicted_gib']:.2f} GiB predicted, "
        f"{row['measured_gib']:.2f} measured); most of it in {part}: {off['predicted_gib']:.2f} GiB predicted, "
        f"{off['measured_gib']:.2f} measured"
    )


def sentence_of_steps(plan: Plan, steps: int) -> str | None:
    """The same of its steps, which are known when the data are tokenised."""
    if plan.steps is None or abs(plan.steps / steps - 1) < STEPS_FAR:
        return None
    figures = "" if plan.hours is None else ", and its hours and dollars are those of training for so many"
    return f"the data make {counted(steps, 'step')}; the plan expected about {plan.steps:,} by their size{figures}"
