"""`plan.trace=true`: the plan with a trace of its step beside it, or made from traces where there is no closed form.

A family that the preflight does not model is counted like Llama at first. Here its plan's micro-batch is traced, and
weights, trained parameters and activations of the trace take the place of what was counted. When that is more than the
card has, the plan is made again for a card that is smaller by as much as the count was short, until a traced one fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.hardware import GIB
from loadmaster.preflight.memory import state_bytes
from loadmaster.preflight.plan import MemoryGib, Plan
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.step import training_step
from loadmaster.training.trace import trace_plan, traced_setup

TRIES = 6


def traced(job: Job, make: Callable[[float], Plan]) -> Plan:
    """The job's plan with what a trace says; corrected by it where the model is not one that is modelled.

    make: the plan for a share of each card's memory.
    """
    plan = make(1.0)
    shape = find_shape(job.model, traced=True)
    found = trace_plan(job, plan)
    if not shape.estimate or "multimodal" in shape.estimate:
        return replace(plan, trace=found)
    whole = plan
    corrected = correct(job, plan, shape, found)
    share = 1.0
    for _ in range(TRIES):
        if corrected.fits or not plan.fits:
            break
        share *= whole.budget_gib / corrected.memory_gib.total
        plan = make(share)
        there = replace(plan, budget_gib=whole.budget_gib, hardware=whole.hardware)
        corrected = correct(job, there, shape, trace_plan(job, plan))
    return corrected


def correct(job: Job, plan: Plan, shape: ModelShape, found: dict[str, Any]) -> Plan:
    """The plan with the traced model's memory in place of the counted one's; speed follows the parameters."""
    setup = traced_setup(job, plan)
    shards = plan.world_size // plan.replicas if plan.sharding not in ("none", "ddp") else 1
    trainable = found["trainable_parameters"] / shards
    if plan.sharding in ("zero1", "zero2"):
        shards = 1  # of weights
    in_kernels = training_step(shape, setup).peak - training_step(shape, setup, in_place=False).peak
    old = plan.memory_gib
    accumulated = plan.gradient_accumulation_steps > 1
    gradients = setup.width * trainable / GIB
    states = state_bytes(setup) * trainable / GIB if plan.offload == "none" else 0.0
    larger = found["parameters"] / shape.parameters
    memory = MemoryGib(
        weights=found["weights_gib"] / shards if plan.offload != "all" else 0.0,
        gradients=gradients if accumulated else 0.0,
        optimizer=states,
        activations=found["traced_gib"] + max(0, in_kernels) / GIB,
        logits=0.0,
        quantization=0.0,
        communication=old.communication * max(1.0, larger),
        context=old.context,
        total=0.0,
    )
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.communication)
    step = memory.weights + gradients + states + memory.communication
    total = max(sum(parts), step) + memory.context
    memory = replace(memory, total=total)
    said = f"{shape.estimate.split(':')[0]}: memory is that of a traced step, speed is an estimate"
    rests = memory.weights + memory.optimizer + memory.context
    fits = plan.fits and total <= plan.budget_gib
    known = fits and not shape.experts and plan.tokens_per_second is not None
    speed = round(plan.tokens_per_second / larger, 1) if known else None
    reasons = [f"traced: {total:.1f} of {plan.budget_gib:.1f} GiB", *plan.reasons[1:-1], f"an estimate: {said}"]
    return replace(
        plan,
        fits=fits,
        model=replace(
            plan.model, estimate=said,
            parameters=found["parameters"], trainable_parameters=found["trainable_parameters"],
        ),
        memory_gib=MemoryGib(**{name: round(value, 4) for name, value in memory.__dict__.items()}),
        phases_gib=replace(
            plan.phases_gib, load=round(rests - memory.optimizer, 4), train=round(total, 4), save=round(rests, 4),
            first_step=round(total, 4), steady_step=round(total, 4), resume=round(rests, 4),
        ),
        phase_components_gib={},
        peak_gib=None,
        tokens_per_second=speed,
        hours=None if speed is None or plan.hours is None else plan.hours * larger,
        cost_usd=None if speed is None or plan.cost_usd is None else plan.cost_usd * larger,
        reasons=reasons if fits else [f"traced: needs {total:.1f} GiB on each GPU of {plan.budget_gib:.1f}", *reasons],
        runners_up=[],
        elsewhere=[],
        basis={**plan.basis, "memory": "weights, trained parameters, activations and loss: a traced step of the "
               "model's own code; context: as of other models; sharding's buffers: scaled from a model like Llama"},
        trace=found,
    )
