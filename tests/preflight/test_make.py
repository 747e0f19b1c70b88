"""Can I train X on Y? The plans that must come out right, and why; docs/can-i-train-x-on-y.md prints the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.config.schema import (
    BatchConfig,
    EvaluationConfig,
    ExportConfig,
    HardwareConfig,
    Job,
    LaunchConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
)
from loadmaster.preflight import make_plan
from loadmaster.preflight.batch import divisors
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.memory import memory
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import training_step

LLAMA = "meta-llama/Llama-3.1-"
RECIPES = Path(__file__).parents[2] / "recipes"
LORA = Setup(method="lora", precision="bf16", optimizer="adamw", master_weights=True, checkpointing="full")


def job(model: str, method: str, gpu: str, count: int = 1, nodes: int = 1, **fields) -> Job:
    master_weights = fields.pop("master_weights", "auto")
    optimizer = OptimizerConfig(name=fields.pop("optimizer", "auto"), master_weights=master_weights)
    return Job(
        **{
            "model": ModelConfig(name=model),
            "method": method,
            "optimizer": optimizer,
            "sequence_length": 2048,
            "hardware": HardwareConfig(gpu=gpu, count=count, nodes=nodes),
            "batch": BatchConfig(global_size=64),
            "evaluation": EvaluationConfig(),
            "lora": LoraConfig(),
            **fields,
        }
    )


def plan(*args, **fields) -> Plan:
    return make_plan(job(*args, **fields))


def test_full_8b_with_adamw_does_not_fit_an_a100_but_lighter_states_lora_and_qlora_do() -> None:
    refused = plan(LLAMA + "8B", "full", "a100_80gb", optimizer="adamw")
    assert not refused.fits
    # 12 bytes a parameter, 96 GB, before any activation.
    bare = plan(LLAMA + "8B", "full", "a100_80gb", optimizer="adamw", master_weights=False, offload="none")
    states = bare.memory_gib.weights + bare.memory_gib.gradients + bare.memory_gib.optimizer
    assert not bare.fits and states * 2**30 == pytest.approx(12 * 8_030_261_248, rel=1e-3)
    assert plan(LLAMA + "8B", "full", "a100_80gb", optimizer="adamw_8bit").fits
    chosen = plan(LLAMA + "8B", "full", "a100_80gb")
    assert chosen.fits and chosen.optimizer == "adamw_bf16" and "more faithful" in " ".join(chosen.reasons)
    assert plan(LLAMA + "8B", "lora", "a100_80gb").fits and plan(LLAMA + "8B", "qlora", "a100_80gb").fits


def test_the_smallest_cards_are_those_that_the_recipes_name() -> None:
    full, lora = (plan(LLAMA + "8B", "auto", gpu) for gpu in ("a100_40gb", "rtx4090"))
    assert (full.method, full.optimizer, lora.method) == ("full", "adafactor", "lora") and full.fits and lora.fits
    assert "full fine-tuning from 40 GB, by LoRA from 24 GB" in (RECIPES / "auto.yaml").read_text(encoding="utf-8")
    base = plan(LLAMA + "70B", "qlora", "a100_80gb").memory_gib.weights
    assert f"(nf4) takes {base:.0f} GiB" in (RECIPES / "qlora_70b.yaml").read_text(encoding="utf-8")


def test_lora_8b_and_qlora_13b_fit_an_a100() -> None:
    assert plan(LLAMA + "8B", "lora", "a100_80gb").fits
    assert plan("meta-llama/Llama-2-13b-hf", "qlora", "a100_80gb").fits


def test_full_70b_does_not_fit_the_memory_of_four_a100_but_that_of_their_host_with_the_lightest_states() -> None:
    refused = plan(LLAMA + "70B", "full", "a100_80gb", 4, offload="none")
    assert not refused.fits and all(r["needs_gib"] > r["budget_gib"] for r in refused.rejected)
    chosen = plan(LLAMA + "70B", "full", "a100_80gb", 4)
    assert chosen.fits and (chosen.optimizer, chosen.offload) == ("adafactor", "all")
    assert 400 < chosen.host_memory_gib < chosen.hardware.host_memory_gib == 4 * 117
    kept = [r for r in chosen.rejected if "host memory" not in r["plan"]]
    assert kept and all(r["needs_gib"] > r["budget_gib"] for r in kept)
    offloaded = [r for r in chosen.rejected if "weights and optimizer in host memory" in r["plan"]]
    assert [("adamw with" in r["plan"], "adamw_8bit" in r["plan"]) for r in offloaded] == [(True, False), (False, True)]
    assert all(r["host_memory_gib"] > 4 * 117 and "host memory" in r["reason"] for r in offloaded)


@pytest.mark.parametrize(
    "model, gpu, count, states",
    [("8B", "rtx4090", 2, "adamw_8bit"), ("70B", "h100_80gb", 4, "adafactor"), ("70B", "l40s", 8, "adafactor")],
)
def test_what_fits_with_states_that_are_written_fits_where_they_are_left_open(model, gpu, count, states) -> None:
    assert plan(LLAMA + model, "full", gpu, count, optimizer=states).fits
    assert plan(LLAMA + model, "full", gpu, count).fits


def test_full_70b_on_eight_h100_is_decided_by_the_numbers() -> None:
    fits = plan(LLAMA + "70B", "full", "h100_80gb", 8, optimizer="adamw_8bit", offload="none", micro_batch_size=2)
    memory, states = fits.memory_gib, 6.03 * 70_553_706_496 / 8 / 2**30
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(states, 0.02)
    assert fits.fits == (fits.memory_gib.total <= fits.budget_gib)
    assert not plan(LLAMA + "70B", "full", "h100_80gb", 8, optimizer="adamw", offload="none").fits


def test_405b_in_full_does_not_fit_eight_h100_and_says_what_would() -> None:
    refused = plan(LLAMA + "405B", "full", "h100_80gb", 8)
    assert not refused.fits
    nodes = [a for a in refused.alternatives if "nodes of" in a["hardware"]]
    assert nodes and all(a["needs_gib"] <= a["budget_gib"] and a["usd_per_hour"] for a in nodes)
    assert any("h100" in a["hardware"] for a in nodes)


def test_405b_lora_on_a_frozen_fp8_base_fits_eight_h100() -> None:
    assert not plan(LLAMA + "405B", "lora", "h100_80gb", 8, precision="bf16", offload="none").fits
    chosen = plan(LLAMA + "405B", "lora", "h100_80gb", 8, precision="fp8", offload="none")
    assert chosen.fits and chosen.sharding == "fsdp"
    assert chosen.memory_gib.weights * 8 == pytest.approx(410e9 / 2**30, rel=0.02)


def test_qlora_70b_fits_one_a100_and_two_rtx4090_with_fsdp() -> None:
    assert plan(LLAMA + "70B", "qlora", "a100_80gb").fits
    two = plan(LLAMA + "70B", "qlora", "rtx4090", 2)
    assert two.fits and two.sharding == "fsdp" and two.offload == "all"


def test_fp8_is_planned_for_all_but_nf4() -> None:
    for methods, chosen in ((["qlora", "full", "lora"], "full"), (["qlora", "lora"], "lora")):
        found = plan("meta-llama/Llama-3.2-3B", "auto", "h100_80gb", precision="fp8", plan=PlanConfig(methods=methods))
        assert (found.method, found.precision) == (chosen, "fp8") and found.fits
    without = plan(LLAMA + "8B", "auto", "h100_80gb", precision="fp8", plan=PlanConfig(methods=["qlora"]))
    assert not without.fits and "plan.methods" in without.rejected[0]["reason"]


def test_auto_takes_fp8_only_where_it_is_predicted_to_win() -> None:
    for model, gpu, count in (
        ("8B", "h100_80gb", 1),
        ("70B", "h100_80gb", 8),
        ("8B", "l40s", 1),
        ("8B", "a100_80gb", 1),
    ):
        chosen, bf16 = (plan(LLAMA + model, "lora", gpu, count, precision=p) for p in ("auto", "bf16"))
        fp8 = plan(LLAMA + model, "lora", gpu, count, precision="fp8")
        wins = fp8.fits and (not bf16.fits or fp8.tokens_per_second > bf16.tokens_per_second / 0.98)
        assert chosen.precision == ("fp8" if wins else "bf16"), (model, gpu)
        assert chosen.fits == (bf16.fits or fp8.fits)


def test_adapters_on_every_linear_of_a_mixture_of_experts_are_refused_and_said_not_guessed() -> None:
    refused = plan("mistralai/Mixtral-8x7B-v0.1", "lora", "h100_80gb", 8)
    assert not refused.fits and "q_proj,k_proj,v_proj,o_proj" in refused.rejected[0]["reason"]
    attention = LoraConfig(targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert plan("mistralai/Mixtral-8x7B-v0.1", "lora", "h100_80gb", 8, lora=attention).fits


def test_gemma_2_is_planned_like_gemma_3_with_its_logits_capped_beside_themselves() -> None:
    chosen = plan("google/gemma-2-9b", "lora", "h100_80gb")
    assert chosen.fits and chosen.model.estimate is None
    assert not plan("google/gemma-2-27b", "lora", "l40s", precision="bf16").fits
    assert plan("google/gemma-2-27b", "qlora", "l40s").fits
    capped, bare = (
        training_step(replace(find_shape(ModelConfig(name="google/gemma-2-2b")), logit_softcap=each), LORA)
        for each in (True, False)
    )
    assert capped.at_peak["logits"] - bare.at_peak["logits"] == 4 * 1024 * 256_000


def test_fp8_is_refused_where_the_card_has_none() -> None:
    refused = plan(LLAMA + "8B", "lora", "a100_80gb", precision="fp8")
    assert not refused.fits and "no fp8" in refused.rejected[0]["reason"]
    assert plan(LLAMA + "8B", "lora", "h100_80gb", precision="fp8").fits


def test_what_a_gpus_attention_does_not_take_is_refused_and_not_tried(monkeypatch) -> None:
    """PyTorch's variable-length kernel: "only support fp16 and bf16", "only supports Ampere GPUs or newer"."""
    refused = plan(LLAMA + "8B", "lora", "h100_80gb", precision="fp32")
    assert not refused.fits and "16 bits on a GPU" in refused.refusal
    assert refused.alternatives[0]["change"] == "precision=auto"
    assert plan("google/gemma-2-2b", "lora", "h100_80gb", precision="fp32").fits  # by a kernel of its own
    for name, capability, fits in (("Tesla T4", 7.5, False), ("NVIDIA A30", 8.0, True)):
        monkeypatch.setattr("loadmaster.preflight.hardware.local_gpus", lambda n=name, c=capability: [(n, 24.0, c)])
        found = plan(LLAMA + "8B", "lora", "local")
        assert found.fits is fits and (fits or "has compute capability 7.5" in found.refusal)


