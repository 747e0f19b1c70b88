"""What a server can hold: tokens of KV cache, concurrent requests, and how fast it answers.

    cache bytes  = utilisation x card - weights / tp - server's own (context, graphs, activations)
    token bytes  = 2 x layers with cache x KV heads / min(tp, KV heads) x head_dim x bytes of the cache's dtype
    tokens       = cache bytes / token bytes, in whole blocks of 16

Truth to start from: Llama 3.1 8B in bf16 on an H100 80 GB, vLLM 0.20.2, utilisation 0.9, max length 8192 gives
443,168 tokens; the server's own share is fitted to it and marked so. Speeds are modelled (serving_speed.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from loadmaster import catalog
from loadmaster.errors import LoadmasterError
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.families import FAMILIES
from loadmaster.preflight.hardware import GIB, Hardware, rentable
from loadmaster.preflight.plan import rounded
from loadmaster.preflight.serving_speed import Speed, Traffic
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tensor_parallel import block_of, divides

BLOCK_TOKENS = 16
UTILISATION = 0.9
"""Share of a card that vLLM may take. Its default was 0.9 and is 0.92 in 0.33, so a bundle always sets it."""
WEIGHT_BITS = {"bf16": 16.0, "fp8": 8.0, "int4": 4.0}
SCALE_BITS = 16
"""Of the scale that int4 keeps for each group of weights; fp8 has one for a whole row, which is left out."""
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
    """The cache holds at least one request of `context` tokens with all its answers, and the model knows as many."""
    weights_gb: float
    weights_gib_per_gpu: float
    server_gib_per_gpu: float
    cache_gib_per_gpu: float
    budget_gib_per_gpu: float
    """What the server may take of each card: utilisation x its memory."""
    utilisation: float
    cache_dtype: str
    cache_bytes_per_token: int
    """Over all cards."""
    cache_tokens: int
    concurrent_requests: float
    """Requests of `context` tokens, each with `samples` answers, that the cache holds at once."""
    context: int
    samples: int
    tokens_per_second: float | None
    """Answer tokens a second with the cache full of this traffic; modelled."""
    first_token_s: float | None
    """Of a request that finds the server idle; modelled."""
    pod_usd_per_hour: float | None
    flex_usd_per_hour: float | None
    """Of a running serverless worker."""
    usd_per_million_tokens: float | None
    """Answer tokens, on a Pod that is busy all the time."""
    prices: str
    ecc: bool | None
    notes: list[str] = field(default_factory=list)


def weight_bytes(shape: ModelShape, form: str) -> float:
    """Of the checkpoint: embedding, head, norms and router stay in bf16, everything else takes the format."""
    quantized = shape.linear_weights + shape.expert_weights
    bits = WEIGHT_BITS[form] + (SCALE_BITS / block_of(shape, form) if form == "int4" else 0)
    return quantized * bits / 8 + 2 * (shape.parameters - quantized)


def cache_bytes_per_token(shape: ModelShape, dtype: str = "bf16", tp: int = 1) -> int:
    """On one card. Tensor parallelism divides the KV heads until each card has one."""
    numbers = sum(layers * math.ceil(view.key_value_heads / tp) * view.head_dim for view, layers in shape.views)
    return 2 * numbers * CACHE_BYTES[dtype]


def tokens_in(cache_bytes: float, per_token: int) -> int:
    """Tokens that so many bytes of cache hold, in whole blocks."""
    return max(0, math.floor(cache_bytes / (BLOCK_TOKENS * per_token))) * BLOCK_TOKENS


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


def refuse_other_caches(config: dict[str, Any], name: str) -> None:
    """Raises LoadmasterError for a model whose cache is not keys and values of every layer and token."""
    text = config.get("text_config") or config
    kinds = {str(kind) for kind in text.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    why = None
    if text.get("kv_lora_rank"):
        why = f"keeps a compressed cache (multi-head latent attention, kv_lora_rank={text['kv_lora_rank']})"
    elif kinds or text.get("full_attention_interval") or any("mamba" in key or "ssm" in key for key in text):
        why = f"mixes attention with layers that have another state ({', '.join(sorted(kinds)) or 'state space'})"
    if why:
        raise LoadmasterError(
            f"{name}: it {why}, and the formula for its cache is not known here, so its serving size would be a guess. "
            f"Start the server once and read 'GPU KV cache size' in its log. Known: {', '.join(FAMILIES)}."
        )


def plan_serving(
    shape: ModelShape,
    hardware: Hardware,
    form: str = "bf16",
    context: int = 8192,
    cache: str = "bf16",
    utilisation: float = UTILISATION,
    traffic: Traffic | None = None,
    checkpoint_bytes: float | None = None,
) -> ServingPlan:
    """One server on one machine, its cards joined by tensor parallelism.

    context: longest request, prompt and answer, tokens. traffic: what a usual request is; None is three quarters of
    `context` as prompt and the rest as one answer. checkpoint_bytes: of the weight files, where they exist.
    Raises LoadmasterError when the model cannot be divided over the cards.
    """
    tp = hardware.count
    if not divides(shape, tp):
        raise LoadmasterError(f"a server cannot divide {shape.name} over {tp} GPUs")
    traffic = traffic or Traffic(prompt_tokens=context * 3 // 4, output_tokens=context // 4)
    weights = weight_bytes(shape, form) if checkpoint_bytes is None else checkpoint_bytes
    own = server_bytes(shape, hardware)
    budget = utilisation * hardware.memory_gib * GIB
    room = budget - weights / tp - own
    per_token = cache_bytes_per_token(shape, cache, tp)
    tokens = tokens_in(room, per_token)
    concurrent = tokens / (context * traffic.samples)
    fits = concurrent >= 1 and context <= (shape.max_position or context)
    speed = Speed(shape, hardware, form, weights / tp, per_token) if fits and hardware.known else None
    rate = speed.answer_tokens_per_second(traffic, tokens) if speed else None
    pod, flex = hardware.usd_per_hour, flex_usd_per_hour(hardware)
    return ServingPlan(
        model=shape.name, format=form, gpu=hardware.gpu, gpus=tp, fits=fits,
        weights_gb=round(weights / 1e9, 2), weights_gib_per_gpu=round(weights / tp / GIB, 2),
        server_gib_per_gpu=round(own / GIB, 2), cache_gib_per_gpu=round(max(room, 0) / GIB, 2),
        budget_gib_per_gpu=round(budget / GIB, 2), utilisation=utilisation, cache_dtype=cache,
        cache_bytes_per_token=per_token * tp, cache_tokens=tokens, concurrent_requests=round(concurrent, 2),
        context=context, samples=traffic.samples, tokens_per_second=rounded(rate, 1),
        first_token_s=None if speed is None else round(speed.first_token_s(traffic), 4),
        pod_usd_per_hour=pod, flex_usd_per_hour=flex,
        usd_per_million_tokens=None if not rate or pod is None else round(pod / 3600 / rate * 1e6, 3),
        prices=_prices(hardware), ecc=catalog.serving()["gpus"].get(hardware.gpu, {}).get("ecc"),
        notes=_notes(shape, hardware, form, weights, tokens, context, traffic),
    )


def cheapest_servers(shape: ModelShape, form: str, context: int, requests: float = 1, **options) -> list[ServingPlan]:
    """Every machine of the catalogue (one node) that holds so many concurrent requests, cheapest hour first."""
    plans = [
        plan_serving(shape, machine, form, context, **options)
        for machine in rentable()
        if machine.nodes == 1 and divides(shape, machine.count, block_of(shape, form))
    ]
    return sorted(
        (p for p in plans if p.concurrent_requests >= requests),
        key=lambda p: (p.pod_usd_per_hour or math.inf, p.gpus),
    )


def machines_for(plan: ServingPlan, requests: float) -> int | None:
    """Machines like this one that hold so many requests at once, whole ones on each; None where it holds none."""
    if plan.fits and plan.concurrent_requests >= requests:
        return 1
    whole = math.floor(plan.concurrent_requests)
    return math.ceil(requests / whole) if whole else None


def flex_usd_per_hour(hardware: Hardware) -> float | None:
    """Of a serverless worker with these cards while it runs, list price."""
    price = catalog.prices()["gpus"].get(hardware.gpu, {}).get("serverless_usd_per_hour")
    return None if price is None else round(price * hardware.count, 4)


def _prices(hardware: Hardware) -> str:
    if hardware.gpu not in catalog.prices()["gpus"]:
        return ""
    return f"Pod: {hardware.price_note}; Flex: list price of {catalog.prices()['serverless_date']}"


def _notes(
    shape: ModelShape, hardware: Hardware, form: str, weights: float, tokens: int, context: int, traffic: Traffic
) -> list[str]:
    thumb = RULES_OF_THUMB[form] * shape.parameters / 1e9
    digits = 0 if thumb >= 10 else 1
    kept = "" if form == "bf16" else " (embedding and head stay in bf16, quantized weights have scales)"
    notes = [
        f"rule of thumb: {thumb:.{digits}f} GB of weights, {1.2 * thumb:.{digits}f} GB in all; the checkpoint has "
        f"{weights / 1e9:.1f} GB{kept}, and the 20% says nothing of how many requests fit"
    ]
    if any(shape.windows):
        notes.append("sliding windows hold less than counted here: an upper bound of the cache's size")
    if shape.attention_softcap:
        notes.append(
            "its attention scores are capped, which not every kernel of a server can do: a vLLM of 2025 did not start "
            "with Gemma 2 on an H100 (its issue 25502); start the server once before you rely on it"
        )
    if shape.family == "gemma4_text":
        notes.append(
            "its config.json has no one size of heads since transformers 5.15: vLLM up to 0.27 does not start with "
            "such a transformers (its issues 51744 and 52768), 0.28 does"
        )
    if form == "fp8" and not hardware.has_fp8:
        notes.append(f"{hardware.gpu} has no fp8 matrix units: the weights are read in fp8 and computed in bf16")
    if shape.max_position and context > shape.max_position:
        notes.append(f"the model knows {shape.max_position:,} positions; a server refuses requests of {context:,}")
    if tokens < context * traffic.samples:
        notes.append(f"the cache holds {tokens:,} tokens, and one request may have {context * traffic.samples:,}")
    if traffic.samples > 1:
        notes.append(f"best of {traffic.samples}: each answer is counted with a prompt of its own, the worst case")
    if catalog.serving()["gpus"].get(hardware.gpu, {}).get("ecc") is False:
        notes.append(f"{hardware.gpu} has no ECC: a flipped bit in its memory goes unnoticed")
    if shape.estimate:
        notes.append(f"an estimate: {shape.estimate}")
    return notes
