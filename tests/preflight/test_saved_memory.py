"""Modules trained whole beside an adapter: the plan's bytes are those of traces, on one GPU and under fully_shard."""

from __future__ import annotations

import pytest

from loadmaster.errors import ConfigError
from loadmaster.preflight import saved
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.memory import resident, worst_micro_batch
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shards import whole
from loadmaster.preflight.step import training_step
from loadmaster.training.trace import Case, _meta_model, weight_bytes, with_trained_part
from tests.preflight.sharded_trace import sharded_peaks
from tests.preflight.test_replay import TOLERANCE, random_config
from tests.preflight.traced import traced_peaks

EVERYTHING = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
HEAD, EMBEDDING = ("lm_head",), ("embed_tokens",)
CHECKED = [("llama", False, EVERYTHING)]
CHECKED += [
    pytest.param(*each, marks=pytest.mark.slow)
    for each in (("llama", False, HEAD), ("llama", False, EMBEDDING), ("qwen3", False, EVERYTHING),
                 ("gemma3_text", True, HEAD), ("gemma3_text", True, EVERYTHING))
]


def setup_of(case: Case, method: str, names: tuple[str, ...], **others) -> Setup:
    return Setup(
        method=method, precision="bf16", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
        sequence_length=case.tokens, objective=case.objective, modules_to_save=names,
        gradient_accumulation_steps=2 if case.accumulated else 1, **others,
    )


@pytest.mark.parametrize(("family", "tied", "names"), CHECKED)
def test_replay_equals_a_trace_of_the_engine(family, tied, names):
    config = {**random_config(family, 0), "tie_word_embeddings": tied}
    names += ("q_norm",) if family == "qwen3" and names is EVERYTHING else ()
    shape = from_config(config, family)
    lora = [Case(512), Case(3000, accumulated=True), Case(3000, "full"), Case(3000, "selective")]
    for method, cases in (("lora", lora), ("qlora", [Case(3000, objective="dpo"), Case(3000, "full")])):
        for case, truth in zip(cases, traced_peaks(config, method, cases, modules_to_save=names), strict=True):
            error = training_step(shape, setup_of(case, method, names), in_place=False).peak / truth - 1
            assert abs(error) < TOLERANCE, f"{config} {method} {case}: {error:+.3%} from the trace of {truth} bytes"
        setup = setup_of(cases[0], method, names)
        model = with_trained_part(_meta_model(config), setup)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == setup.trainable(shape)
        assert resident(shape, setup)[0] == pytest.approx(weight_bytes(model), rel=TOLERANCE)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_ranks_memory_equals_a_trace_of_fully_shard(tied):
    config = {**random_config("llama", 1), "vocab_size": 1000, "tie_word_embeddings": tied}
    shape = from_config(config, "llama")
    for case, reshard in ((Case(512), True), (Case(512, "full", accumulated=True), True), (Case(3000, "full"), False)):
        setup = setup_of(case, "lora", EVERYTHING, sharding="fsdp", world_size=8, reshard_after_forward=reshard)
        weights, peak = sharded_peaks(
            config, "lora", "bf16", case, 8, reshard_after_forward=reshard, modules_to_save=EVERYTHING
        )
        unit = whole(shape, setup)
        assert unit.shard + unit.replicated == pytest.approx(weights, rel=0.002)
        worst, gradients = worst_micro_batch(shape, setup, in_place=False)
        assert worst.peak + gradients == pytest.approx(peak, rel=TOLERANCE), f"{tied} {case} {reshard}"


def test_an_unknown_module_is_named_with_what_there_is():
    shape = from_config(random_config("qwen3", 0), "qwen3")
    with pytest.raises(ConfigError, match=r"lm_hed, q_proj(.|\n)*embed_tokens, lm_head, norm, (.|\n)*q_norm, k_norm"):
        saved.refuse_unknown(shape, ["lm_head", "lm_hed", "q_proj"])
    saved.refuse_unknown(shape, saved.names(shape))