def test_an_explicit_micro_batch_that_does_not_fit_is_refused_with_the_number_that_would() -> None:
    refused = plan(LLAMA + "8B", "lora", "h100_80gb", micro_batch_size=16, activation_checkpointing="none")
    assert not refused.fits
    said = refused.rejected[0]["reason"]
    number = int(said.split("micro_batch_size=")[1].split()[0])

    def fits(rows: int) -> bool:
        return plan(
            LLAMA + "8B",
            "lora",
            "h100_80gb",
            micro_batch_size=rows,
            batch=BatchConfig(global_size=2 * rows),
            activation_checkpointing="none",
        ).fits

    assert fits(number) and not fits(number + 1)


def test_a_row_that_is_too_long_is_refused_with_the_length_that_would_fit() -> None:
    refused = plan(LLAMA + "8B", "qlora", "rtx4090", sequence_length=10_000_000)
    assert not refused.fits
    longest = int(refused.rejected[0]["reason"].split("sequence_length=")[1].split()[0])

    def fits(length: int) -> bool:
        return plan(LLAMA + "8B", "qlora", "rtx4090", sequence_length=length).fits

    assert 8192 < longest < 131072 and fits(longest) and not fits(longest + 512)


def test_inputs_in_host_memory_are_compiled_until_mlps_run_by_pieces() -> None:
    def of(tokens: int, rows: int = 1, way: str = "offload", **fields) -> Plan:
        return plan(
            LLAMA + "8B", "qlora", "h100_80gb", activation_checkpointing=way, sequence_length=tokens,
            micro_batch_size=rows, **fields,
        )

    assert of(2048, 2).compile and of(16384).compile and of(2048, 8).compile
    assert not of(2048, 16).compile and not of(16640).compile
    here, there = of(2048, 2, "full"), of(2048, 2)
    kept = here.memory_gib.total - there.memory_gib.total
    assert kept == pytest.approx(30 * 4096 * 2 * 4096 / 2**30, rel=0.1)  # inputs of all layers but one and the next
    assert there.tokens_per_second == here.tokens_per_second
    open_ = plan(
        LLAMA + "8B", "qlora", "h100_80gb", activation_checkpointing="offload", compile=True, sequence_length=4096
    )
    assert open_.compile and open_.micro_batch_size in (1, 2, 4)
    assert any("longest row" in reason and "16,384 tokens" in reason for reason in open_.reasons)


