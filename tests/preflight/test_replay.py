"""The memory model equals traces of the real engine within 0.1%, for every family, method and setting."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loadmaster.data import MicroBatch
from loadmaster.models import recompute
from loadmaster.preflight import blocks
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.layers import chunks
from loadmaster.preflight.replay import Tape
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import evaluation_batch, training_step
from loadmaster.training import trace
from loadmaster.training.trace import Case
from tests.preflight.traced import traced_peaks

TOLERANCE = 0.001
FAMILIES = {
    "llama": {},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "phi3 partial": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma2": {"sliding_window": 512},
    "gemma3_text": {"sliding_window": 512},
    "gemma4_text": {
        "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 256,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    },
    "gemma4_text wide": {"sliding_window": 512, "global_head_dim": 512, "hidden_size_per_layer_input": 0},
    "ministral": {"sliding_window": 512},
    "ministral3": {"pad_token_id": 0},
    "arcee": {"eos_token_id": 2, "bos_token_id": 1},
    "granite": {"pad_token_id": 0},
    "gemma": {},
    "olmo2": {"pad_token_id": 0, "eos_token_id": 2},
    "olmo3": {"pad_token_id": 0, "eos_token_id": 2, "sliding_window": 512},
    "exaone4": {"sliding_window": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
CASES = [
    Case(512),
    Case(3000),
    Case(3000, accumulated=True),
    Case(3000, "full"),
    Case(3000, "full", accumulated=True),
    Case(3000, "selective"),
    Case(3000, evaluated=True),
]


def random_config(family: str, seed: int) -> dict:
    """A model of the family with sizes drawn at random, four layers deep."""
    draw = random.Random(f"{family} {seed}")
    head_dim = draw.choice([64, 128])
    key_value_heads = draw.choice([1, 2, 4])
    heads = key_value_heads * draw.choice([1, 2, 4])
    return {
        "model_type": family.split()[0],
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "num_hidden_layers": 4,
        "hidden_size": heads * head_dim if "phi3" in family else draw.choice([512, 768, 1024]),
        "intermediate_size": draw.choice([1024, 2816, 4096]),
        "vocab_size": draw.choice([1000, 32000, 128256]),
        "tie_word_embeddings": draw.choice([True, False]),
        **FAMILIES[family],
    }


DROPPED = [Case(512), Case(3000, "full"), Case(3000, evaluated=True)]
PAIRS = [Case(3000), Case(3000, "full", accumulated=True), Case(3000, evaluated=True)]
CHECKS: dict[str, list[tuple[str, str, float, str, int, list[Case]]]] = {
    "full": [("full", "bf16", 0.0, "sft", 0, CASES)],
    "lora": [("lora", "bf16", 0.0, "sft", 1, CASES)],
    "qlora": [("qlora", "bf16", 0.0, "sft", 1, CASES)],
    "fp8": [("lora", "fp8", 0.0, "sft", 0, CASES)],
    "dropout": [(method, precision, 0.1, "sft", 1, DROPPED) for method, precision in
                (("lora", "bf16"), ("qlora", "bf16"), ("lora", "fp8"))],
    "preference": [(method, "bf16", 0.0, objective, 0, PAIRS) for method, objective in
                   (("lora", "dpo"), ("qlora", "dpo"), ("lora", "orpo"), ("full", "orpo"), ("full", "dpo"))],
    "fp32": [(method, "fp32", 0.0, "sft", 0, DROPPED) for method in ("full", "lora")],
}
"""(method, precision, dropout, objective, seed, cases) of each group of checks."""


LIKE_OTHERS = ("gemma2", "gemma4_text wide", "ministral", "ministral3", "gemma", "olmo2", "mistral", "phi3")
"""Mistral's window is longer than these rows, which leaves Llama's layers; Phi-3's partial rotation has more in it."""
WITH_EXPERTS = ("mixtral", "qwen3_moe")
FOURTH_DIFFERS = ("smollm3", "gemma4_text", "olmo3", "exaone4")
"""Of the others a first layer, one between and a last are all that there is."""
PAIRED = [
    pytest.param(family, checks, marks=[pytest.mark.slow] * (checks != "lora" and family in LIKE_OTHERS))
    for family in FAMILIES
    for checks in CHECKS
    if not (checks == "fp32" and family in WITH_EXPERTS)  # grouped matmuls are traced in bf16 only
]


