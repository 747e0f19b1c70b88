"""Which FlashAttention may run, what its calls are, and what all ranks make of it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from loadmaster.config.schema import LoraConfig
from loadmaster.models import flash
from loadmaster.models.adapters import make_trainable
from loadmaster.models.attention import packed_attention
from loadmaster.models.forward import token_losses
from loadmaster.models.load import random_model
from tests.models.test_forward import packed

CPU = torch.device("cpu")


def choice(**other):
    usual = {
        "device": "cuda", "major": 9, "dtype": torch.bfloat16, "head_dims": {128}, "capped": False, "dropout": 0.0,
        "known": ["FA3", "FA4"],
    }
    found = flash.candidate(**{**usual, **other})
    return found and found.impl


@pytest.mark.parametrize(
    ("other", "impl"),
    [
        ({}, "FA3"),
        ({"head_dims": {64}}, "FA3"),
        ({"head_dims": {64, 128}}, "FA3"),
        ({"known": ["FA3"]}, "FA3"),
        ({"major": 10}, "FA4"),
        ({"major": 10, "known": ["FA3"]}, None),
        ({"known": ["FA4"]}, None),
        ({"known": []}, None),
        ({"major": 8}, None),
        ({"major": 12}, None),
        ({"device": "cpu", "major": None}, None),
        ({"device": "meta", "major": None}, None),
        ({"device": "cpu"}, None),
        ({"dtype": torch.float32}, None),
        ({"dtype": torch.float16}, None),
        ({"head_dims": {96}}, None),
        ({"head_dims": {256}}, None),
        ({"head_dims": {64, 256}}, None),
        ({"major": 10, "head_dims": {256}}, None),
        ({"capped": True}, None),
        ({"dropout": 0.1}, None),
    ],
)
def test_the_candidate(other, impl):
    assert choice(**other) == impl


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('this must not be imported')\n")

    write(tmp_path / "probe_flat.py")
    write(tmp_path / "probe_whole" / "__init__.py")
    write(tmp_path / "probe_whole" / "cute" / "__init__.py")
    write(tmp_path / "probe_open" / "cute" / "__init__.py")  # as flash-attn-4 has it: no __init__ above
    write(tmp_path / "probe_other" / "__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert all(map(flash.installed, ["probe_flat", "probe_whole.cute", "probe_open.cute"]))
    assert not any(map(flash.installed, ["probe_none", "probe_none.cute", "probe_other.cute", "probe_flat.cute"]))
    assert not [name for name in sys.modules if name.startswith("probe_")]


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        (LlamaConfig, {(4, 2, 16, 0.25, None)}),
        (MistralConfig, {(4, 2, 16, 0.25, 6)}),
        (Phi3Config, {(4, 2, 16, 0.25, 6)}),
        (Qwen3Config, {(4, 2, 64, 0.125, None)}),
        (Qwen2Config, {(4, 2, 16, 0.25, None), (4, 2, 16, 0.25, 6)}),
        (GraniteConfig, {(4, 2, 16, 0.5, None)}),
    ],
)
def test_the_calls_are_those_that_the_layers_make(config, calls):
    own = {
        MistralConfig: {"sliding_window": 6}, Phi3Config: {"sliding_window": 6, "pad_token_id": 0},
        Qwen3Config: {"head_dim": 64}, GraniteConfig: {"attention_multiplier": 0.5},
        Qwen2Config: {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    }
    made = config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, **own.get(config, {}),
    )
    model = make_trainable(AutoModelForCausalLM.from_config(made, dtype=torch.float32), "lora", LoraConfig(rank=2))
    seen = set()

    def recorded(module, query, key, value, mask, scaling=None, sliding_window=None, **rest):
        seen.add((query.shape[1], key.shape[1], query.shape[-1], scaling, sliding_window))
        return packed_attention(module, query, key, value, mask, scaling, sliding_window=sliding_window, **rest)

    AttentionInterface.register("recorded", recorded)
    model.get_base_model().set_attn_implementation("recorded")
    token_losses(model, packed([[1, 2, 3, 4]]))
    assert seen == calls
    assert {(c.heads, c.key_value_heads, c.head_dim, c.scale, c.window) for c in flash.attention_calls(model)} == calls


def test_the_name_of_what_runs_otherwise():
    plain, dropping = (SimpleNamespace(attention_dropout=share, attn_logit_softcapping=None) for share in (0.0, 0.1))
    capped = SimpleNamespace(attn_logit_softcapping=50.0)
    for config in (plain, dropping, capped):
        config.get_text_config = lambda config=config: config
    cuda = torch.device("cuda")
    assert flash.own_kernel(plain, cuda) == "varlen"
    assert flash.own_kernel(capped, cuda) == "flex_attention"
    assert {flash.own_kernel(c, d) for c, d in [(dropping, cuda), (plain, CPU), (capped, CPU)]} == {"by_document"}


def test_a_model_on_a_cpu_has_no_candidate():
    model = random_model(
        {"model_type": "llama", "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
         "num_attention_heads": 4}, torch.bfloat16, "cpu",
    )
    assert flash.tried(model, torch.bfloat16, CPU, 4096) == (None, None)
    assert "FA3" in flash.activatable() and "FA4" in flash.activatable()


def test_all_ranks_run_the_same():
    three = flash.PACKAGES[9]
    assert flash.agreed([(None, None)] * 2) == (None, None)
    assert flash.agreed([(three, None)] * 2) == (
        three,
        "attention runs FlashAttention 3 (flash_attn_interface), whose outputs and gradients were held against "
        "PyTorch's own kernel",
    )
    refused = f"{three} was found and is not used: {{}}; attention runs PyTorch's own kernel"
    assert flash.agreed([(three, "its dk is not finite")]) == (None, refused.format("its dk is not finite"))
    assert flash.agreed([(three, None), (three, "no")]) == (None, refused.format("rank 1: no"))
    assert flash.agreed([(None, None), (three, None)]) == (None, refused.format("rank 0: it is not there"))