def test_where_inputs_are_what_is_too_much_they_go_to_the_host() -> None:
    """Before anything less faithful is tried: lighter optimizer states, or a plan that does not fit."""
    assert not plan(LLAMA + "70B", "qlora", "l40s", sequence_length=4096, activation_checkpointing="full").fits
    there = plan(LLAMA + "70B", "qlora", "l40s", sequence_length=4096)
    assert there.fits and there.activation_checkpointing == "offload"
    recomputed, there = (
        plan(LLAMA + "70B", "full", "h100_80gb", 8, sequence_length=16384, activation_checkpointing=way)
        for way in ("full", "auto")
    )
    assert (recomputed.optimizer, there.optimizer) == ("adafactor", "adamw_8bit")
    assert there.activation_checkpointing == "offload"
    assert there.tokens_per_second > 0.99 * recomputed.tokens_per_second


def test_hours_are_those_of_rows_that_there_are_and_of_stages_that_run() -> None:
    def hours(rows: int, **fields) -> float:
        batch = BatchConfig(global_size=rows)
        asked = job(LLAMA + "8B", "lora", "a100_80gb", micro_batch_size=1, batch=batch, **fields)
        return make_plan(asked, dataset_tokens=20 * 2048).hours

    assert hours(100_000) == pytest.approx(hours(20), rel=0.01)  # one step of 20 rows
    assert hours(16) == pytest.approx(hours(20), rel=0.05)  # 16 and 4
    assert hours(20, stop_after="train") < hours(20) - 0.01


