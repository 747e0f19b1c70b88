"""Components to the byte, where the byte is known from elsewhere."""

from __future__ import annotations

import dataclasses
import json

import pytest

from loadmaster import catalog
from loadmaster.preflight import memory as model
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.least import least_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.step import training_step
from loadmaster.preflight.weights import base_bytes, nf4_bytes
from loadmaster.training import optimizer

GIB = 2**30


def shape_of(name: str) -> ModelShape:
    return from_config(json.loads((catalog.FOLDER / "shapes" / f"{name}.json").read_text())["config"], name)


def setup(method: str = "lora", **fields) -> Setup:
    return Setup(**{"method": method, "precision": "bf16", "optimizer": "adamw", "master_weights": True, **fields})


@pytest.mark.parametrize(
    ("name", "weights", "gib"),
    [
        ("llama-3.1-8b", 6_979_321_856, 3.3534),
        ("llama-3.1-70b", 68_451_041_280, 32.8872),
    ],
)
def test_nf4_with_double_quantization_is_what_bitsandbytes_takes(name: str, weights: int, gib: float) -> None:
    """4.127 bits a weight: sums over bitsandbytes' own tensors (memory.md, 3.1)."""
    shape = shape_of(name)
    assert shape.linear_weights == weights
    assert shape.layers * sum(map(nf4_bytes, shape.matrices())) / GIB == pytest.approx(gib, rel=2e-4)


def test_bf16_weights_are_two_bytes_a_parameter_and_ties_count_once() -> None:
    assert base_bytes(shape_of("llama-3.2-1b"), "lora", "bf16") == 2 * 1_235_814_400


def test_biases_beside_nf4_are_as_wide_as_what_is_not_quantized() -> None:
    plain = shape_of("llama-3.2-1b")
    biased = dataclasses.replace(plain, query_key_value_bias=True)
    for precision, width in (("bf16", 2), ("fp32", 4)):
        more = base_bytes(biased, "qlora", precision) - base_bytes(plain, "qlora", precision)
        assert more == width * 16 * (2048 + 2 * 512)


def test_experts_in_fp8_bases_have_no_scales_of_linears() -> None:
    shape = shape_of("mixtral-8x7b")
    linears = 32 * (2 * 4096 + 2 * 1024)
    assert base_bytes(shape, "lora", "fp8") == 2 * shape.parameters - (4096 - 4) * linears



@pytest.mark.parametrize(
    ("name", "full", "adapters"),
    [
        ("llama-3.1-8b", 200_840, 184_680),
        ("llama-3.2-1b", 108_680, 100_712),
        ("llama-3.1-70b", 397_576, 365_032),
    ],
)
def test_bytes_kept_per_token_and_layer_are_those_of_published_traces(name: str, full: int, adapters: int) -> None:
    """Slopes traced independently with another tracer (memory.md, 2.1)."""
    shape, tokens = shape_of(name), 4096
    for method, truth in (("full", full), ("lora", adapters)):
        peaks = [
            training_step(
                dataclasses.replace(shape, layers=n, windows=()),
                setup(method, sequence_length=tokens, gradient_accumulation_steps=2),
                False,
            ).peak
            for n in (8, 9)
        ]
        assert (peaks[1] - peaks[0]) / tokens == pytest.approx(truth, rel=1e-4)


def test_full_checkpointing_keeps_one_hidden_state_a_layer() -> None:
    shape = shape_of("llama-3.1-8b")
    eight, nine = (
        training_step(
            dataclasses.replace(shape, layers=n, windows=()),
            setup(checkpointing="full", sequence_length=4096, gradient_accumulation_steps=2),
            False,
        ).peak
        for n in (8, 9)
    )
    assert nine - eight == 2 * 4096 * 4096


def test_adapter_dropout_keeps_a_mask_and_a_copy() -> None:
    """71,680 more bytes per token and layer of an 8B (memory.md, 2.1)."""
    shape = shape_of("llama-3.1-8b")

    def slope(dropout: float) -> float:
        peaks = [
            training_step(
                dataclasses.replace(shape, layers=n, windows=()),
                setup(lora_dropout=dropout, sequence_length=2048, gradient_accumulation_steps=2),
                True,
            ).peak
            for n in (8, 9)
        ]
        return (peaks[1] - peaks[0]) / 2048

    assert slope(0.1) - slope(0.0) == pytest.approx(71_680, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "master", "bytes_each"),
    [
        ("adamw", True, 16),
        ("adamw", False, 12),
        ("adamw_bf16", False, 8),
        ("adamw_8bit", False, 6.03),
    ],
)
def test_bytes_of_a_trained_parameter(name: str, master: bool, bytes_each: float) -> None:
    states = model.state_bytes(setup("full", optimizer=name, master_weights=master))
    assert 4 + states == pytest.approx(bytes_each, 0.001)