@pytest.mark.parametrize(("family", "checks"), PAIRED)
def test_replay_equals_a_trace_of_the_engine(family: str, checks: str) -> None:
    for method, precision, dropout, objective, seed, cases in CHECKS[checks]:
        config = random_config(family, seed)
        if family not in FOURTH_DIFFERS:
            config["num_hidden_layers"] = 3
        rank = random.Random(seed).choice([8, 16, 64])
        experts = family in WITH_EXPERTS
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if experts else "all-linear"
        shape = from_config(config, family)
        cases = [replace(case, objective=objective) for case in cases]
        traced = traced_peaks(config, method, cases, rank, targets, precision, dropout)
        for case, truth in zip(cases, traced, strict=True):
            setup = Setup(
                method=method,
                precision=precision,
                optimizer="adamw",
                master_weights=True,
                checkpointing=case.checkpointing,
                sequence_length=case.tokens,
                lora_rank=rank,
                lora_targets=targets if isinstance(targets, str) else tuple(targets),
                lora_dropout=dropout,
                objective=objective,
                gradient_accumulation_steps=2 if case.accumulated else 1,
            )
            replay = evaluation_batch if case.evaluated else training_step
            error = replay(shape, setup, in_place=False).peak / truth - 1
            said = f"{config} {precision} dropout {dropout} {case}"
            assert abs(error) < TOLERANCE, f"{said}: replay is {error:+.3%} from the trace of {truth} bytes"


@pytest.mark.parametrize("family", ["olmo2", "exaone4", "gemma"])
def test_a_batch_without_gradients_has_its_peak_in_a_norm_where_mlps_are_narrow(family: str) -> None:
    """Olmo's norm holds what it multiplies with its weight until it has cast the product: 4 bytes an element more."""
    config = {**random_config(family, 0), "vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 512}
    setup = Setup(method="full", precision="bf16", optimizer="adamw", master_weights=True, sequence_length=2000)
    truth, = traced_peaks(config, "full", [Case(2000, evaluated=True)])
    error = evaluation_batch(from_config(config, family), setup, in_place=False).peak / truth - 1
    assert abs(error) < TOLERANCE, f"replay is {error:+.3%} from the trace of {truth} bytes"


def test_a_number_of_each_token_that_queries_are_multiplied_with_is_kept() -> None:
    """Two bytes: too few for the tolerance of the others."""
    narrow = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 16}
    config = {**random_config("ministral3", 0), **narrow, "num_key_value_heads": 1, "head_dim": 128}
    cases = [Case(2000), Case(2000, "full")]
    for case, truth in zip(cases, traced_peaks(config, "full", cases), strict=True):
        setup = Setup(
            method="full", precision="bf16", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
            sequence_length=case.tokens,
        )
        replayed = training_step(from_config(config, "ministral3"), setup, in_place=False).peak
        assert replayed == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_of_starcoder_is_near_a_trace_and_not_below(dropout: float) -> None:
    """Its LayerNorms keep less than Llama's norms; dropout of layers' results takes as much."""
    config = {**random_config("arcee", 0), "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh"}
    config |= {"residual_dropout": dropout, "embedding_dropout": dropout}
    cases = [Case(3000), Case(3000, "full")]
    for case, truth in zip(cases, traced_peaks(config, "lora", cases), strict=True):
        setup = Setup(
            method="lora", precision="bf16", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
            sequence_length=case.tokens,
        )
        replayed = training_step(from_config(config, "starcoder2"), setup, in_place=False).peak
        assert 0.995 < replayed / truth < 1.1, f"{case}: {replayed / truth:.3f}"