def test_where_memory_is_all_that_counts_inputs_go_to_the_host() -> None:
    chosen = plan(LLAMA + "8B", "lora", "a100_80gb", sequence_length=16384, plan=PlanConfig(objective="memory"))
    assert chosen.activation_checkpointing == "offload"


def test_weights_in_host_memory_on_one_gpu_are_refused_not_counted_as_nothing() -> None:
    refused = plan(LLAMA + "8B", "lora", "h100_80gb", offload="all")
    assert not refused.fits and "one GPU" in refused.rejected[0]["reason"]


def test_what_is_written_is_kept() -> None:
    chosen = plan(
        LLAMA + "8B",
        "lora",
        "h100_80gb",
        micro_batch_size=2,
        activation_checkpointing="full",
        optimizer="adamw_8bit",
    )
    assert (chosen.micro_batch_size, chosen.activation_checkpointing, chosen.optimizer) == (2, "full", "adamw_8bit")
    assert chosen.micro_batch_size * chosen.gradient_accumulation_steps == 64


def test_a_micro_batch_that_does_not_divide_the_global_batch_is_refused_with_those_that_do() -> None:
    refused = plan(LLAMA + "8B", "lora", "h100_80gb", micro_batch_size=3)
    assert not refused.fits and "1, 2, 4" in refused.rejected[0]["reason"]


def test_auto_prefers_the_most_faithful_method_that_fits() -> None:
    assert plan("meta-llama/Llama-3.2-1B", "auto", "h100_80gb").method == "full"
    to_export = ExportConfig(formats=["adapter", "bf16"])
    assert plan("meta-llama/Llama-3.2-1B", "auto", "h100_80gb", export=to_export).method == "lora"
    chosen = plan(LLAMA + "8B", "auto", "rtx4090")
    assert chosen.method in ("lora", "qlora") and any("more faithful" in reason for reason in chosen.reasons)


def test_a_rate_that_is_left_open_is_that_of_the_method_which_the_plan_took() -> None:
    for gpu, method, rate in (("a100_80gb", "full", 1e-5), ("rtx4090", "lora", 2e-4)):
        plan = make_plan(job(LLAMA + "8B", "auto", gpu))
        assert (plan.method, plan.learning_rate) == (method, rate)
        assert any(f"learning rate {rate:g}" in reason for reason in plan.reasons)


def test_a_rate_for_another_method_is_said() -> None:
    for objective, method, rate, said in (
        ("sft", "full", 2e-4, "20 times"), ("sft", "lora", 1e-5, "1/20 of"), ("sft", "full", 1e-4, None),
        ("dpo", "lora", 2e-4, "40 times"), ("kto", "lora", 5e-5, None), ("kto", "full", 1e-5, "20 times"),
    ):
        written = replace(job(LLAMA + "8B", method, "h200"), objective=objective, optimizer=OptimizerConfig(lr=rate))
        notes = [reason for reason in make_plan(written).reasons if "learning rate" in reason]
        assert [f"is {said} the usual" in note for note in notes] == ([True] if said else [])


