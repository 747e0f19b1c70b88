"""The memory model equals traces of the real engine within 0.1%, for every family, method and setting."""

from __future__ import annotations

import random

import pytest

from loadmaster.models import loss, recompute
from loadmaster.preflight import blocks
from loadmaster.preflight.frozen import WIDE
from loadmaster.preflight.layers import LOSS_CHUNK_TOKENS
from loadmaster.preflight.replay import Tape
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import from_config
from loadmaster.preflight.step import training_step
from loadmaster.training.trace import Case, traced_peaks

TOLERANCE = 0.001
FAMILIES = {
    "llama": {},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "phi3 partial": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma3_text": {"sliding_window": 512},
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
]
CHECKED: list[float] = []


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


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_a_trace_of_the_engine(family: str, method: str) -> None:
    precision = "fp8" if method == "fp8" else "bf16"
    method = "lora" if method == "fp8" else method
    for seed in range(2 if precision == "bf16" else 1):
        config = random_config(family, seed)
        rank = random.Random(seed).choice([8, 16, 64])
        experts = family in ("mixtral", "qwen3_moe")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if experts else "all-linear"
        shape = from_config(config, family)
        traced = traced_peaks(config, method, CASES, rank, targets, precision)
        for case, truth in zip(CASES, traced, strict=True):
            setup = Setup(
                method=method,
                precision=precision,
                optimizer="adamw",
                master_weights=True,
                checkpointing=case.checkpointing,
                sequence_length=case.tokens,
                lora_rank=rank,
                lora_targets=targets if isinstance(targets, str) else tuple(targets),
                gradient_accumulation_steps=2 if case.accumulated else 1,
            )
            error = training_step(shape, setup, in_place=False).peak / truth - 1
            CHECKED.append(abs(error))
            assert abs(error) < TOLERANCE, f"{config} {case}: replay is {error:+.3%} from the trace of {truth} bytes"


def test_several_hundred_combinations_were_checked() -> None:
    if len(CHECKED) != (2 * 3 + 1) * len(CASES) * len(FAMILIES):
        pytest.fail(f"only {len(CHECKED)} combinations were checked; run this file as a whole")
    assert len(CHECKED) == 420
    assert max(CHECKED) < TOLERANCE


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


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_inputs_in_host_memory_and_mlps_by_pieces_are_replayed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "MLP_TOKENS", 512)
    monkeypatch.setattr(blocks, "MLP_TOKENS", 512)
    config = {**random_config("llama", 0), "vocab_size": 1000}
    shape = from_config(config, "llama")
    cases = [Case(500, "offload"), Case(3000, "offload"), Case(3000, "offload", accumulated=True)]
    for case, truth in zip(cases, traced_peaks(config, method, cases), strict=True):
        setup = Setup(
            method=method, precision="bf16", optimizer="adamw", master_weights=True, checkpointing="offload",
            sequence_length=case.tokens, gradient_accumulation_steps=2 if case.accumulated else 1,
        )  # fmt: skip
        training_step.cache_clear()
        error = training_step(shape, setup, in_place=False).peak / truth - 1
        # Gradients of pieces that meet those of an earlier micro-batch are counted once too often.
        allowed = 0.05 if case.accumulated else TOLERANCE
        assert -TOLERANCE < error < allowed, f"{case}: replay is {error:+.3%} from the trace of {truth} bytes"
    training_step.cache_clear()


def test_the_engines_numbers_are_the_preflights() -> None:
    assert blocks.MLP_TOKENS == recompute.MLP_TOKENS
    assert LOSS_CHUNK_TOKENS == loss.CHUNK_TOKENS
    assert WIDE == recompute.WIDE


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_training_in_fp8_is_replayed_as_torchao_does_it(family: str) -> None:
    config = random_config(family, 0)
    cases = [Case(512), Case(3008), Case(3008, accumulated=True), Case(3008, "full"), Case(3008, "selective")]
    shape = from_config(config, family)
    for case, truth in zip(cases, traced_peaks(config, "full", cases, precision="fp8"), strict=True):
        setup = Setup(
            method="full", precision="fp8", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
            sequence_length=case.tokens, gradient_accumulation_steps=2 if case.accumulated else 1,
        )  # fmt: skip
        error = training_step(shape, setup, in_place=False).peak / truth - 1
        allowed = 0.01 if case.checkpointing == "selective" else TOLERANCE
        assert -TOLERANCE < error < allowed, f"{config} {case}: replay is {error:+.3%} from the trace of {truth} bytes"
