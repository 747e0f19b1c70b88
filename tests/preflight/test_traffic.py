"""What compiled layers move for a token, in bytes, as it was read off generated code.

tests/models/test_gpu_code.py holds the counts to code that is generated anew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.preflight.blocks import NARROW
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.speed import bytes_moved, micro_batch_seconds
from loadmaster.preflight.step import training_step
from loadmaster.preflight.traffic import fused_bytes, layer_bytes

LLAMA = find_shape(ModelConfig(name="meta-llama/Llama-3.1-8B"))
LORA = Setup(method="lora", precision="bf16", optimizer="adamw", master_weights=True, compiled=True)
H, Q, KV, F = 4096, 4096, 1024, 14336
SUMS = 2 * H + Q + 2 * KV + 2 * F  # what adapters are added to, forward
GRADIENTS = Q + F + 5 * H  # and backward
INPUTS = Q + F + 5 * H


@pytest.mark.parametrize(
    ("changed", "forward", "backward"),
    [
        ({}, 9 * H + 2 * Q + 2 * KV + 3 * F + SUMS, 10 * H + 2 * Q + 4 * KV + 6 * F + GRADIENTS),
        ({"method": "full"}, 9 * H + 2 * Q + 2 * KV + 3 * F, 21 * H + 2 * Q + 4 * KV + 6 * F),
        ({"precision": "fp8"}, 9 * H + 2 * Q + 4 * KV + 5 * F + SUMS, 10 * H + 4 * Q + 4 * KV + 6 * F + GRADIENTS),
        ({"lora_rank": 512}, 9 * H + 2 * Q + 4 * KV + 5 * F + SUMS, 10 * H + 4 * Q + 4 * KV + 6 * F + GRADIENTS),
        (
            {"lora_dropout": 0.1}, 9 * H + 3 * Q + 2 * KV + 3 * F + SUMS + 3 * INPUTS // 2,
            8 * H + 4 * Q + 4 * KV + 5 * F + GRADIENTS + 3 * H + INPUTS // 2,  # nothing is made again, each has a part
        ),
        ({"lora_targets": ("q_proj", "v_proj")}, 9 * H + 3 * Q + 3 * KV + 3 * F, 13 * H + 2 * Q + 4 * KV + 5 * F),
    ],
)
def test_a_layer_of_llama_moves_whole_passes(changed: dict, forward: int, backward: int) -> None:
    assert layer_bytes(LLAMA, replace(LORA, **changed)) == (2 * forward, 2 * backward)


@pytest.mark.parametrize(
    ("flag", "method", "forward", "backward"),
    [("scaled_residual", "lora", 0, 3 * H), ("norms_after", "lora", -3 * H, 3 * H), ("norms_after", "full", -3 * H, H)],
)
def test_other_layers_move_so_many_passes_more(flag: str, method: str, forward: int, backward: int) -> None:
    """Of Granite, Olmo and Exaone."""
    shapes, setup = (replace(LLAMA, **{flag: True}), LLAMA), replace(LORA, method=method)
    other, llama = (layer_bytes(shape, setup) for shape in shapes)
    assert (other[0] - llama[0], other[1] - llama[1]) == (2 * forward, 2 * backward)


@pytest.mark.parametrize(
    ("changed", "forward", "backward"),
    [
        ({"method": "full"}, -F, -2 * F - 2 * H),
        ({}, -F, -2 * F - H),
        ({"lora_targets": ("q_proj", "v_proj")}, -F, -2 * F - H),
        ({"method": "full", "precision": "fp8"}, -2 * F, -2 * F - 2 * H),
    ],
)
def test_a_layer_without_a_gate_moves_less(changed: dict, forward: int, backward: int) -> None:
    """What up's adapter is added to is read as a gate's was, and what the ReLU gives is written besides."""
    shapes, setup = (replace(LLAMA, gated=False), LLAMA), replace(LORA, **changed)
    other, llama = (layer_bytes(shape, setup) for shape in shapes)
    assert (other[0] - llama[0], other[1] - llama[1]) == (2 * forward, 2 * backward)


def test_a_layer_that_is_made_again_moves_all_of_its_forward_code_again() -> None:
    forward, backward = layer_bytes(LLAMA, LORA)
    some = replace(LORA, checkpointing="full", kept_layers=12)
    assert fused_bytes(LLAMA, LORA) == 32 * (forward + backward)
    assert fused_bytes(LLAMA, some) == 32 * (forward + backward) + 20 * forward
    assert fused_bytes(LLAMA, replace(LORA, checkpointing="offload")) == 32 * (2 * forward + backward)
    assert fused_bytes(LLAMA, replace(LORA, forwards=1)) == 32 * (2 * forward + backward)


def test_what_is_not_in_a_layer_is_moved_as_if_nothing_was_compiled() -> None:
    """The last norm, and what gathers its rows. Of losses, one that is not compiled."""
    tops = []
    for compiled in (False, True):
        setup = replace(LORA, compiled=compiled, method="full", objective="orpo")
        four, eight = (replace(LLAMA, layers=layers) for layers in (4, 8))
        moved = [bytes_moved(each, training_step(each, setup).work, setup) for each in (four, eight)]
        tops.append(2 * moved[0] - moved[1])
    assert tops[0] == tops[1] > 100 * H * setup.tokens


def test_gradients_are_added_to_those_of_an_earlier_micro_batch_outside_of_compiled_code() -> None:
    full = replace(LORA, method="full", sequence_length=512)
    once, twice = (
        bytes_moved(LLAMA, training_step(LLAMA, each).work, each)
        for each in (full, replace(full, gradient_accumulation_steps=2))
    )
    assert twice - once == pytest.approx(3 * 2 * LLAMA.parameters, rel=0.01)


@pytest.mark.parametrize("gpu", ["a100_80gb", "h100_80gb", "l40s"])
def test_a_product_over_the_rank_takes_its_arithmetic_where_that_is_longer_than_its_bytes(gpu: str) -> None:
    """An H100 computes longer from about rank 240 on, an A100 from 120 on."""
    seconds = [
        micro_batch_seconds(LLAMA, from_catalog(gpu, 1), replace(LORA, lora_rank=rank)) for rank in (NARROW - 1, NARROW)
    ]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.001)