def test_a_warm_up_that_the_run_is_too_short_for_is_said() -> None:
    for steps, said in ((40, "rises to 25% of its peak"), (10, "comes to its peak in the last one"), (9, None)):
        written = replace(job(LLAMA + "8B", "lora", "h200"), optimizer=OptimizerConfig(warmup_steps=steps))
        tokens = 10 * written.batch.global_size * written.sequence_length  # ten steps
        notes = [reason for reason in make_plan(written, tokens).reasons if "warmup_steps" in reason]
        assert [said is not None and said in note for note in notes] == ([True] if said else [])


def test_a_limit_of_time_or_money_that_the_run_does_not_keep_is_said() -> None:
    asked = job(LLAMA + "8B", "lora", "h200")
    whole = make_plan(asked, 10**8)
    for limits, said in (
        ({"max_usd": whole.cost_usd / 400}, "launch.max_usd"),
        ({"max_usd": whole.cost_usd + 1}, None),
        ({"max_hours": whole.hours / 400, "max_usd": whole.cost_usd / 2}, "launch.max_hours"),
        ({"max_usd": 1.0, "name": "runpod"}, None),
    ):
        reasons = make_plan(replace(asked, launch=LaunchConfig(**limits)), 10**8).reasons
        told = [reason.partition("=")[0] for reason in reasons if "stops the run after 0% of these" in reason]
        assert told == ([said] if said else []) and len(told) == sum("stops the run" in reason for reason in reasons)


def test_a_limit_that_ends_before_the_first_step_is_said_with_what_would_do() -> None:
    asked = job(LLAMA + "8B", "lora", "h200")
    for limits in ({"max_usd": 0.01}, {"max_hours": 0.01}):
        reasons = make_plan(replace(asked, launch=LaunchConfig(**limits)), 10**8).reasons
        told = next(reason for reason in reasons if "stops the run" in reason)
        assert "before the first step: nothing is saved" in told
        key, _, value = told.split()[-2].partition("=")
        enough = replace(asked, launch=LaunchConfig(**{key.removeprefix("launch."): float(value)}))
        assert any("with a checkpoint: the same command" in reason for reason in make_plan(enough, 10**8).reasons)


def test_a_limit_that_ends_where_the_reference_is_asked_loses_nothing() -> None:
    asked = job(LLAMA + "8B", "full", "h100_80gb", count=8, objective="dpo", launch=LaunchConfig(max_hours=1.0))
    told = next(reason for reason in make_plan(asked, 10**10).reasons if "stops the run" in reason)
    assert told.endswith("with what the model said so far: the same command goes on")


def test_rented_memory_is_used_for_speed() -> None:
    chosen = plan(LLAMA + "8B", "qlora", "h100_80gb")
    saving = plan(LLAMA + "8B", "qlora", "h100_80gb", plan=PlanConfig(objective="memory"))
    assert chosen.activation_checkpointing == "none" and saving.memory_gib.total < chosen.memory_gib.total / 2
    assert chosen.tokens_per_second > 1.2 * saving.tokens_per_second


def test_the_smoke_job_fits_a_cpu_in_fp32() -> None:
    chosen = plan("HuggingFaceTB/SmolLM2-135M-Instruct", "lora", "cpu", sequence_length=512)
    assert chosen.fits and (chosen.precision, chosen.sharding) == ("fp32", "none") and chosen.micro_batch_size <= 4


def test_hours_and_dollars_follow_the_dataset() -> None:
    small, large = (make_plan(job(LLAMA + "8B", "lora", "h100_80gb"), tokens) for tokens in (10**7, 10**9))
    assert large.hours > 50 * small.hours > 0 and large.cost_usd == pytest.approx(large.hours * 3.99, rel=0.01)
    assert small.price["date"] == "2026-11-09" and plan(LLAMA + "8B", "lora", "h100_80gb").hours is None


def test_a_plan_survives_its_json(tmp_path) -> None:
    for made in (plan(LLAMA + "8B", "lora", "h100_80gb"), plan(LLAMA + "405B", "full", "h100_80gb", 8)):
        made.write(tmp_path / "plan.json")
        assert Plan.read(tmp_path / "plan.json").to_dict() == json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize(("method", "replays"), [("full", 85), ("lora", 36)])
