"""The plan's bytes of quantizing with calibration data, beside those of every tensor that llm-compressor makes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny_llama

from loadmaster.config.schema import ExportConfig, Job
from loadmaster.export.quantize import calibrate
from loadmaster.files import read_json
from loadmaster.preflight.calibration import quantizing
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import cpu
from tests.preflight.zero_run import Held

LENGTH, ROWS = 640, 3
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize("export", ["int4_gptq", "int4_awq", "nvfp4"])
def test_quantizing_takes_what_is_planned(export, tokenizer, tmp_path, monkeypatch):
    import llmcompressor

    source = save_tiny_llama(tmp_path / "model", tokenizer, num_key_value_heads=1, vocab_size=512, **SIZES)
    held, own = Held(), llmcompressor.oneshot

    def oneshot(**given) -> None:
        for tensor in given["model"].parameters():
            held.count(tensor)
        before, held.peak = held.live, 0
        with held:
            own(**given)
        held.peak -= before

    monkeypatch.setattr(llmcompressor, "oneshot", oneshot)
    rows = torch.randint(3, 500, (ROWS, LENGTH)).tolist()
    calibrate(source, export.replace("_", "-"), tmp_path / "out", rows)
    job = Job(sequence_length=LENGTH, export=ExportConfig(formats=[export], calibration_rows=ROWS))
    planned = quantizing(job, from_config(read_json(source / "config.json"), "tiny"), cpu())
    assert planned.activations + planned.quantization == pytest.approx(held.peak, rel=0.05)
