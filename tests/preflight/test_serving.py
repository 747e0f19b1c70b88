"""Serving figures against a measured server and known checkpoints."""

from __future__ import annotations

import json

import pytest

from loadmaster import catalog
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.serving import cache_bytes_per_token, cheapest_servers, plan_serving, weight_bytes
from loadmaster.preflight.shape import ModelShape, from_config


def shape_of(name: str) -> ModelShape:
    return from_config(json.loads((catalog.FOLDER / "shapes" / f"{name}.json").read_text())["config"], name)


def test_tokens_of_cache_equal_a_measured_server() -> None:
    """vLLM 0.20.2, Llama 3.1 8B bf16, H100 80 GB, utilisation 0.9, max length 8192: 443,168 tokens."""
    plan = plan_serving(shape_of("llama-3.1-8b"), from_catalog("h100_80gb", 1))
    assert plan.cache_tokens == pytest.approx(443_168, rel=0.005) and plan.cache_tokens % 16 == 0


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


def test_a_70b_in_int4_leaves_an_l40s_a_few_thousand_tokens() -> None:
    plan = plan_serving(shape_of("llama-3.1-70b"), from_catalog("l40s", 1), "int4", context=2048, utilisation=0.92)
    assert 2_000 < plan.cache_tokens < 10_000
    assert "35 GB" in plan.notes[0] and "39.5 GB" in plan.notes[0]


def test_best_of_n_divides_the_requests_that_fit() -> None:
    one, eight = (plan_serving(shape_of("llama-3.1-8b"), from_catalog("h100_80gb", 1), samples=n) for n in (1, 8))
    assert one.concurrent_requests == pytest.approx(8 * eight.concurrent_requests, rel=0.01)


def test_the_cheapest_server_that_holds_the_requests_comes_first() -> None:
    plans = cheapest_servers(shape_of("llama-3.1-8b"), "fp8", 8192, requests=4)
    assert plans[0].concurrent_requests >= 4
    assert [p.usd_per_hour for p in plans] == sorted(p.usd_per_hour for p in plans)
