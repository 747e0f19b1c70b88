"""Gemma 2 through every stage: trained, evaluated, exported, verified, bundled, on a tiny model with capped scores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from loadmaster.config.compose import compose
from loadmaster.pipeline import run
from tests.test_pipeline import SCALED_DOWN


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, few_words) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(few_words)
    folder = tmp_path_factory.mktemp("gemma2")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=16, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
        final_logit_softcapping=30.0, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def go(gemma: Path, folder: Path, *overrides: str) -> dict:
    console = Console(file=io.StringIO(), width=120)
    composed = compose([f"model.path={gemma}", f"run_dir={folder / 'run'}", *SCALED_DOWN, *overrides])
    assert run(composed, console) == 0, console.file.getvalue()
    return json.loads((folder / "run" / "result.json").read_text())


LOOSE = "{max_perplexity_ratio: 100, max_mean_kl: 100, min_top1_agreement: 0, min_task_retention: 0}"


@pytest.mark.slow
def test_every_stage_runs_and_the_export_is_the_model_as_trained(gemma, tmp_path):
    result = go(
        gemma, tmp_path, "method=lora", "activation_checkpointing=selective", "export.formats=[bf16,int4_gptq]",
        f"export.thresholds={{bf16: {LOOSE}, int4_gptq: {LOOSE}}}",
    )
    assert result["steps"] == 2
    folder = tmp_path / "run" / "export"
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    assert sorted(manifests) == ["bf16", "int4_gptq"]
    assert manifests["bf16"]["verification"]["passed"]
    assert manifests["bf16"]["verification"]["mean_kl"] < 1e-3  # bf16's rounding
