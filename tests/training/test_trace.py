"""plan.trace: the engine's own step on the meta device beside the preflight's replay of it, or in its place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, LoraConfig, ModelConfig, PlanConfig
from loadmaster.errors import ConfigError
from loadmaster.pipeline import planned
from loadmaster.preflight import make_plan
from loadmaster.training.trace import trace_plan

ONE_B = ModelConfig(name="meta-llama/Llama-3.2-1B")
# Qwen1.5-MoE-A2.7B's sizes with two layers: four shared experts beside sixty, which no closed form here has.
SHARED_EXPERTS = {
    "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
    "num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
}
TOP = 2 * 151936 * 2048 + 2048
PARAMETERS = TOP + 2 * (14_315_784_192 - TOP) // 24
"""The whole model of 24 layers has 14,315,784,192."""


def test_a_trace_of_the_chosen_plan_stands_beside_its_replay() -> None:
    job = Job(model=ONE_B, method="lora", hardware=HardwareConfig(gpu="rtx4090"), lora=LoraConfig(dropout=0.1))
    plan = make_plan(job)
    found = trace_plan(job, plan)
    assert found["traced_gib"] > 1 and abs(found["difference"]) < 0.001
    assert (found["parameters"], found["trainable_parameters"]) == (1_235_814_400, plan.model.trainable_parameters)
    in_fp32 = trace_plan(job, replace(plan, precision="fp32"))
    assert in_fp32["traced_gib"] > 1.5 * found["traced_gib"] and abs(in_fp32["difference"]) < 0.001
    assert plan.compile and found["of"].endswith("(besides weights and states; layers not compiled, which keep more)")
    whole = trace_plan(job, replace(plan, sharding="fsdp", compile=False))["of"]
    assert "whole weights" in whole and "compiled" not in whole


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_last_token_of_each_row_predicts_nothing(objective) -> None:
    job = Job(
        model=ONE_B, method="lora", sequence_length=128, micro_batch_size=8, batch=BatchConfig(global_size=8),
        hardware=HardwareConfig(gpu="rtx4090"), objective=objective,
    )
    assert abs(trace_plan(job, make_plan(job))["difference"]) < 0.001


def folder(tmp_path, **changed) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps({**SHARED_EXPERTS, **changed}))
    return ModelConfig(name="other", path=str(tmp_path))


def test_a_model_whose_rotation_depends_on_how_long_documents_are_is_traced(tmp_path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 1024}
    rope |= {"short_factor": [1.0] * 48, "long_factor": [3.0] * 48}
    sizes = {"hidden_size": 768, "num_attention_heads": 8, "num_hidden_layers": 3, "intermediate_size": 2048}
    config = {"model_type": "phi3", **sizes, "rope_parameters": rope, "pad_token_id": 0, "bos_token_id": 1}
    config |= {"max_position_embeddings": 8192, "original_max_position_embeddings": 1024, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(name="other", path=str(tmp_path))
    job = Job(model=model, method="lora", sequence_length=2048, hardware=HardwareConfig(gpu="rtx4090"))
    assert abs(trace_plan(job, make_plan(job))["difference"]) < 0.001


def test_a_family_without_a_closed_form_is_planned_from_its_trace(tmp_path) -> None:
    job = Job(
        model=folder(tmp_path), method="lora", lora=LoraConfig(targets=["q_proj", "v_proj"]),
        hardware=HardwareConfig(gpu="rtx4090"), plan=PlanConfig(trace=True),
    )
    with pytest.raises(ConfigError, match=r"shared experts.*\n?.*plan\.trace=true"):
        make_plan(replace(job, plan=PlanConfig()))
    plan = planned(job)
    assert plan.fits and plan.model.parameters == PARAMETERS and "traced" in plan.model.estimate
    assert plan.memory_gib.weights == pytest.approx(2 * (PARAMETERS + 2 * 2 * 16 * 4096) / 2**30, abs=0.001)
    assert plan.memory_gib.total == pytest.approx(
        plan.memory_gib.weights + plan.memory_gib.gradients + plan.memory_gib.optimizer
        + plan.memory_gib.activations + plan.memory_gib.context, abs=0.001,
    )
    assert plan.tokens_per_second is None  # how many of its weights a token meets is not known here


def test_a_traced_plan_gets_smaller_until_it_fits(tmp_path) -> None:
    job = Job(
        model=folder(tmp_path, num_hidden_layers=10), method="lora", lora=LoraConfig(targets=["q_proj", "v_proj"]),
        hardware=HardwareConfig(gpu="rtx4090"), plan=PlanConfig(trace=True), micro_batch_size=1, compile=False,
    )
    needs = make_plan(job).memory_gib.total
    tight = replace(job, plan=PlanConfig(trace=True, reserve=1 - 1.02 * needs / 23.52))
    counted, plan = make_plan(tight), planned(tight)
    assert counted.fits and counted.activation_checkpointing == "none"
    assert plan.fits and plan.activation_checkpointing == "full"
    assert plan.memory_gib.total <= plan.budget_gib == counted.budget_gib


def test_a_model_that_transformers_does_not_know_is_refused_with_a_remedy(tmp_path) -> None:
    job = Job(model=folder(tmp_path, model_type="no_such_family"), method="lora", plan=PlanConfig(trace=True),
              hardware=HardwareConfig(gpu="rtx4090"), lora=LoraConfig(targets=["q_proj"]))
    with pytest.raises(ConfigError, match=r"no_such_family.*cannot be traced"):
        planned(job)
