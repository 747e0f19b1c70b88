"""Seconds of a training step by a roofline over the replayed work, and tokens a second.

    micro-batch = max( matmul FLOPs / (peak x e1) + attention FLOPs / (peak x e2) + bytes moved / (bandwidth x e3),
                       kernels x launch time )       narrow products: the longer of their FLOPs and their bytes
    step        = micro-batches + optimizer traffic / (bandwidth x e3) + collectives that compute does not hide
                  (communication.py)

FLOPs, bytes and kernels are counted operation by operation (replay.py). The efficiencies e are in
coefficients.yaml with card and date; other cards use the same ones against their own peaks, and a plan says so.
"""

from __future__ import annotations

import math
from dataclasses import replace

from loadmaster import catalog
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.communication import step_communication
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.memory import inputs_bytes, state_bytes
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.replay import Work
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.step import evaluation_batch, replay_key, training_step
from loadmaster.preflight.traffic import fused_bytes


def tokens_per_second(shape: ModelShape, hardware: Hardware, setup: Setup) -> float | None:
    """All tokens through the model, over all GPUs; None for a card that the catalogue does not know."""
    if not hardware.known:
        return None
    tokens = setup.tokens * setup.gradient_accumulation_steps * setup.world_size
    return tokens / step_seconds(shape, hardware, setup)


def step_seconds(shape: ModelShape, hardware: Hardware, setup: Setup) -> float:
    """One optimizer step, all micro-batches."""
    micro_batch = micro_batch_seconds(shape, hardware, setup)
    seconds = setup.gradient_accumulation_steps * micro_batch + optimizer_seconds(shape, hardware, setup)
    return seconds + step_communication(shape, hardware, setup, micro_batch)


def micro_batch_seconds(shape: ModelShape, hardware: Hardware, setup: Setup) -> float:
    """Compute of one micro-batch on one GPU, forward and backward; weights are taken to be there."""
    key = replay_key(replace(setup, sharding="none"), keep=False)
    work = training_step(shape, key).work
    if setup.forwards:
        work = work.plus(evaluation_batch(shape, key).work, setup.forwards)
    if hardware.is_cpu:
        flops = work.matmul_flops + work.attention_flops
        return flops / (hardware.tflops["fp32"] * 1e12) + work.bytes_moved / (hardware.bandwidth_gb_per_s * 1e9)
    peak = hardware.tflops["fp32" if setup.precision == "fp32" else "bf16"] * 1e12
    matmul_peak = peak * value("efficiency", "matmul") * size_factor(shape, setup)
    seconds = work.matmul_flops / matmul_peak
    if work.fp8_flops:
        by_row = setup.adapters and not setup.compiled  # models/frozen.py
        fp8_peak = hardware.tflops.get("fp8", hardware.tflops["bf16"]) * 1e12
        efficiency = value("efficiency", "fp8_row_matmul" if by_row else "fp8_matmul")
        seconds += work.fp8_flops / (fp8_peak * efficiency * size_factor(shape, setup, fp8_peak / peak))
    seconds += work.attention_flops / (peak * value("efficiency", "attention"))
    rate = hardware.bandwidth_gb_per_s * 1e9 * value("efficiency", "memory")
    seconds += bytes_moved(shape, work, setup) / rate
    seconds += max(0.0, work.narrow_flops / matmul_peak - work.narrow_bytes / rate)  # whichever bounds them
    kernels = work.kernels * (value("compiled", "kernels") if setup.compiled else 1)
    seconds = max(seconds, kernels * value("efficiency", "launch_us") * 1e-6)
    if setup.checkpointing == "offload":  # there and back, beside the layers
        link = hardware.host_gb_per_s * 1e9 * value("efficiency", "host_link")
        seconds = max(seconds, 2 * inputs_bytes(shape, setup) / link)
    return seconds


def bytes_moved(shape: ModelShape, work: Work, setup: Setup) -> float:
    """By kernels that are bound by memory. In compiled layers most of them are the compiler's own (traffic.py)."""
    if not setup.compiled:
        return work.bytes_moved
    return work.bytes_unfused + setup.tokens * fused_bytes(shape, setup)


