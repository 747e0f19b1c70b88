"""Compiled layers as a GPU would run them, on a machine without one: every kernel is assembled for it, and what the
kernels move, and have at once, is what the preflight counts. Nothing here says how fast they are, or that their numbers
are right; the same graphs' numbers are held on a CPU (tests/training/test_compiled.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.preflight.compiled import in_backward_bytes
from loadmaster.preflight.config_json import find_shape, from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.speed import bytes_moved
from loadmaster.preflight.step import training_step
from tests.gpu_code import TOKENS

SCRIPT = Path(__file__).parents[1] / "gpu_code.py"
A100, ADA, H100, B200 = 80, 89, 90, 100
GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "hidden_activation": "gelu_pytorch_tanh",
}
PHI = {
    "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "vocab_size": 100352,
    "num_attention_heads": 40, "num_key_value_heads": 10, "head_dim": 128, "pad_token_id": 0,
}


def generated(method: str, precision: str, capability: int, config: dict | None = None, **fields) -> dict:
    told = [json.dumps(config or {}), json.dumps(fields)]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), method, precision, str(capability), *told],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


SHAPE = find_shape(ModelConfig(name="meta-llama/Llama-3.1-8B"))


def counted(setup: Setup) -> float:
    """Bytes of a token of a layer by the preflight, without what attention's own kernel reads and writes."""
    two, twelve = (replace(SHAPE, layers=layers) for layers in (2, 12))
    moved = [bytes_moved(each, training_step(each, setup).work, setup) for each in (two, twelve)]
    attention = 2 * 2 * (2 * SHAPE.query_size + 2 * SHAPE.key_value_size)
    return (moved[1] - moved[0]) / 10 / TOKENS - attention


DEQUANTIZED = 2 * (0.5 + 2) * SHAPE.linear_weights / SHAPE.layers / TOKENS
"""Of nf4 weights, in both passes, by bitsandbytes' own kernels."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "precision", "capability", "beside", "kernels"),
    [("lora", "bf16", A100, 0, 25), ("qlora", "bf16", ADA, DEQUANTIZED, 25), ("lora", "fp8", H100, 0, 25),
     ("full", "bf16", B200, 0, 10), ("full", "fp8", H100, 0, 30)],
)
def test_layers_assemble_for_a_gpu_and_move_what_the_preflight_counts(
    method: str, precision: str, capability: int, beside: float, kernels: int
) -> None:
    found = generated(method, precision, capability)
    assert [kind for kind, _ in found["graphs"]] == ["forward", "backward", "forward"]  # of a layer, and the loss
    assert sum(number for _, number in found["graphs"]) >= kernels
    assert found["mixed"] == 0  # some leave a part of their result unwritten (compiled.py)
    setup = Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True,
        sequence_length=TOKENS,
    )
    assert counted(setup) == pytest.approx(found["bytes"] + beside, rel=0.018 if setup.adapters else 0.08)
    inside = found["backward" if setup.adapters else "beyond"]
    assert in_backward_bytes(SHAPE, setup) == pytest.approx(inside, rel=0.002)


@pytest.mark.slow
def test_fused_gate_and_up_have_less_at_once_in_their_backward_pass() -> None:
    shape, setup = from_config({**PHI, "num_hidden_layers": 2}, "phi3"), Setup(
        method="lora", precision="fp8", optimizer="adamw", master_weights=True, compiled=True
    )
    found = generated("lora", "fp8", H100, PHI)
    assert in_backward_bytes(shape, setup) == pytest.approx(found["backward"], rel=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "config", "fields"),
    [("bf16", None, {"dora": True}), ("bf16", PHI, {"dora": True, "lora_dropout": 0.1}),
     ("fp8", None, {"lora_dropout": 0.1})],
)
def test_magnitudes_and_dropout_have_more_at_once_in_their_backward_pass(
    precision: str, config: dict | None, fields: dict
) -> None:
    shape = SHAPE if config is None else from_config({**config, "num_hidden_layers": 2}, "phi3")
    setup = Setup(
        method="lora", precision=precision, optimizer="adamw", master_weights=True, compiled=True, **fields
    )
    found = generated("lora", precision, H100, config, **fields)
    assert in_backward_bytes(shape, setup) == pytest.approx(found["backward"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_family_assembles_too(method: str, precision: str) -> None:
    """With norms of q and k, four of a layer, windows, and a GELU, whose gradient is in fp32 for FP8."""
    found = generated(method, precision, H100, GEMMA3)
    assert min(number for _, number in found["graphs"]) >= 1
    shape, setup = from_config({**GEMMA3, "vocab_size": 128256, "num_hidden_layers": 2}, "gemma3_text"), Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, compiled=True
    )
    assert found["beyond"] <= in_backward_bytes(shape, setup) <= 1.07 * found["beyond"]
