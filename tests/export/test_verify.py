from __future__ import annotations

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loadmaster.config.schema import EvaluationConfig
from loadmaster.data import Conversation, PackedRow
from loadmaster.errors import ExportRejected
from loadmaster.export import checks, live_checks, verify
from loadmaster.export.figures import _exp
from loadmaster.export.verify import (
    Reference,
    compare,
    held_out_rows,
    load_adapter,
    load_export,
    log_probabilities,
)

IDS = np.arange(300, 340)
ROW = PackedRow(IDS, np.where(IDS < 310, -100, IDS), np.concatenate([np.arange(25), np.arange(15)]), [])


@pytest.fixture(scope="module")
def model(tiny):
    return load_export(tiny, "cpu")


@pytest.fixture(scope="module")
def reference(model):
    return Reference(ROW, *log_probabilities(model, ROW, 0))


def test_a_model_agrees_with_itself_entirely(model, reference):
    figures = compare(model, [reference], 0)
    assert figures["tokens"] == 29  # 30 labels, less the first token of the second document
    assert figures["perplexity_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert figures["mean_kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["top1_agreement"] == 1.0


def test_the_figures_are_those_of_their_definitions(tiny, reference):
    other = load_export(tiny, "cpu")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    figures = compare(other, [reference], 0)
    p, q = reference.log_probabilities.double(), log_probabilities(other, ROW, 0)[0].double()
    divergences = (p.exp() * (p - q)).sum(-1).numpy()
    assert figures["mean_kl"] == pytest.approx(divergences.mean(), rel=1e-4)
    assert figures["p99_kl"] == pytest.approx(np.percentile(divergences, 99), rel=1e-4)
    assert figures["p99_kl"] > 1.2 * np.median(divergences)
    at = torch.arange(len(reference.targets))
    gap = (p - q)[at, reference.targets].mean().item()
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(gap), rel=1e-4)
    assert figures["top1_agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1


def test_rounding_makes_no_divergence_below_zero(model, reference):
    lower = replace(reference, log_probabilities=reference.log_probabilities - 1e-6)
    figures = compare(model, [lower], 0)
    assert figures["mean_kl"] == figures["p99_kl"] == 0


def test_a_model_that_computes_nan_scores_nan(tiny, reference):
    other = load_export(tiny, "cpu")
    with torch.no_grad():
        other.model.norm.weight[0] = float("nan")
    assert math.isnan(compare(other, [reference], 0)["mean_kl"])


def tampered(tiny, folder, change):
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), r"missing keys \(model\.layers\.1\.mlp\.up"),
        (lambda tensors: tensors.update(stray=torch.zeros(2)), r"unexpected keys \(stray"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}),
            r"mismatched keys .*model\.norm\.weight",
        ),
    ],
    ids=["missing", "unexpected", "another shape"],
)
def test_an_export_whose_tensors_do_not_fill_the_model_is_not_loaded(tiny, tmp_path, change, named):
    with pytest.raises(ExportRejected, match=named):
        load_export(tampered(tiny, tmp_path / "torn", change), "cpu")


