"""Layers that are not replayed are counted as if they were: those that take turns too, in the place of each of them."""

from __future__ import annotations

import pytest

from loadmaster.preflight import alike, step
from loadmaster.preflight.alike import Alike, places
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import evaluation_batch, training_step
from tests.preflight.test_config_json import GEMMA_4_31B

GEMMA = [*5 * [False], True]
GLOBAL_FIRST = {**GEMMA_4_31B, "layer_types": [*(["full_attention", *5 * ["sliding_attention"]] * 4), "full_attention"],
                "num_hidden_layers": 25}
EVERY_OTHER = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 24, "decoder_sparse_step": 2,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936, "mlp_only_layers": [],
}
MODELS = {"gemma4": {**GEMMA_4_31B, "num_hidden_layers": 30}, "global first": GLOBAL_FIRST, "experts": EVERY_OTHER}
SHARDED = {"sharding": "fsdp", "world_size": 8, "gpus_per_node": 8}
SETUPS = [
    {"method": "lora", "checkpointing": "full"},
    {"method": "lora", "compiled": True},
    {"method": "full", "checkpointing": "full", **SHARDED},
    {"method": "full", "checkpointing": "full", "compiled": True, "sequence_length": 16384, **SHARDED},
    {"method": "qlora", "checkpointing": "full", "kept_layers": 7, "compiled": True, **SHARDED},
    {"method": "full", "reshard_after_forward": False, "gradient_accumulation_steps": 2, **SHARDED},
    {"method": "full", "checkpointing": "full", "optimizer": "adafactor", "in_backward": True},
]


@pytest.mark.parametrize(
    ("seconds", "neighbours", "replayed"),
    [
        (60 * [False], False, [0, 1, 59]),
        (60 * [False], True, [0, 1, 58, 59]),
        ([*3 * [False], *57 * [True]], False, [0, 1, 2, 3, 4, 59]),
        (10 * GEMMA, False, [0, 1, 5, 58, 59]),
        (10 * GEMMA, True, [0, 1, 5, 53, 58, 59]),
        (10 * GEMMA[::-1], False, [0, 1, 6, 54, 59]),
        (30 * [False, True], False, [0, 1, 2, 58, 59]),
        (2 * [False, True], True, [0, 1, 2, 3]),
    ],
)
def test_of_layers_that_are_alike_few_are_replayed(seconds, neighbours, replayed) -> None:
    found = places(tuple(Alike(second, "none") for second in seconds), neighbours)
    at = -1
    for place, expected in zip(found, replayed, strict=True):
        assert place.skipped == tuple(Alike(second, "none") for second in seconds[at + 1 : expected])
        assert place.alike.second == seconds[expected]
        at = expected
    skipped = {alike for place in found for alike in place.skipped}
    assert {place.alike for place in found if place.measures} == skipped


def test_layers_that_are_kept_have_their_own_first_and_last_ones() -> None:
    layers = tuple(Alike(second, "full" if i < 31 else "none") for i, second in enumerate(10 * GEMMA))
    assert [sum(place.alike.checkpointing == kind for place in places(layers, False)) for kind in ("full", "none")] == [
        5, 4,
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("changed", SETUPS, ids=str)
def test_a_replay_of_few_layers_equals_one_of_all(model: str, changed: dict, monkeypatch) -> None:
    shape = from_config(MODELS[model], "x")
    given = {"precision": "bf16", "optimizer": "adamw", "master_weights": False, "sequence_length": 2048, **changed}
    setup = Setup(**given)
    few, few_evaluated = training_step(shape, setup), evaluation_batch(shape, setup)
    for cached in (places, training_step):
        cached.cache_clear()
    monkeypatch.setattr(alike, "_chosen", lambda layers, neighbours: set(range(len(layers))))
    monkeypatch.setattr(step, "_evaluation_batch", step._evaluation_batch.__wrapped__)
    whole, evaluated = training_step(shape, setup), evaluation_batch(shape, setup)
    for cached in (places, training_step):
        cached.cache_clear()
    assert vars(few.work) == pytest.approx(vars(whole.work)) and vars(few_evaluated.work) == vars(evaluated.work)
    assert whole.peak <= few.peak <= 1.001 * whole.peak
    assert few_evaluated.peak == evaluated.peak
