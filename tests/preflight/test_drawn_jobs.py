"""Jobs that no table of combinations has: adapters on some linears, wide ranks, layers kept, inputs on the host."""

from __future__ import annotations

import random

import pytest
import torch

from loadmaster.models import recompute
from loadmaster.models.load import DTYPES
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight import blocks
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import training_step
from loadmaster.training.trace import Case, _meta_model, _traced_peak, with_trained_part
from tests.preflight.test_replay import TOLERANCE, random_config

ALL_KEPT = Case(1025, "full", kept_layers=3)
FIXED = [
    # A frozen embedding's output asks for no gradient: the first layer works none out for what lies before its adapter.
    ("qwen2", "lora", "fp32", ("down_proj",), 64, False, ALL_KEPT),
    ("llama", "lora", "bf16", ("q_proj",), 16, False, Case(2048, "full")),
    ("phi3", "lora", "bf16", ("down_proj",), 16, True, Case(2048, "full")),
    ("mistral", "lora", "bf16", ("gate_proj",), 16, False, Case(2048, "offload")),
    # Codes of a frozen linear are kept for the backward pass, too: what is made again ends with the last of them.
    ("qwen3", "lora", "fp8", ("k_proj",), 16, False, Case(3008, "selective")),
    ("qwen3", "lora", "fp8", ("gate_proj",), 16, False, Case(3008, "full")),
    ("qwen2", "qlora", "bf16", ("q_proj",), 16, False, Case(100, "full")),
    ("llama", "qlora", "bf16", ("q_proj", "up_proj"), 8, False, Case(1025, "selective")),
    # Norms of DoRA's rows take products of the rank with itself and with the outputs, in fp32.
    ("qwen2", "lora", "fp32", ("up_proj", "q_proj", "down_proj", "gate_proj"), 256, True, Case(1024, "selective")),
    ("llama", "lora", "bf16", "all-linear", 256, True, Case(16, "full", kept_layers=3)),
    # Their product over the rank is wide enough from 512 on for a selective checkpoint to keep it.
    ("qwen2", "lora", "bf16", "all-linear", 768, True, Case(1024, "selective")),
    ("llama", "lora", "fp32", ("o_proj", "up_proj"), 512, True, Case(512, "selective", objective="kto")),
]

WIDE_HEADS = {
    "head_dim": 40, "num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 120, "intermediate_size": 100,
}
ODD = [
    # Rows of nf4 that end within a block of 64 are dequantized outside of any kernel, in each pass.
    ({"intermediate_size": 4099}, ("llama", "qlora", "bf16", ("q_proj",), 16, False, Case(100, "selective"))),
    # Units for fp8 take multiples of 16 alone; other codes are cast to numbers for each product.
    ({"intermediate_size": 4099}, ("qwen3", "lora", "fp8", ("gate_proj",), 16, False, Case(100, "selective"))),
    ({"hidden_size": 1000}, ("mistral", "lora", "fp8", ("o_proj",), 16, False, Case(4096))),
    # Gemma 3 norms queries and keys after all three products.
    (WIDE_HEADS, ("gemma3_text", "lora", "bf16", ("k_proj",), 256, False, Case(512, "full"))),
]


def error(
    family: str, method: str, precision: str, targets, rank: int, dora: bool, case: Case, seed: int = 1, **changes
) -> float:
    config = {**random_config(family, seed), "vocab_size": 1000, "num_hidden_layers": 3, **changes}
    setup = Setup(
        method=method, precision=precision, optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
        kept_layers=case.kept_layers, sequence_length=case.tokens, lora_rank=rank, lora_targets=targets, dora=dora,
        objective=case.objective, gradient_accumulation_steps=2 if case.accumulated else 1,
    )
    traced = _traced_peak(with_trained_part(_meta_model(config, DTYPES[precision]), setup), case)
    return training_step(from_config(config, family), setup, in_place=False).peak / traced - 1


@pytest.mark.parametrize("job", FIXED)
def test_replay_equals_a_trace(job) -> None:
    assert abs(error(*job)) < TOLERANCE, f"{error(*job):+.3%}"


@pytest.mark.parametrize(("changes", "job"), ODD)
def test_sizes_that_no_unit_or_block_divides_equal_a_trace(changes: dict, job) -> None:
    assert abs(error(*job, **changes)) < TOLERANCE, f"{error(*job, **changes):+.3%}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_jobs_drawn_at_random_equal_their_traces(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(recompute, "MLP_TOKENS", 400)
    monkeypatch.setattr(blocks, "MLP_TOKENS", 400)
    draw = random.Random(seed)
    family = draw.choice(["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "smollm3"])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = tuple(draw.sample(names, draw.randint(1, len(names))))
    kinds = [("lora", "bf16"), ("lora", "fp32"), ("lora", "fp8"), ("qlora", "bf16"), ("full", "bf16"), ("full", "fp8")]
    method, precision = draw.choice(kinds)
    dora = method == "lora" and precision != "fp8" and draw.random() < 0.3
    checkpointing = draw.choice(["none", "selective", "full", "offload"])
    kept = draw.randint(0, 3) if checkpointing == "full" else 0
    objective = draw.choice(["sft", "sft", "orpo", "dpo", "kto"])
    case = Case(draw.choice([512, 1024, 2048]), checkpointing, draw.random() < 0.3, objective, kept_layers=kept)
    job = (family, method, precision, targets, draw.choice([4, 16, 64]), dora, case, seed)
    odd = {"intermediate_size": draw.choice([500, 777, 4099]), "attention_bias": True} if draw.random() < 0.5 else {}
    odd = {} if (method, precision) == ("full", "fp8") else odd
    training_step.cache_clear()  # which knows no other size of pieces
    assert abs(error(*job, **odd)) < TOLERANCE, f"{job} {odd}: {error(*job, **odd):+.3%}"


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_a_frozen_embeddings_output_asks_for_no_gradient(mode) -> None:
    setup = Setup(method="lora", precision="bf16", optimizer="adamw", master_weights=True)
    model = with_trained_part(_meta_model(random_config("llama", 0)), setup)
    checkpoint_activations(model, mode)
    embedding = model.get_base_model().get_input_embeddings()
    assert not embedding(torch.zeros(1, 4, dtype=torch.long, device="meta")).requires_grad