def test_memory_grows_with_rows_length_and_rank_and_shrinks_with_checkpointing() -> None:
    shape, gpu = shape_of("llama-3.2-1b"), from_catalog("h100_80gb", 1)
    base = model.memory(shape, gpu, setup()).needed_gib
    assert model.memory(shape, gpu, setup(micro_batch_size=2)).needed_gib > base
    assert model.memory(shape, gpu, setup(sequence_length=4096)).needed_gib > base
    assert model.memory(shape, gpu, setup(lora_rank=64)).needed_gib > base
    assert model.memory(shape, gpu, setup(checkpointing="full")).needed_gib < base


def test_components_add_up_to_the_training_peak() -> None:
    sharded = setup("full", sharding="fsdp", world_size=8)
    found = model.memory(shape_of("llama-3.1-8b"), from_catalog("h100_80gb", 8), sharded)
    gib = found.train.gib()
    parts = [getattr(gib, f.name) for f in dataclasses.fields(gib) if f.name != "total"]
    assert sum(parts) == pytest.approx(gib.total, abs=1e-3)
    assert gib.total == pytest.approx(found.phases["train"], abs=1e-3)
    assert gib.communication > 0


def test_weights_gradients_and_states_that_are_offloaded_are_in_host_memory() -> None:
    shape, machine = shape_of("llama-3.1-70b"), from_catalog("a100_80gb", 8)
    for steps in (1, 4):
        sharded = setup("full", sharding="fsdp", world_size=8, gpus_per_node=8, gradient_accumulation_steps=steps,
                        checkpointing="full", offload="all")
        found = model.memory(shape, machine, sharded)
        assert found.train.weights == found.train.gradients == found.train.optimizer == 0
        assert found.host_gib > 16 * shape.parameters / GIB
    assert found.train.total < 30 * GIB


FSDP = {"sharding": "fsdp", "world_size": 8}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(("more", "near"), [
    ({}, 0.57), ({"checkpointing": "full"}, 0.85), ({"gradient_accumulation_steps": 4}, 0.57),
    ({"compiled": True}, 0.86), (FSDP, 0.47), ({**FSDP, "gradient_accumulation_steps": 2, "offload": "all"}, 0.41),
    ({**FSDP, "checkpointing": "full", "replicas": 2}, 0.65), ({"optimizer": "adamw_8bit"}, 0.57),
    ({**FSDP, "checkpointing": "offload", "gradient_accumulation_steps": 4}, 0.55),
    ({**FSDP, "reshard_after_forward": False}, 0.53), ({**FSDP, "sharding": "zero1"}, 0.31),
    ({**FSDP, "sharding": "zero3", "offload": "all"}, 0.21),
])
def test_what_is_ruled_out_quickly_does_not_fit(method: str, more: dict, near: float) -> None:
    """The quick bound is below what the replay says, whatever the setting, and near enough to rule plans out."""
    gpu = from_catalog("h100_80gb", more.get("world_size", 1))
    for name in ("llama-3.2-1b", "qwen3-8b", "gemma-3-1b", "gemma-2-2b", "phi-3-mini", "mixtral-8x7b"):
        targets = ("q_proj", "o_proj") if name == "mixtral-8x7b" else "all-linear"
        tried, whole = setup(method, lora_targets=targets, **more), shape_of(name)
        for shape in (whole, *(dataclasses.replace(whole, layers=n, windows=()) for n in (1, 2, 3))):
            share = least_bytes(shape, gpu, tried) / model.train_bytes(shape, gpu, tried).total
            assert share <= 1
            assert share >= near or shape is not whole or name != "qwen3-8b"


@pytest.mark.parametrize(
    ("name", "master"), [("adamw", True), ("adamw", False), ("adamw_8bit", False), ("adamw_8bit", True)]
)
def test_optimizer_states_are_as_large_as_the_optimizers_own(name: str, master: bool) -> None:
    """The real optimizers after one step on bf16 weights of a million elements."""
    import torch

    from loadmaster.config.schema import OptimizerConfig

    named = [(key, torch.nn.Parameter(torch.randn(512, 1024).bfloat16())) for key in "ab"]
    real = optimizer.TrainingOptimizer(named, OptimizerConfig(), name, master)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    real.step(1e-3)
    held = sum(tensor.numel() * tensor.element_size() for tensor in real.state()[0].values())
    predicted = model.state_bytes(setup("full", optimizer=name, master_weights=master))
    assert held / (2 * 512 * 1024) == pytest.approx(predicted, abs=0.005)
