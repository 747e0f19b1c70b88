from __future__ import annotations

import torch
from safetensors.torch import load_file

from loadmaster.data import Conversation
from loadmaster.export import quantize
from loadmaster.export.dequantize import ExportedTensors
from loadmaster.export.quantize import calibrate, calibration_dtype, calibration_tokens, shrink, trust


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


def test_gptq_runs_in_fp32_where_the_cpu_has_no_bf16_and_writes_the_same_layout(tiny, tmp_path, monkeypatch):
    torch.manual_seed(0)
    rows = torch.randint(3, 40_000, (8, 50)).tolist()
    made, off = {}, {}
    for name, cpu in (("bf16", {"avx512_bf16": True}), ("fp32", {})):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        calibrate(tiny, "int4-gptq", tmp_path / name, rows)
        made[name] = load_file(tmp_path / name / "model.safetensors")
        base, export = load_file(tiny / "model.safetensors"), ExportedTensors(tmp_path / name)
        off[name] = sum(
            float((export.read(each) - weight.float()).square().sum())
            for each, weight in base.items() if weight.dim() == 2 and "embed" not in each
        )  # fmt: skip
    layout = {name: {each: (t.dtype, t.shape) for each, t in tensors.items()} for name, tensors in made.items()}
    assert layout["bf16"] == layout["fp32"]
    plain = [each for each, tensor in made["fp32"].items() if each in base and tensor.dtype == torch.bfloat16]
    assert len(plain) == 6 and all(torch.equal(made["fp32"][each], base[each]) for each in plain)
    packed = [each for each in made["fp32"] if each.endswith("weight_packed")]
    assert any(not torch.equal(made["fp32"][each], made["bf16"][each]) for each in packed)  # it did run in fp32
    assert abs(off["fp32"] / off["bf16"] - 1) < 0.02


def test_only_gptq_of_a_model_that_fits_twice_is_widened(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert calibration_dtype("int4-gptq", 2**30) == torch.float32
    assert calibration_dtype("int4-gptq", quantize.WIDE_BYTES + 1) == torch.bfloat16
    assert calibration_dtype("nvfp4", 2**30) == calibration_dtype("int4-awq", 2**30) == torch.bfloat16
    for fast in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {fast: True})
        assert calibration_dtype("int4-gptq", 2**30) == torch.bfloat16
