"""DoRA in the plan: bytes equal traces of the engine, and what it does not go with is not chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError
from loadmaster.preflight.config_json import find_shape, from_config
from loadmaster.preflight.hardware import find_hardware
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.memory import resident
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.speed import micro_batch_seconds
from loadmaster.preflight.step import evaluation_batch, training_step
from loadmaster.training.trace import Case, _meta_model, weight_bytes, with_trained_part
from tests.preflight.test_replay import CASES, TOLERANCE, random_config
from tests.preflight.traced import traced_peaks

FAMILIES = ["llama", "qwen2", "gemma3_text", "phi3"]


def setup_of(case: Case, precision: str = "bf16", **others) -> Setup:
    return Setup(
        method="lora", precision=precision, optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
        sequence_length=case.tokens, objective=case.objective, dora=True,
        gradient_accumulation_steps=2 if case.accumulated else 1, **others,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_a_trace_of_the_engine(family):
    config = random_config(family, 0)
    shape = from_config(config, family)
    for precision, cases in (("bf16", [Case(3000, objective="dpo"), *CASES]), ("fp32", [Case(512)])):
        for case, truth in zip(cases, traced_peaks(config, "lora", cases, precision=precision, dora=True), strict=True):
            replay = evaluation_batch if case.evaluated else training_step
            error = replay(shape, setup_of(case, precision), in_place=False).peak / truth - 1
            assert abs(error) < TOLERANCE, f"{config} {precision} {case}: {error:+.3%} from the trace of {truth} bytes"
    setup = setup_of(cases[0])
    model = with_trained_part(_meta_model(config), setup)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == setup.trainable(shape)
    weights, gradients, _ = resident(shape, setup)
    assert gradients == sum(parameter.nbytes for parameter in trained)
    assert weights == pytest.approx(weight_bytes(model), rel=TOLERANCE)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", pytest.param("gemma2", marks=pytest.mark.slow), "mixtral"])
def test_dropout_is_replayed_as_the_engine_drops(family):
    config = random_config(family, 0)
    shape = from_config(config, family)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family == "mixtral" else "all-linear"
    cases = [Case(3000), Case(3000, "selective"), Case(3000, "full", accumulated=True)]
    cases.append(Case(3000, "full", kept_layers=2))
    for precision in ("bf16", "fp32")[: 1 if family == "mixtral" else 2]:
        traced = traced_peaks(config, "lora", cases, targets=targets, precision=precision, dropout=0.1, dora=True)
        for case, truth in zip(cases, traced, strict=True):
            setup = setup_of(case, precision, lora_dropout=0.1, kept_layers=case.kept_layers,
                             lora_targets=targets if isinstance(targets, str) else tuple(targets))
            error = training_step(shape, setup, in_place=False).peak / truth - 1
            assert abs(error) < TOLERANCE, f"{config} {precision} {case}: {error:+.3%} from the trace of {truth} bytes"


@pytest.mark.parametrize("hardware", ["h100_80gb_x1", "h100_80gb_x8", "rtx4090_x1"])
def test_a_plan_has_neither_few_bits_nor_cut_weights(hardware):
    args = ["recipe=auto", "model=llama3_1_8b", f"hardware={hardware}", "lora.dora=true", "stop_after=plan"]
    plan = make_plan(compose([*args, "plan.methods=[lora,qlora]"]).job)
    assert (plan.method, plan.precision) == ("lora", "bf16") and plan.sharding in ("none", "ddp")
    others = [each["change"] for each in plan.alternatives if "qlora" in each["change"] or "fp8" in each["change"]]
    assert plan.fits or all("lora.dora=false" in change for change in others)


def test_the_norms_of_every_pass_are_in_the_speed():
    job = compose(["model=llama3_1_8b", "hardware=h100_80gb_x1", "stop_after=plan"]).job
    shape, hardware = find_shape(job.model), find_hardware(job.hardware)
    with_norms = setup_of(Case(4096, "full"))
    plain = replace(with_norms, dora=False)
    seconds = [micro_batch_seconds(shape, hardware, each) for each in (with_norms, plain)]
    assert 1.05 < seconds[0] / seconds[1] < 1.5



@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method=lora", "offload=all"], "offload=auto"),
        (["precision=fp8", "plan.methods=[lora,qlora]"], "fp8"),
    ],
)
def test_what_would_cut_or_code_the_weights_is_refused(overrides, says):
    with pytest.raises(ConfigError) as error:
        compose(["recipe=auto", "model=llama3_1_8b", "hardware=h100_80gb_x8", "lora.dora=true", *overrides])
    assert says in str(error.value)


def test_fp8_leaves_full_fine_tuning_alone():
    args = ["recipe=auto", "model=llama3_1_70b", "hardware=h100_80gb_x1", "lora.dora=true", "stop_after=plan"]
    plan = make_plan(compose([*args, "precision=fp8"]).job, with_alternatives=False)
    assert plan.method == "full" and not plan.fits


def test_stepping_in_the_backward_pass_wants_shards_and_dora_none():
    args = ["recipe=lora_8b", "hardware=a100_80gb_x1", "hardware.count=2", "lora.dora=true", "stop_after=plan"]
    more = ["optimizer.in_backward=true", "optimizer.max_grad_norm=0"]
    plan = make_plan(compose([*args, *more]).job, with_alternatives=False)
    assert not plan.fits and "lora.dora" in plan.rejected[-1]["reason"]