@pytest.mark.parametrize(("method", "documents"), [("lora", 1), ("lora", 8), ("full", 8)])
def test_kto_of_labelled_answers_takes_what_pairs_are_planned_with(method, documents, monkeypatch) -> None:
    """However many answers share the row, and whatever their labels: what is planned are tokens."""

    def labelled(ids, labels, *_, reference) -> MicroBatch:
        positions = torch.arange(ids.shape[1]) % -(-ids.shape[1] // documents)
        known = None if reference is None else torch.zeros(documents, 2)
        return MicroBatch(ids, labels, positions[None], torch.arange(documents) % 2 == 0, known)

    monkeypatch.setattr(trace, "MicroBatch", labelled)
    config = random_config("llama", 0)
    cases = [replace(case, objective="kto") for case in PAIRS]
    for case, truth in zip(cases, traced_peaks(config, method, cases), strict=True):
        setup = Setup(
            method=method, precision="bf16", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
            sequence_length=case.tokens, objective="kto", gradient_accumulation_steps=2 if case.accumulated else 1,
        )
        replay = evaluation_batch if case.evaluated else training_step
        assert abs(replay(from_config(config, "llama"), setup, in_place=False).peak / truth - 1) < TOLERANCE


def test_several_hundred_combinations_are_checked() -> None:
    count = sum(len(cases) for pair in PAIRED for *_, cases in CHECKS[pair.values[1]])
    page = (Path(__file__).parents[2] / "docs/preflight.md").read_text(encoding="utf-8")
    assert count >= 450 and f"{count} combinations" in page


def test_chunks_of_the_loss_count_every_token_and_a_long_row_takes_no_longer() -> None:
    assert [sum(tokens * times for tokens, times in chunks(rows)) for rows in (1, 1024, 5000)] == [1, 1024, 5000]
    assert len(chunks(10**8)) == 3


def test_gradients_that_meet_are_added_in_place_unless_a_trace_is_replayed() -> None:
    shape = from_config(random_config("llama", 0), "llama")
    setup = Setup(method="full", precision="bf16", optimizer="adamw", master_weights=True, checkpointing="full")
    kernels = training_step(shape, setup).work.kernels
    assert training_step(shape, setup, in_place=False).work.kernels == kernels > 0
    tape = Tape()
    two = [tape.alloc(100), tape.alloc(100)]
    kept = two[0]
    assert tape._sum(two) is two[1] and tape.live == 200  # the first is held elsewhere, the second is not
    del kept
    assert tape._sum(two) is two[0]
    assert Tape(in_place=False)._sum(two) not in two


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "full"), ("llama", "lora"), ("llama", "qlora"),
     *(pytest.param("gemma2", method, marks=pytest.mark.slow) for method in ("full", "qlora"))],
)
def test_inputs_in_host_memory_and_mlps_by_pieces_are_replayed(family: str, method: str, monkeypatch) -> None:
    monkeypatch.setattr(recompute, "MLP_TOKENS", 512)
    monkeypatch.setattr(blocks, "MLP_TOKENS", 512)
    config = {**random_config(family, 1), "vocab_size": 1000}
    shape = from_config(config, family)
    cases = [Case(500, "offload"), Case(3000, "offload"), Case(3000, "offload", accumulated=True)]
    for case, truth in zip(cases, traced_peaks(config, method, cases), strict=True):
        setup = Setup(
            method=method, precision="bf16", optimizer="adamw", master_weights=True, checkpointing="offload",
            sequence_length=case.tokens, gradient_accumulation_steps=2 if case.accumulated else 1,
        )
        training_step.cache_clear()
        error = training_step(shape, setup, in_place=False).peak / truth - 1
        assert abs(error) < TOLERANCE, f"{case}: replay is {error:+.3%} from the trace of {truth} bytes"
    training_step.cache_clear()


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma3_text", pytest.param("gemma2", marks=pytest.mark.slow)]
)
def test_training_in_fp8_is_replayed_as_torchao_does_it(family: str) -> None:
    config = random_config(family, 1)
    cases = [Case(512), Case(3008), Case(3008, accumulated=True), Case(3008, "full"), Case(3008, "selective")]
    shape = from_config(config, family)
    for case, truth in zip(cases, traced_peaks(config, "full", cases, precision="fp8"), strict=True):
        setup = Setup(
            method="full", precision="fp8", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
            sequence_length=case.tokens, gradient_accumulation_steps=2 if case.accumulated else 1,
        )
        error = training_step(shape, setup, in_place=False).peak / truth - 1
        assert abs(error) < TOLERANCE, f"{config} {case}: replay is {error:+.3%} from the trace of {truth} bytes"