def size_factor(shape: ModelShape, setup: Setup, faster: float = 1.0) -> float:
    """How far matmuls of this width and this many rows come to the efficiency of large ones.

    faster: units that take so much less time for it have as much to start and end with.
    """
    half = value("efficiency", "half_size") * faster
    return shape.hidden_size / (shape.hidden_size + half) * setup.tokens / (setup.tokens + half)


def optimizer_seconds(shape: ModelShape, hardware: Hardware, setup: Setup) -> float:
    """Clipping and update read and write gradient, weight and states; offloaded states cross to the host and back."""
    trainable = setup.trainable(shape) / setup.state_shards
    moved = here = trainable * _stepped_bytes(setup)
    if setup.rounds and setup.offload == "none":
        here = trainable * (3 * setup.width + ROUNDED[setup.optimizer])
    if not setup.compiled and (setup.rounds or setup.rounds_masters):
        here += trainable * APART
    efficiency = 1.0 if hardware.is_cpu else value("efficiency", "memory")
    seconds = here / (hardware.bandwidth_gb_per_s * 1e9 * efficiency)
    if setup.optimizer.startswith("paged"):
        return seconds + trainable * _crossing_seconds(hardware, setup) + moved / _host_rate()
    if setup.offload != "none":
        if setup.rounds:  # by its arithmetic and not by what it moves
            moved = trainable * _stepped_bytes(MASTERED) * value("efficiency", f"host_{setup.optimizer}")
        seconds += trainable * _crossing_seconds(hardware, setup) + moved / _host_rate()
    return seconds


MASTERED = Setup(method="full", precision="bf16", optimizer="adamw", master_weights=True)
ROUNDED = {"adamw": 50, "adamw_8bit": 38, "paged_adamw_8bit": 38, "adafactor": 102}
"""Bytes that stepping a bf16 weight in fp32 reads and writes, states included: gradient and weight made fp32, the step,
and one kernel that rounds (training/rounding.py; a test counts them)."""
APART = 24
"""More, where what is drawn, its sum with the weight and what is cut off are written: not compiled."""


def _stepped_bytes(setup: Setup) -> float:
    """Read and written for one trained parameter by a fused step, its gradient clipped."""
    return 3 * setup.width + 2 * setup.width + 2 * state_bytes(setup) + (8 if setup.master_weights else 0)


def _host_rate() -> float:
    return value("efficiency", "host_memory_gb_per_s") * 1e9


def _crossing_seconds(hardware: Hardware, setup: Setup) -> float:
    """Of one trained parameter, gradient there and weight back: under offload=optimizer from tensor to tensor in memory
    that is not pinned (training/optimizer.py), or by FSDP2's and DeepSpeed's pinned memory and the driver's pages."""
    plain = setup.offload == "optimizer" and not setup.stage
    back = 4 if setup.rounds_masters else setup.width  # rounded there
    size, link = (setup.width + back, "pageable_link") if plain else (2 * (setup.width + 2), "host_link")
    return size / (hardware.host_gb_per_s * 1e9 * value("efficiency", link))


def model_flops(shape: ModelShape, sequence_length: int, adapters: bool, head: bool = False) -> float:
    """FLOPs that the mathematics of a training step needs for a token; recomputation is not counted.

    4 for each frozen and 6 for each trained matrix weight, and causal attention over whole rows, within its windows.
    head: it is trained, beside an adapter.
    """
    matmuls = (4 if adapters else 6) * shape.active_matrix_parameters
    matmuls += 2 * shape.embedding_parameters if adapters and head else 0
    return matmuls + 12 * shape.attention_width(sequence_length)


def peak_flops(plan: Plan) -> float:
    """Dense peak of one GPU in the plan's dtype, FLOP/s; infinite for a card that the catalogue does not know."""
    facts = catalog.gpus().get(plan.hardware.gpu)
    if facts is None:
        return math.inf
    return facts["tflops"]["fp32" if plan.precision == "fp32" else "bf16"] * 1e12
