from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from loadmaster.data import Conversation
from loadmaster.export import quantize
from loadmaster.export.quantize import calibrate, calibration_tokens, shrink, trust


def test_calibration_rows_are_spread_over_the_training_set_and_rendered_by_the_template(tokenizer):
    chats = [
        Conversation(
            [{"role": "user", "content": f"n{i}"}, {"role": "assistant", "content": "x"}], None, None, "a", "b"
        )
        for i in range(10)
    ]
    rows = calibration_tokens(chats, tokenizer, 5, 1000)
    texts = [tokenizer.decode(row) for row in rows]
    assert [next(i for i in range(10) if f"n{i}<" in text) for text in texts] == [0, 2, 4, 6, 8]
    assert all("<|im_start|>assistant" in text for text in texts)
    assert all(len(row) == 4 for row in calibration_tokens(chats, tokenizer, 100, 4))
    assert len(calibration_tokens(chats, tokenizer, 100, 4)) == 10


def test_few_calibration_tokens_are_trusted_less():
    assert trust(widest=1536, tokens=2_804) == trust(1536, 10_751) == (1.0, 0.0)
    assert trust(1536, 10_752) == trust(14336, 500_000) == (0.01, 0.3)


def test_shrinking_keeps_the_diagonal():
    hessian = torch.tensor([[4.0, 2.0], [2.0, 1.0]])
    shrink(hessian, 0.3)
    assert torch.equal(hessian, torch.tensor([[4.0, 1.4], [1.4, 1.0]]))


def test_gptq_quantizes_behind_the_shrunk_hessian(tiny, tmp_path, monkeypatch):
    torch.manual_seed(0)
    rows = torch.randint(3, 40_000, (30, 100)).tolist()
    made = {}
    for share in (quantize.SHRINKAGE, 0.0):
        monkeypatch.setattr(quantize, "SHRINKAGE", share)
        facts = calibrate(tiny, "int4-gptq", tmp_path / str(share), rows)
        assert (facts["dampening"], facts["shrinkage"], facts["calibration_tokens"]) == (0.01, share, 3_000)
        made[share] = load_file(tmp_path / str(share) / "model.safetensors")
    shrunk, full = made.values()
    packed = [name for name in shrunk if name.endswith("weight_packed")]
    assert len(packed) == 14 and all(not torch.equal(shrunk[name], full[name]) for name in packed)
    scales = [name for name in shrunk if name.endswith("weight_scale")]
    assert all(torch.equal(shrunk[name], full[name]) for name in scales)


@pytest.mark.parametrize("candidate", ["int4-gptq", "int4-awq", "nvfp4"])
def test_it_is_said_how_many_layers_are_quantized(candidate, tiny, tmp_path, monkeypatch, capsys):
    rows = torch.randint(3, 40_000, (4, 30)).tolist()
    for every, layers in ((0.0, (1, 2)), (quantize.EVERY_S, ())):  # not each, where they take no time
        monkeypatch.setattr(quantize, "EVERY_S", every)
        calibrate(tiny, candidate, tmp_path / str(every), rows)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("progress: ")]
        assert lines == [f"progress: quantizing {candidate}: {layer} of 2 layers" for layer in layers]
