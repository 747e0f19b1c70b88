"""A server that rounds activations another way than ours is served right; one whose scale is wrong is not.

The server is imitated by what vLLM 0.32 computes for compressed-tensors FP8 (`QuantFP8.forward_native` and
`ChannelWiseTorchFP8ScaledMMLinearKernel`): scales of tokens in float32, where compressed-tensors takes them in bf16.
"""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from loadmaster.config.schema import ThresholdsConfig
from loadmaster.export import thresholds
from loadmaster.export.loading import load_export
from loadmaster.export.served.check import _reference, questions
from loadmaster.export.served.compare import LIMITS, failures, log_probability_figures
from loadmaster.export.served.reference import _row, _scored, rounding_layers

GOOD = {"models": ["tiny"], "rendering": {"cases": 1, "different": []}}


def as_vllm(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1 / (448 * 512))
    rounded = (x.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return ((rounded @ self.weight.float().t()) * scale).to(x.dtype)


@pytest.mark.slow
def test_the_rounding_of_activations_is_allowed_for_and_a_doubled_scale_is_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(thresholds, "DEFAULTS", dict.fromkeys(("bf16", "fp8", "int4"), ThresholdsConfig()))
    run.export("fp8", "bf16")
    run.plan.write(run.folder / "plan.json")
    wanted = questions(run.job, run.prepared, run.tokenizer)
    reference = _reference(run.folder, run.base, wanted, ["fp8"], tmp_path, run.log.append)
    documents = reference["documents"]
    assert all(list(document["rounded"]) == ["fp8"] for document in documents)

    model = load_export(run.folder / "export" / "fp8", "cpu")
    layers = rounding_layers(model)
    assert len(layers) == 14 and rounding_layers(load_export(run.folder / "export" / "bf16", "cpu")) == []

    def figures() -> dict:
        scored = [_scored(model, _row(document), run.tokenizer.pad_token_id) for document in wanted["documents"]]
        return log_probability_figures(documents, [(each["own"], each["top"]) for each in scored], "fp8")

    def found(of: dict) -> list[str]:
        return [each for each in failures({**GOOD, **of}, LIMITS["fp8"], "tiny") if each.startswith("from_disk")]

    ours = figures()
    assert ours["from_disk"] == ours["rounding"] > 0.01
    for layer in layers:
        layer.forward = types.MethodType(as_vllm, layer)
    another_way = figures()
    assert another_way["from_disk"] == pytest.approx(ours["rounding"], rel=0.6) and found(another_way) == []
    layers[-1].weight.data.mul_(2)
    assert found(figures()) != []
