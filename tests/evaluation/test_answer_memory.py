"""The plan's bytes of generated answers, beside those of every tensor that generating them makes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadmaster.evaluation.generate import _generate_batch
from loadmaster.evaluation.mode import evaluating
from loadmaster.models.attention import cached_attention
from loadmaster.preflight.answers import answer_bytes
from loadmaster.preflight.config_json import from_config
from tests.preflight.zero_run import Held

SIZES = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "prompt", "new", "sizes"),
    [
        ("llama", 256, 4, {}),
        ("qwen3", 256, 4, {"hidden_size": 128}),
        ("gemma3_text", 256, 4, {"sliding_window": 64, "num_hidden_layers": 6}),
        ("gemma2", 256, 4, {}),
        ("phi3", 256, 4, {}),
        ("mixtral", 256, 4, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", 256, 4, {"num_experts": 8, "num_experts_per_tok": 8, "moe_intermediate_size": 256}),
        ("qwen3_moe", 256, 4, {"hidden_size": 256, "num_experts_per_tok": 4, "moe_intermediate_size": 32}),
        ("llama", 16, 96, {"intermediate_size": 64}),
        ("llama", 8, 4, {"vocab_size": 20_000, "intermediate_size": 64}),
    ],
)
def test_answers_take_what_is_planned(family, prompt, new, sizes):
    config = AutoConfig.for_model(family, **SIZES | sizes)
    model, answers = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), 4
    prompts = [torch.randint(3, 500, (prompt - lack,)).tolist() for lack in range(answers)]
    held = Held()
    for tensor in (*model.parameters(), *model.buffers()):
        held.count(tensor)
    before, held.peak = held.live, 0
    with evaluating(model), cached_attention(model), held:
        made = _generate_batch(model, prompts, [config.vocab_size], 0, new, False)
    assert [len(ids) for ids in made] == [new] * answers
    planned = answer_bytes(from_config(config.to_dict(), "tiny"), 2, answers, prompt, new)
    assert planned == pytest.approx(held.peak - before, rel=0.05)