def test_an_adapter_with_a_tensor_the_base_has_no_place_for_is_not_loaded(tiny, tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.elsewhere.lora_A.weight": torch.zeros(4, 64)}, file)
    with pytest.raises(ExportRejected, match="elsewhere"):
        load_adapter(tiny, tmp_path / "adapter", "cpu")


def test_a_tokenizer_that_splits_the_users_conversations_otherwise_is_noticed(tokenizer):
    import copy

    chat = Conversation([{"role": "user", "content": "a"}], None, None, "data.jsonl:3", "x")
    other = copy.deepcopy(tokenizer)
    assert checks.template(other, tokenizer, [chat]) == []
    other.chat_template = other.chat_template.replace("user", "human") + " "
    assert any("data.jsonl:3 gives other tokens" in problem for problem in checks.template(other, tokenizer, [chat]))


@pytest.mark.parametrize("value", [1 + 2**-8, 1 + 2**-8 + 2**-23, 1.5, 1 + 2**-9])
def test_rounding_to_bf16_is_within_what_is_allowed_for_it_and_nearly_all_of_it(value):
    exact = torch.tensor([[value, 3.0]])
    assert live_checks._is_rounded(exact.bfloat16(), exact)
    assert not live_checks._is_rounded(exact * (1 + 1.01 * live_checks.ROUNDING), exact)


def test_weights_are_compared_in_float32_where_tf32_is_asked_for(monkeypatch, tmp_path):
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 leaves it."""
    seen = []
    monkeypatch.setattr(verify, "load_tokenizer", lambda _: seen.append(torch.get_float32_matmul_precision()) or 1 / 0)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError):
            verify.Verification({"base": str(tmp_path), "scratch": None}, {})
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_reference_memory_is_bounded_by_taking_labels_away_never_context(monkeypatch):
    monkeypatch.setattr(verify, "REFERENCE_BYTES", 4 * 100 * 45)  # 45 tokens of a vocabulary of 100
    rows = held_out_rows([ROW] * 5, limit=5, vocabulary_size=100)
    labels = [np.array(row["labels"]) for row in rows]
    assert [int((each != -100).sum()) for each in labels] == [30, 15]
    assert rows[1]["input_ids"] == IDS.tolist()
    assert labels[1][labels[1] != -100].tolist() == IDS[10:25].tolist()
    assert len(held_out_rows([ROW] * 5, limit=2, vocabulary_size=1)) == 2


@pytest.mark.parametrize("names", [["broken", "near", "far", "baseline"], ["baseline", "far", "broken", "near"]])
def test_the_nearest_candidate_is_taken_and_told_with_the_others(monkeypatch, names):
    """Whatever its place: it is loaded again where another was loaded after it, and checked by its own folder."""
    kl = {"broken": math.nan, "near": 0.01, "far": 0.02, "baseline": 0.0}
    verification = object.__new__(verify.Verification)
    verification.tokenizer, verification.references = SimpleNamespace(pad_token_id=0), []
    verification.conversations, verification.tuned_weights, verification.rounding = [], {}, {}
    verification.prompts, verification.right_answers, verification.answers = ["p", "q"], ["a", "b"], ["a", "b"]
    verification.evaluation = EvaluationConfig(task="exact_match")
    monkeypatch.setattr(verify, "compare", lambda model, *_: {"mean_kl": kl[model]})
    monkeypatch.setattr(verify, "_tokenizer", lambda folder: folder.name)
    monkeypatch.setattr(verify, "recorded_answers", lambda model, tokenizer, _: [model, tokenizer])
    monkeypatch.setattr(verification, "_load", lambda candidate: candidate.name)
    monkeypatch.setattr(verification, "_answers", lambda model, _: ["a", "b" if model == "far" else "c"])
    monkeypatch.setattr(verification, "_file_checks", lambda _, folder: {"storage": [folder.name]})
    monkeypatch.setattr(verification, "_live_checks", lambda _, folder, model, tokenizer: {"stops": [model, tokenizer]})
    figures = verification.of("int4", [verify.Candidate(name, name, is_baseline=name == "baseline") for name in names])
    assert (figures["candidate"], figures["mean_kl"], set(figures["candidates"])) == ("near", 0.01, set(names))
    assert figures["checks"] == {"strict_load": [], "storage": ["near"], "stops": ["near", "near"]}
    assert figures["smoke"] == ["near", "near"]
    assert (figures["answers"], figures["flipped_answers"], figures["task_retention"]) == (2, 0.5, 0.5)
    assert figures["candidates"]["far"]["flipped_answers"] == 0


@pytest.mark.parametrize(("trained", "own", "retained"), [("b", "a", None), ("a", "a", 1.0), ("a", "b", 0.0)])
def test_of_a_task_of_which_nothing_was_right_nothing_is_retained(monkeypatch, trained, own, retained):
    verification = object.__new__(verify.Verification)
    verification.prompts, verification.right_answers, verification.answers = ["p"], ["a"], [trained]
    verification.evaluation = EvaluationConfig(task="exact_match")
    monkeypatch.setattr(verification, "_answers", lambda *_: [own])
    assert verification._answer_figures(None, None).get("task_retention") == retained


def test_a_loss_beyond_all_numbers_is_an_infinite_perplexity():
    assert (_exp(1.0), _exp(1e6)) == (math.e, math.inf)


def test_an_embedding_in_few_bits_is_held_to_the_trained_one(model, tiny):
    """GGUF's is, and no figure is of the rows that no held-out token reads."""
    sketches = live_checks.sketches(model)
    other = load_export(tiny, "cpu")
    assert live_checks.quantized_weights(other, sketches, 0.2) == []
    with torch.no_grad():
        other.model.embed_tokens.weight[40000:] = 0
    (said,) = live_checks.quantized_weights(other, sketches, 0.2)
    assert said.startswith("2 matrices are further than 20% from the trained ones") and "embed_tokens" in said
