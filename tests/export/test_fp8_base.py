"""An adapter over a frozen FP8 base on a GPU: its rounding of activations is training's, and no fault of an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from loadmaster.config.schema import EvaluationConfig
from loadmaster.export import thresholds, verify
from loadmaster.export.served import reference
from loadmaster.files import read_json, write_json
from loadmaster.models import frozen
from loadmaster.models.frozen import FrozenFP8Linear, round_inputs, rounds_inputs
from loadmaster.models.load import load_base, load_trained

IDS = list(range(300, 364))
ROWS = [{"input_ids": IDS, "labels": [-100, *IDS[1:]], "position_ids": list(range(64))}]


@pytest.fixture
def on_units(monkeypatch):
    """A GPU's products, in torch: what they round, by the layers' own code."""

    def product(x, codes, scale):
        rows, row_scale = frozen._to_fp8(x.reshape(-1, x.shape[-1]).contiguous())
        return (rows.float() @ codes.float().t() * row_scale * scale).to(x.dtype).view(*x.shape[:-1], -1)

    monkeypatch.setattr(frozen, "_scaled_product", product)
    monkeypatch.setattr(frozen, "_on_fp8_units", lambda x, out_features: True)


def merged(live: nn.Module, base: Path) -> nn.Module:
    """The adapter on the FP8 values that it was trained over, in bf16."""
    model = load_base(base, torch.bfloat16, "cpu")
    for name, layer in live.named_modules():
        if isinstance(layer, FrozenFP8Linear):
            lora = live.get_submodule(name.removesuffix(".base_layer"))
            update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
            plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            model.get_submodule(plain).weight.data = (layer.dequantized(torch.float32) + update).to(torch.bfloat16)
    return model


def test_an_export_that_is_right_is_not_refused_for_what_training_rounded(tiny, tiny_adapter, on_units, monkeypatch):
    told = verify.spec(
        base=tiny, trained=tiny_adapter, precision="fp8", frozen="fp8", device="cpu", rows=ROWS, conversations=[],
        evaluation=EvaluationConfig(task="none"), formats={},
    )
    verification = verify.Verification(told, {})
    model = merged(load_trained(tiny, tiny_adapter, torch.float32, "cpu", "fp8"), tiny)
    monkeypatch.setattr(verification, "_load", lambda _: model)
    for checks in ("_file_checks", "_live_checks"):
        monkeypatch.setattr(verification, checks, lambda *_: {})
    figures = verification.of("bf16", [verify.Candidate("bf16", str(tiny))])
    limits = thresholds.DEFAULTS["bf16"]
    assert figures["mean_kl"] < limits.max_mean_kl < figures["activation_rounding"]["mean_kl"]
    assert thresholds.failures(figures, limits) == []

    monkeypatch.undo()
    assert not rounds_inputs(load_base(tiny, torch.bfloat16, "cpu", "fp8"))  # a CPU has no such units


def test_what_a_server_is_compared_with_is_not_rounded_either(tiny, tiny_adapter, on_units, tmp_path):
    ids = ROWS[0]["input_ids"]
    told = {
        "base": str(tiny), "trained": str(tiny_adapter), "device": "cpu", "scratch": str(tmp_path), "working": 0.0,
        "passing": 0.0, "precision": "fp8", "frozen": "fp8", "prompts": [], "max_new_tokens": 4, "exports": {},
        "documents": [{"input_ids": ids, "labels": ROWS[0]["labels"]}], "result": str(tmp_path / "result.json"),
    }
    write_json(tmp_path / "spec.json", told)
    reference.main([str(tmp_path / "spec.json")])
    [document] = read_json(tmp_path / "result.json")["documents"]
    live = load_trained(tiny, tiny_adapter, torch.bfloat16, "cpu", "fp8")
    row = reference._row(told["documents"][0])
    rounded = reference._scored(live, row, 0)["own"]
    round_inputs(live, False)
    assert document["trained"] == reference._scored(live, row, 0)["own"] != rounded