def test_the_plan_of_a_405b_over_all_machines_takes_no_torch_and_few_replays(method, replays, tmp_path) -> None:
    """One fits nowhere near, the other on many machines. benchmarks/plan_speed.py measures the time of the command."""
    words = [
        "plan", "recipe=auto", "model.name=meta-llama/Llama-3.1-405B", f"method={method}", "hardware=h100_80gb_x8",
        "sequence_length=4096", "batch.global_size=64", "run_dir=run",
    ]
    code = f"""
import sys
from loadmaster.cli import main
assert main({words}) == {3 if method == "full" else 0}
assert not {{"torch", "transformers", "psutil"}} & set(sys.modules)
from loadmaster.preflight.step import training_step
print("replays", training_step.cache_info().misses)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "h200" in done.stdout  # of the other machines, too
    assert int(done.stdout.split("replays ")[-1]) <= replays  # each takes milliseconds, and is most of what a plan does


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize(("model", "gpus"), [("meta-llama/Llama-3.1-8B", 1), ("meta-llama/Llama-3.1-70B", 8)])
def test_products_in_fp8_need_no_less_than_in_bf16(model, gpus, checkpointing) -> None:
    """By which the search leaves out in FP8 what does not fit in bf16."""
    shape, hardware = find_shape(ModelConfig(name=model)), from_catalog("h100_80gb", gpus)
    for compiled, optimizer, rows in ((True, "adamw", 1), (True, "adafactor", 4), (False, "adamw_8bit", 2)):
        setup = Setup(
            method="full", precision="bf16", optimizer=optimizer, master_weights=False, checkpointing=checkpointing,
            sharding="fsdp" if gpus > 1 else "none", world_size=gpus, gpus_per_node=gpus, compiled=compiled,
            micro_batch_size=rows, kept_layers=5 if checkpointing == "full" else 0,
        )
        plain, fp8 = (memory(shape, hardware, replace(setup, precision=p)) for p in ("bf16", "fp8"))
        assert fp8.needed_gib >= plain.needed_gib and fp8.host_gib >= plain.host_gib


def test_a_preference_objectives_further_passes_cost_time_and_no_memory() -> None:
    sft, dpo, kto = (
        plan(LLAMA + "8B", "lora", "h100_80gb", objective=each, precision="bf16", micro_batch_size=2, compile=False)
        for each in ("sft", "dpo", "kto")
    )  # compiled, the loss of sft alone is
    assert sft.memory_gib == dpo.memory_gib == kto.memory_gib
    assert sft.tokens_per_second > 1.1 * dpo.tokens_per_second > 1.3 * kto.tokens_per_second


def test_where_all_weights_are_trained_the_reference_costs_one_pass_before_the_steps() -> None:
    orpo, dpo, longer = (
        plan(
            LLAMA + "8B", "full", "h200", objective=objective, precision="bf16", micro_batch_size=1, max_steps=steps,
            optimizer="adamw_8bit",
        )
        for objective, steps in (("orpo", 1000), ("dpo", 1000), ("dpo", 2000))
    )
    assert (orpo.memory_gib, orpo.tokens_per_second) == (dpo.memory_gib, dpo.tokens_per_second)
    training_h = longer.hours - dpo.hours
    steps_h = 1000 * 64 * 2048 / dpo.tokens_per_second / 3600
    assert dpo.hours - orpo.hours == pytest.approx(training_h - steps_h, abs=1e-3)
    assert 0.3 < (dpo.hours - orpo.hours) / steps_h < 0.35
    assert any("asked about the answers before the first step, 1 of these hours" in reason for reason in dpo.reasons)


def test_kto_of_all_weights_asks_twice_before_the_steps_and_passes_once_more_in_each() -> None:
    orpo, dpo, kto = (
        plan(
            LLAMA + "8B", "full", "h200", objective=objective, precision="bf16", micro_batch_size=1, max_steps=1000,
            optimizer="adamw_8bit",
        )
        for objective in ("orpo", "dpo", "kto")
    )
    assert kto.memory_gib == dpo.memory_gib
    assert 1.3 < dpo.tokens_per_second / kto.tokens_per_second < 1.35
    none, once, twice = (each.hours - 1000 * 64 * 2048 / each.tokens_per_second / 3600 for each in (orpo, dpo, kto))
    assert twice - none == pytest.approx(2 * (once - none), rel=0.01)


def test_the_rows_a_step_may_have_at_a_time_are_found_at_once_however_many_there_are():
    assert [divisors(number) for number in (1, 9, 12)] == [[1], [1, 3, 9], [1, 2, 3, 4, 6, 12]]
    assert len(divisors(10**12)) == 169
