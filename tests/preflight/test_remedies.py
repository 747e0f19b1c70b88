"""What a plan that does not fit says would do: in words that do it, typed as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.compose import compose
from loadmaster.preflight import alternatives, make_plan
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.hardware import find_hardware
from loadmaster.preflight.refusals import refuse
from loadmaster.preflight.search import search

PLAN = ["data=file", "data.path=owner/dataset", "stop_after=plan"]
MIXTURE = [*PLAN, "recipe=lora_8b", "model.name=Qwen/Qwen3-30B-A3B", "hardware=h100_80gb_x1"]


def test_two_settings_that_are_both_too_large_are_both_left_open() -> None:
    job = compose([*PLAN, "recipe=lora_8b", "hardware=rtx4090_x1", "micro_batch_size=16", "sequence_length=16384",
                   "activation_checkpointing=none"]).job
    plan = make_plan(job)
    assert not plan.fits
    assert plan.alternatives[0]["change"] == "micro_batch_size=auto activation_checkpointing=auto"


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=full_8b", "precision=fp8", "hardware=rtx4090_x1"],  # fp8 stays written beside method=qlora
        ["recipe=full_8b", "optimizer.name=adamw", "optimizer.master_weights=true", "hardware=a100_80gb_x1"],
        ["recipe=lora_8b", "hardware=rtx4090_x1", "micro_batch_size=16", "sequence_length=16384",
         "activation_checkpointing=none"],
        MIXTURE[len(PLAN) :],
    ],
)
def test_settings_that_would_fit_do_so_when_they_are_typed(words: list[str]) -> None:
    refused = make_plan(compose([*PLAN, *words]).job)
    here = [a for a in refused.alternatives if a["change"] and "=" in a["change"].split()[0]]
    assert not refused.fits and here
    for alternative in here:
        typed = make_plan(compose([*PLAN, *words, *alternative["change"].split()]).job, with_alternatives=False)
        assert typed.fits, alternative["change"]


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=qlora_8b", "hardware=rtx4090_x1", "sequence_length=262144", "micro_batch_size=8", "compile=false"],
        ["recipe=lora_8b", "model.name=Qwen/Qwen3-30B-A3B", "hardware.gpu=rtx3090", "hardware.count=8", "sharding=ddp"],
        ["recipe=lora_8b", "model.name=meta-llama/Llama-3.1-405B", "hardware.gpu=a10g", "hardware.count=4",
         "micro_batch_size=16", "sharding=fsdp", "batch.global_size=64", "precision=bf16"],
        ["recipe=lora_8b", "model.name=meta-llama/Llama-3.1-405B", "hardware.gpu=h100_80gb", "hardware.count=1",
         "lora.dora=true", "sharding=none"],
        # Nothing is written that could be left open: shorter rows on another machine.
        ["recipe=auto", "model.name=meta-llama/Llama-3.1-405B", "hardware=rtx4090_x1", "sequence_length=131072"],
    ],
)
def test_where_no_one_change_does_several_together_do(words: list[str]) -> None:
    refused = make_plan(compose([*PLAN, *words]).job)
    assert not refused.fits and refused.alternatives
    for alternative in refused.alternatives[:2]:
        machine, _, changes = alternative["change"].rpartition(" with ")
        gpu, count = alternative["gpu"], alternative["hardware"].removesuffix(f"x {alternative['gpu']}")
        typed = [*words, f"hardware.gpu={gpu}", f"hardware.count={count}"] if machine else words
        assert make_plan(compose([*PLAN, *typed, *changes.split()]).job, with_alternatives=False).fits, alternative


def test_rows_on_another_machine_are_no_longer_than_the_model_knows() -> None:
    words = ["recipe=lora_8b", "hardware=cpu", "precision=auto", "sequence_length=2000000"]
    found = make_plan(compose([*PLAN, *words]).job).alternatives
    assert found and all("sequence_length=124992" in each["change"] for each in found)


@pytest.mark.parametrize("more", [[], ["method=auto", "plan.methods=[lora]"]])
def test_what_dora_alone_keeps_whole_on_each_gpu_is_sharded_without_it(more: list[str]) -> None:
    words = ["recipe=lora_8b", "model=llama3_1_70b", "hardware=h100_80gb_x8", "lora.dora=true", *more]
    refused = make_plan(compose([*PLAN, *words]).job)
    assert not refused.fits and refused.alternatives[0]["change"] == "lora.dora=false"
    assert make_plan(compose([*PLAN, *words, "lora.dora=false"]).job, with_alternatives=False).fits


@pytest.mark.parametrize("more", ["optimizer.max_grad_norm=0", "activation_checkpointing=offload"])
@pytest.mark.parametrize("gpu, count", [("a100_80gb", 4), ("h100_80gb", 4), ("l40s", 2), ("rtx4090", 2)])
@pytest.mark.parametrize("recipe", ["full_8b", "full_70b", "qlora_70b"])
def test_what_a_quick_search_finds_a_full_one_finds_and_the_other_way_round(recipe, gpu, count, more) -> None:
    job = compose([*PLAN, f"recipe={recipe}", f"hardware.gpu={gpu}", f"hardware.count={count}", more]).job
    shape, hardware = find_shape(job.model), find_hardware(job.hardware)
    full, quick = (search(job, shape, hardware, explain).best for explain in (True, False))
    assert (full is None) == (quick is None)
    if full is not None:
        assert (full.setup.method, full.setup.optimizer) == (quick.setup.method, quick.setup.optimizer)


def test_of_a_mixture_of_experts_full_alone_is_left_to_method_auto_and_that_is_said() -> None:
    plan = make_plan(compose([*MIXTURE, "method=auto", "hardware=h100_80gb_x8"]).job)
    assert plan.fits and plan.method == "full"
    assert any("lora.targets=[q_proj,k_proj,v_proj,o_proj] lets lora and qlora compete" in r for r in plan.reasons)
    small = make_plan(compose([*MIXTURE, "method=auto"]).job)
    assert not small.fits and "mixture of experts" in " ".join(small.reasons)
    assert small.alternatives[0]["change"] == "lora.targets=[q_proj,k_proj,v_proj,o_proj]"


@pytest.mark.parametrize(("packing", "works"), [("true", ", or method=full"), ("false", "")])
def test_of_a_mixture_of_experts_no_reference_is_left_to_a_preference_over_rows_that_are_not_packed(packing, works):
    words = [*MIXTURE, "objective=kto", "data.format=preference", f"data.packing={packing}"]
    plan = make_plan(compose(words).job, with_alternatives=False)
    assert plan.refusal and plan.refusal.endswith(f"use lora.targets=[q_proj,k_proj,v_proj,o_proj]{works}")


@pytest.mark.parametrize(("hardware", "refused"), [("h100_80gb_x1", True), ("cpu", False)])
def test_experts_whose_rows_no_product_takes_are_refused(hardware, refused) -> None:
    """In bf16 12 values are 24 bytes; in fp32, on a CPU, they are three times 16."""
    job = compose([*MIXTURE, "precision=auto", f"hardware={hardware}", "lora.targets=[q_proj]"]).job
    shape = replace(find_shape(job.model), expert_size=12)
    said = " ".join(map(str, refuse(job, shape, find_hardware(job.hardware))))
    assert ("has experts of 2048 x 12" in said) == refused


@pytest.mark.parametrize(("words", "field"), [
    (["precision=fp32"], "precision"),
    (["checkpointed_layers=99", "activation_checkpointing=full"], "checkpointed_layers"),
    (["sharding=fsdp"], "sharding"),
    (["offload=all"], "offload"),
    (["batch.global_size=7", "hardware.count=2"], "batch.global_size"),
    (["micro_batch_size=3"], "micro_batch_size"),
    (["optimizer.in_backward=true", "optimizer.max_grad_norm=0", "micro_batch_size=2"], "optimizer.in_backward"),
    (["model.name=Qwen/Qwen3-30B-A3B", "lora.targets=all-linear"], "lora.targets"),
])
def test_a_refusal_says_of_which_field_it_is_and_where_that_was_set(words, field) -> None:
    composed = compose([*PLAN, "recipe=lora_8b", "hardware=h100_80gb_x1", *words])
    refused = make_plan(composed.job, with_alternatives=False).refused
    begins = f"{field}={refused['value']}"
    assert refused["field"] == field and refused["reason"].startswith(begins)
    assert composed.sourced(refused) == refused["reason"]  # typed
    of_a_file = replace(composed, origins=composed.origins | {field: "recipes/mine.yaml:7"})
    said = refused["reason"].replace(begins, f"{begins} (recipes/mine.yaml:7)", 1)
    assert of_a_file.sourced(refused) == said
    assert of_a_file.sourced({"plan": "", "reason": "of no field"}) == "of no field"


def test_another_machine_is_said_to_be_as_fast_as_it_is_planned_to_be_there() -> None:
    words = [*PLAN, "recipe=lora_8b"]
    refused = make_plan(compose([*words, "hardware=cpu"]).job)
    (said,) = (a for a in refused.alternatives if a["change"] == "1x h100_80gb")
    there = make_plan(compose([*words, "hardware=h100_80gb_x1"]).job, with_alternatives=False)
    assert there.precision == "fp8" and said["plan"].startswith("lora, fp8, ")
    assert said["tokens_per_second"] == pytest.approx(there.tokens_per_second, rel=0.02)


@pytest.mark.parametrize("more", [[], ["max_steps=2000"], ["plan.prices_usd_per_hour={h200: 0.1}"]])
def test_machines_that_are_passed_over_untried_cost_more(more: list[str], monkeypatch) -> None:
    """Of each GPU the cheapest is named, whether the dollars of the run are known or only those of an hour."""
    job = compose([*PLAN, "recipe=full_70b", "hardware=a100_80gb_x4", "offload=none", *more]).job
    named = make_plan(job).alternatives
    monkeypatch.setattr(alternatives, "_least_price", lambda *_: (0.0, 0.0))  # all are tried
    assert named == make_plan(job).alternatives and "h200" in {each["gpu"] for each in named}
