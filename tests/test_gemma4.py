"""Gemma 4 through every stage: its language model taken out of a multimodal checkpoint, trained, exported, verified."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from loadmaster.config.compose import compose
from loadmaster.pipeline import run
from tests.models.test_language_model import GEMMA_4, KINDS
from tests.test_pipeline import SCALED_DOWN

LOOSE = "{max_perplexity_ratio: 100, max_mean_kl: 100, min_top1_agreement: 0, min_task_retention: 0}"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, few_words) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(few_words)
    folder = tmp_path_factory.mktemp("gemma4")
    torch.manual_seed(0)
    text = {**GEMMA_4, "vocab_size": len(tokenizer), "initializer_range": 0.1, "max_position_embeddings": 4096}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(**{**KINDS["gemma4"], "text_config": text})
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "formats", "more"),
    [
        ("lora", ["adapter", "bf16"], ["activation_checkpointing=selective"]),
        ("full", ["bf16"], ["activation_checkpointing=full", "hardware.count=2", "sharding=fsdp"]),
    ],
)
def test_every_stage_runs_and_the_export_is_the_model_as_trained(
    method, formats, more, gemma, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    console = Console(file=io.StringIO(), width=120)
    limits = ", ".join(f"{name}: {LOOSE}" for name in formats if name != "adapter")
    composed = compose([
        f"model.path={gemma}", f"run_dir={tmp_path / 'run'}", *SCALED_DOWN, f"method={method}",
        *more, f"export.formats=[{','.join(formats)}]",
        f"export.thresholds={{{limits}}}",
    ])
    assert run(composed, console) == 0, console.file.getvalue()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    folder = tmp_path / "run" / "export"
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    assert sorted(manifests) == sorted(formats)
    assert manifests["bf16"]["verification"]["passed"]
    assert manifests["bf16"]["verification"]["mean_kl"] < 1e-3  # bf16's rounding
    exported = {}
    for file in (folder / "bf16").glob("*.safetensors"):
        exported |= load_file(file)
    assert exported["model.layers.1.layer_scalar"].item() == 0.5
    config = json.loads((folder / "bf16" / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForCausalLM"] and "vision_config" not in config
