"""Tokens per second by a roofline, hours and dollars.

    time of a token = matmul FLOPs / (peak x efficiency) + bytes moved / (bandwidth x efficiency)

4 FLOPs per frozen and 6 per trained weight and token, 2 more where the forward is recomputed.
"""

from __future__ import annotations

import math

from loadmaster import catalog
from loadmaster.preflight.coefficients import coefficients
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape


def tokens_per_second(shape: ModelShape, hardware: Hardware, setup: Setup) -> float | None:
    """All tokens through the model, over all GPUs; None for a card that the catalogue does not know."""
    if not hardware.known:
        return None
    table = coefficients()["efficiency"]
    matmul, memory = table["matmul"]["value"], table["memory"]["value"]
    flops = (4 if setup.adapters else 6) * shape.active_matrix_parameters
    attention = 6 * shape.layers * setup.sequence_length * shape.query_size
    if setup.checkpointing == "full":
        flops, attention = flops + 2 * shape.active_matrix_parameters, attention * 4 / 3
    peak = hardware.tflops.get("bf16" if setup.precision != "fp32" else "fp32", hardware.tflops.get("fp32", 1.0)) * 1e12
    seconds = (flops + attention) / (peak * matmul)
    moved = shape.layers * (60 * shape.hidden_size + 30 * shape.intermediate_size) * setup.width
    seconds += moved / (hardware.bandwidth_gb_per_s * 1e9 * memory)
    if setup.method == "qlora":
        seconds += 2 * shape.linear_weights * 5 / setup.tokens / (hardware.bandwidth_gb_per_s * 1e9 * memory)
    if setup.shards > 1:
        gathered = 3 * 2 * shape.parameters / setup.tokens
        link = hardware.link_gb_per_s if hardware.nodes == 1 else hardware.network_gbps / 8 / hardware.count
        seconds = max(seconds, gathered / (max(link, 1.0) * 1e9 * 0.7))
    return hardware.world_size / seconds


def model_flops(shape: ModelShape, sequence_length: int, adapters: bool) -> float:
    """FLOPs that the mathematics of a training step needs for a token; recomputation is not counted.

    4 for each frozen and 6 for each trained matrix weight, and causal attention over whole rows.
    """
    return (4 if adapters else 6) * shape.active_matrix_parameters + 6 * shape.layers * sequence_length * shape.query_size


def model_flops_per_token(plan: Plan) -> float:
    """`model_flops` of a plan."""
    return plan.model.flops_per_token


def peak_flops(plan: Plan) -> float:
    """Dense peak of one GPU in the plan's dtype, FLOP/s; infinite for a card that the catalogue does not know."""
    facts = catalog.gpus().get(plan.hardware.gpu)
    if facts is None:
        return math.inf
    return facts["tflops"].get("fp32" if plan.precision == "fp32" else "bf16") * 1e12
