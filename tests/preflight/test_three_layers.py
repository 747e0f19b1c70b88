"""Steps of three layers have no less than what code generated for an H100 allocates: `benchmarks/generated_steps.py`
printed these (2026-12-01, torch 2.13), where a count was off before. Torch 2.11's (its Python over 2.13's libraries)
has as much within 0.03%, or less: adapters of rank 1, FP8's of gate and down under dropout, and Phi's in FP8 under
selective checkpoints. Of these it had more in FP8 where attention's output or down is adapted (1B), and of Phi's MLP
with dropout: its numbers are here."""

from __future__ import annotations

from typing import Any

import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.preflight.config_json import find_config, from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import training_step

QV, GATED = ("q_proj", "v_proj"), ("gate_proj", "up_proj")
ONE_B, EIGHT_B = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"
GEMMA_1B, PHI = "google/gemma-3-1b-pt", "microsoft/Phi-4-mini-instruct"
SELECTIVE = {"checkpointing": "selective", "dora": True, "lora_rank": 8}
DROPPED = {"lora_dropout": 0.05}
AGAIN = {"checkpointing": "selective", **DROPPED}


def counted(model: str, tokens: int, **changed: Any) -> float:
    """MB."""
    config, _ = find_config(ModelConfig(name=model))
    config |= {"num_hidden_layers": 3, "vocab_size": 2000, "tie_word_embeddings": False}
    if kinds := config.get("layer_types"):
        config["layer_types"] = kinds[:3]
    fields = {"method": "lora", "precision": "bf16", "optimizer": "adamw", "master_weights": True, "compiled": True}
    shape, setup = from_config(config, config["model_type"]), Setup(**fields | changed, sequence_length=tokens)
    return training_step(shape, setup).peak / 1e6


@pytest.mark.parametrize(
    ("model", "tokens", "changed", "allocated", "above"),
    [("google/gemma-2-27b", 1024, {"method": "full"}, 3498.529, 0.001),
     (GEMMA_1B, 4096, {"method": "full"}, 773.888, 0.001),
     (EIGHT_B, 4096, {"method": "qlora", "lora_targets": QV}, 1665.532, 0.001),
     (EIGHT_B, 2048, {"method": "qlora", "lora_targets": QV, "checkpointing": "full"}, 512.393, 0.06),
     ("google/gemma-3-270m", 256, {"method": "qlora", "lora_targets": QV, "lora_rank": 1}, 21.212, 0.001),
     (PHI, 2048, {"method": "qlora", "lora_targets": ("qkv_proj",)}, 580.452, 0.001),
     (PHI, 256,
      {"method": "qlora", "lora_rank": 128, "checkpointing": "full"}, 152.105, 0.03),
     ("Qwen/Qwen3-14B", 256, {"precision": "fp8", "lora_rank": 256}, 249.787, 0.04),
     ("meta-llama/Llama-2-13b-hf", 512, {"precision": "fp8", "lora_rank": 8}, 272.885, 0.001),
     ("Qwen/Qwen3-0.6B", 4096, {"lora_rank": 256, "checkpointing": "full"}, 292.749, 0.001),
     (ONE_B, 1024, SELECTIVE, 356.561, 0.01), (ONE_B, 1024, {**SELECTIVE, "lora_targets": QV}, 212.690, 0.01),
     (EIGHT_B, 2048, {**SELECTIVE, "lora_rank": 16}, 1105.709, 0.02),
     (GEMMA_1B, 2048, {**SELECTIVE, "lora_rank": 16}, 531.868, 0.01),
     (GEMMA_1B, 2048, {**SELECTIVE, "lora_rank": 16, "lora_targets": ("gate_proj",)}, 388.244, 0.012),
     ("google/gemma-2-9b", 2048, {**SELECTIVE, "lora_rank": 16}, 1112.761, 0.012),
     (EIGHT_B, 2048, {"method": "qlora", **DROPPED}, 1282.671, 0.001),
     (EIGHT_B, 4096, {"method": "qlora", "checkpointing": "full", **DROPPED}, 1337.524, 0.001),
     (ONE_B, 3072, {"method": "qlora", "lora_targets": ("gate_proj",), **DROPPED}, 690.225, 0.001),
     (ONE_B, 3072, {"precision": "fp8", "lora_targets": ("gate_proj", "down_proj"), **DROPPED}, 1122.781, 0.001),
     (ONE_B, 3072, {"method": "qlora", "lora_targets": ("gate_proj",), "lora_rank": 1}, 671.074, 0.001),
     (ONE_B, 3072, {"lora_rank": 256, **DROPPED}, 1240.433, 0.001),
     (ONE_B, 3072, {"lora_rank": 1, "dora": True, "lora_targets": GATED}, 889.397, 0.001),
     (PHI, 2560, {"precision": "fp8", "lora_targets": ("down_proj",), **DROPPED}, 993.241, 0.001),
     (PHI, 6400, {"precision": "fp8", "lora_targets": ("qkv_proj",), "checkpointing": "full"}, 986.445, 0.001),
     (PHI, 6400, {"method": "qlora", "checkpointing": "full", **DROPPED}, 1098.600, 0.001),
     (ONE_B, 3072, {**SELECTIVE, **DROPPED, "lora_rank": 16}, 1220.438, 0.01),
     (GEMMA_1B, 2560, {**SELECTIVE, **DROPPED, "lora_rank": 16, "lora_targets": GATED}, 698.815, 0.01),
     (ONE_B, 2048, AGAIN, 560.595, 0.001), (GEMMA_1B, 2560, AGAIN, 556.970, 0.001),
     (EIGHT_B, 1024, {**AGAIN, "method": "qlora", "micro_batch_size": 2}, 1009.976, 0.001),
     (ONE_B, 3072, {**AGAIN, "precision": "fp8"}, 941.578, 0.001),
     (ONE_B, 3072, {**AGAIN, "precision": "fp8", "lora_targets": ("down_proj",)}, 839.133, 0.001),
     (ONE_B, 3072, {**AGAIN, "precision": "fp8", "lora_targets": ("o_proj",), "lora_dropout": 0.0}, 801.331, 0.001),
     ("Qwen/Qwen3-0.6B", 4096, {**AGAIN, "precision": "fp8", "lora_targets": (*QV, "o_proj")}, 574.562, 0.001),
     (GEMMA_1B, 2560, {**AGAIN, "precision": "fp8", "lora_targets": ("up_proj", "down_proj")}, 602.989, 0.001),
     (PHI, 2048, {**AGAIN, "lora_targets": ("gate_up_proj", "down_proj")}, 727.679, 0.001),
     (PHI, 2048, {**AGAIN, "method": "qlora", "lora_dropout": 0.0}, 560.300, 0.001),
     (PHI, 2048, {**AGAIN, "precision": "fp8", "lora_targets": ("qkv_proj", "o_proj")}, 643.527, 0.001),
     (PHI, 2048, {**AGAIN, "precision": "fp8", "lora_dropout": 0.0}, 652.407, 0.001)],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_a_step_has_what_its_generated_code_allocates(
    model: str, tokens: int, changed: dict[str, Any], allocated: float, above: float
) -> None:
    assert 0.9995 <= counted(model, tokens, **changed) / allocated <= 1 + above
