"""What a server can hold: tokens of KV cache, concurrent requests, GPUs, dollars an hour and a million tokens.

    cache bytes  = utilisation x card - weights / tp - server's own (context, graphs, activations)
    token bytes  = 2 x layers with cache x KV heads / min(tp, KV heads) x head_dim x bytes of the cache's dtype
    tokens       = cache bytes / token bytes, in whole blocks of 16

Truth to start from: Llama 3.1 8B in bf16 on an H100 80 GB, vLLM 0.20.2, utilisation 0.9, max length 8192 gives
443,168 tokens; the server's own share is fitted to it and marked so. Decode speed is bound by reading weights and
cache once a step, and modelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import GIB, Hardware, rentable
from loadmaster.preflight.shape import ModelShape

BLOCK_TOKENS = 16
WEIGHT_BITS = {"bf16": 16.0, "fp8": 8.0, "int4": 4.0 + 16 / 128}
"""Bits of a linear's weight with its scales: fp8 has one a row, int4 a bf16 scale for 128 weights."""
CACHE_BYTES = {"bf16": 2, "fp8": 1}
RULES_OF_THUMB = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5}
"""GB for each billion parameters that people quote, before their 20% for everything else."""


@dataclass(frozen=True)
class ServingPlan:
    """Figures of one server over `gpus` cards by tensor parallelism. GiB = 2^30 bytes, GB = 10^9."""

    model: str
    format: str
    gpu: str
    gpus: int
    fits: bool
    weights_gb: float
    weights_gib_per_gpu: float
    server_gib_per_gpu: float
    cache_gib_per_gpu: float
    cache_bytes_per_token: int
    """Over all cards."""
    cache_tokens: int
    concurrent_requests: float
    """Requests of `context` tokens, each with `samples` answers, that the cache holds at once."""
    context: int
    samples: int
    tokens_per_second: float | None
    """Modelled decode speed with the cache full."""
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    price: str
    notes: list[str] = field(default_factory=list)


def weight_bytes(shape: ModelShape, form: str) -> float:
    """Of the checkpoint: embedding, head, norms and router stay in bf16, everything else takes the format."""
    experts = shape.expert_layers * 3 * shape.experts * shape.expert_size * shape.hidden_size
    quantized = shape.linear_weights + experts
    return quantized * WEIGHT_BITS[form] / 8 + 2 * (shape.parameters - quantized)


def cache_bytes_per_token(shape: ModelShape, dtype: str = "bf16", tp: int = 1) -> int:
    """On one card. Tensor parallelism divides the KV heads until each card has one."""
    heads = math.ceil(shape.key_value_heads / tp)
    return 2 * shape.layers * heads * shape.head_dim * CACHE_BYTES[dtype]


def server_bytes(shape: ModelShape, hardware: Hardware) -> float:
    """What the server keeps on each card besides weights and cache."""
    activations = batched_tokens(hardware) * 2 * 3 * (shape.intermediate_size / hardware.count + shape.hidden_size)
    parallel = value("serving", "communicator_gib") * GIB if hardware.count > 1 else 0.0
    return (value("context", "cuda_gib") + value("serving", "graphs_gib")) * GIB + parallel + activations


def batched_tokens(hardware: Hardware) -> int:
    """vLLM's default of tokens in one forward pass, by card."""
    if hardware.memory_gib >= 160:
        return 16384
    return 8192 if hardware.memory_gib >= 70 and not hardware.gpu.startswith("a100") else 2048


def plan_serving(
    shape: ModelShape,
    hardware: Hardware,
    form: str = "bf16",
    context: int = 8192,
    cache: str = "bf16",
    utilisation: float = 0.9,
    samples: int = 1,
) -> ServingPlan:
    """One server on one machine, its cards joined by tensor parallelism.

    context: tokens of a request, prompt and answer; samples: answers to each prompt that are generated together
    (best of N), which share the prompt's cache in the best case and are counted whole here.
    """
    tp = hardware.count
    weights = weight_bytes(shape, form)
    own = server_bytes(shape, hardware)
    room = utilisation * hardware.memory_gib * GIB - weights / tp - own
    per_token = cache_bytes_per_token(shape, cache, tp)
    blocks = math.floor(room / (BLOCK_TOKENS * per_token)) if room > 0 else 0
    tokens = blocks * BLOCK_TOKENS
    concurrent = tokens / (context * samples)
    fits = concurrent >= 1
    speed = _decode_tokens_per_second(hardware, weights / tp, per_token, context, concurrent) if fits else None
    rate = hardware.usd_per_hour
    return ServingPlan(
        model=shape.name, format=form, gpu=hardware.gpu, gpus=tp, fits=fits,
        weights_gb=round(weights / 1e9, 2), weights_gib_per_gpu=round(weights / tp / GIB, 2),
        server_gib_per_gpu=round(own / GIB, 2), cache_gib_per_gpu=round(max(room, 0) / GIB, 2),
        cache_bytes_per_token=per_token * tp, cache_tokens=tokens, concurrent_requests=round(concurrent, 2),
        context=context, samples=samples, tokens_per_second=None if speed is None else round(speed, 1),
        usd_per_hour=rate,
        usd_per_million_tokens=None if speed is None or rate is None else round(rate / 3600 / speed * 1e6, 3),
        price=hardware.price_note, notes=_notes(shape, hardware, form, weights, tokens, context),
    )  # fmt: skip


def cheapest_servers(shape: ModelShape, form: str, context: int, requests: float = 1, **options) -> list[ServingPlan]:
    """Every machine of the catalogue (one node) that holds so many concurrent requests, cheapest hour first."""
    plans = [
        plan_serving(shape, machine, form, context, **options)
        for machine in rentable()
        if machine.nodes == 1 and shape.heads % machine.count == 0
    ]
    return sorted(
        (p for p in plans if p.concurrent_requests >= requests), key=lambda p: (p.usd_per_hour or math.inf, p.gpus)
    )


def _decode_tokens_per_second(
    hardware: Hardware, weights: float, per_token: int, context: int, sequences: float
) -> float:
    """Each step reads the weights once and every sequence's cache, half full on average."""
    sequences = min(sequences, value("serving", "most_sequences"))
    read = weights + sequences * context / 2 * per_token
    return sequences / (read / (hardware.bandwidth_gb_per_s * 1e9 * value("efficiency", "memory")))


def _notes(shape: ModelShape, hardware: Hardware, form: str, weights: float, tokens: int, context: int) -> list[str]:
    billions = shape.parameters / 1e9
    thumb = RULES_OF_THUMB[form] * billions
    notes = [
        f"rule of thumb: {thumb:.0f} GB of weights, {1.2 * thumb:.0f} GB in all; the checkpoint has "
        f"{weights / 1e9:.1f} GB (embedding and head are not quantized), and the rest decides how many requests run"
    ]
    if any(shape.windows):
        notes.append("sliding windows hold less than counted here: an upper bound of the cache's size")
    if form == "fp8" and not hardware.has_fp8:
        notes.append(f"{hardware.gpu} has no fp8 matrix units: the weights are read in fp8 and computed in bf16")
    if 0 < tokens < context:
        notes.append(f"the cache holds {tokens:,} tokens in all, less than one request of {context:,}")
    if shape.estimate:
        notes.append(f"an estimate: {shape.estimate}")
    return notes
