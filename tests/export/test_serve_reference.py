"""What a server is compared with, made by hand where a GPU or another process would be needed."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loadmaster.data import Conversation
from loadmaster.errors import ExportRejected
from loadmaster.evaluation.generate import prompt_ids, stop_ids
from loadmaster.export import verify
from loadmaster.export.figures import log_probabilities
from loadmaster.export.served import check, reference
from loadmaster.files import read_json, write_json
from loadmaster.models.load import load_base
from loadmaster.models.spread import NoRoom

FULL = [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), NoRoom("it fits nowhere")
]


def refuse_with(error: Exception):
    def load(*_):
        raise error

    return load


def reference_of(folder: Path, monkeypatch, load) -> dict:
    """What the step writes of an export that loads so, and of no documents."""
    trained = torch.nn.Module()
    trained.disable_adapter = nullcontext
    monkeypatch.setattr(reference, "load_tokenizer", lambda _: SimpleNamespace(pad_token_id=0))
    monkeypatch.setattr(reference, "load_trained", lambda *_, **__: trained)
    monkeypatch.setattr(reference, "generate_ids", lambda *_: [])
    monkeypatch.setattr(reference, "load_export", load)
    told = {
        "base": "base", "trained": "adapter", "device": "cpu", "scratch": str(folder), "working": 0.0, "passing": 0.0,
        "precision": "fp32", "frozen": None, "documents": [], "prompts": [], "max_new_tokens": 4,
        "exports": {"fp8": "fp8"}, "result": str(folder / "result.json"),
    }
    write_json(folder / "spec.json", told)
    reference.main([str(folder / "spec.json")])
    return read_json(folder / "result.json")


@pytest.mark.parametrize("error", FULL, ids=["a full card", "full past PyTorch", "no room"])
def test_a_machine_without_room_is_not_blamed_on_the_export(tmp_path, monkeypatch, error):
    with pytest.raises(type(error)):
        reference_of(tmp_path, monkeypatch, refuse_with(error))
    assert reference_of(tmp_path, monkeypatch, refuse_with(OSError("torn")))["broken"] == {"fp8": "torn"}

    verification = object.__new__(verify.Verification)
    verification.base, verification.spread = tmp_path, None
    for load, is_adapter in (("load_export", False), ("load_adapter", True)):
        candidate = verify.Candidate("bf16", str(tmp_path), is_adapter)
        monkeypatch.setattr(verify, load, refuse_with(error))
        with pytest.raises(type(error)):
            verification._load(candidate)
        monkeypatch.setattr(verify, load, refuse_with(OSError("torn")))
        with pytest.raises(ExportRejected, match="strict_load: torn"):
            verification._load(candidate)


@pytest.mark.parametrize(("trained_on", "here", "device"), [
    ("cpu", "h100", "cpu"), ("h100", "cpu", "cpu"), ("h100", "h100", "cuda"),
])
def test_what_a_cpu_trained_in_fp32_is_computed_on_a_cpu(run, tmp_path, monkeypatch, trained_on, here, device):
    """Packed attention on a GPU takes 16 bits alone."""
    replace(run.plan, hardware=replace(run.plan.hardware, gpu=trained_on)).write(run.folder / "plan.json")
    monkeypatch.setattr(check, "detect_local", lambda: SimpleNamespace(gpu=here))
    monkeypatch.setattr(check, "run_step", lambda _, spec, *__: spec)
    wanted = {"documents": [], "prompts": [], "max_new_tokens": 4}
    told = check._reference(run.folder, run.base, wanted, ["bf16"], tmp_path, print)
    assert told["device"] == device


def test_of_a_long_document_no_more_logits_are_alive_than_a_chunks(tiny, monkeypatch):
    ids = list(range(300, 340))
    row = reference._row({"input_ids": ids, "labels": [-100, *ids[1:]]})
    model = load_base(tiny, torch.float32, "cpu")
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 16)
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, logits: rows.append(len(logits)))
    found = reference._scored(model, row, 0)
    assert rows == [16, 16, 7]
    log_p, targets = log_probabilities(model, row, 0)
    assert found["own"] == pytest.approx(log_p[torch.arange(39), targets].tolist(), abs=1e-5)
    assert found["top"] == log_p.argmax(-1).tolist()


def test_how_sure_an_end_is_is_the_trained_models_own_margin(tiny, tokenizer):
    model = load_base(tiny, torch.float32, "cpu")
    prompt, ids = Conversation([{"role": "user", "content": "Hello"}]), [300, 301]
    before = [*prompt_ids(tokenizer, prompt), *ids]
    row = reference._row({"input_ids": [*before, 5], "labels": [-100] * len(before) + [5]})
    [log_p], _ = log_probabilities(model, row, 0)
    stops = stop_ids(model, tokenizer)
    others = [at for at in range(len(log_p)) if at not in stops]
    expected = float(log_p[stops].max() - log_p[others].max())
    assert reference.end_margin(model, tokenizer, prompt, ids) == pytest.approx(expected, abs=1e-4)
