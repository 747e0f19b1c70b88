"""Every phase of a run by component: what each holds, and which numbers of the engine they rest on."""

from __future__ import annotations

import dataclasses

import pytest

from loadmaster import evaluation
from loadmaster.config.schema import BatchConfig, EvaluationConfig, ExportConfig, HardwareConfig, Job, ModelConfig
from loadmaster.export import candidates, verify
from loadmaster.preflight import make_plan, phases
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.memory import host_bytes
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.search import fixed
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import find_shape

GIB = 2**30
EIGHT = ModelConfig(name="meta-llama/Llama-3.1-8B")
BF16 = 2 * 8_030_261_248 / GIB


def plan(method: str, count: int = 1, formats: tuple[str, ...] = ("bf16",), **fields) -> Plan:
    return make_plan(
        Job(model=fields.pop("model", EIGHT), method=method, hardware=HardwareConfig(gpu="h100_80gb", count=count),
            batch=BatchConfig(global_size=64), export=ExportConfig(formats=list(formats)), **fields)
    )  # fmt: skip


def test_phases_come_in_the_order_of_a_run_and_their_components_add_up() -> None:
    made = plan("lora")
    assert list(made.phase_components_gib) == [
        "load", "first_step", "steady_step", "evaluate", "save", "resume", "merge", "quantize", "verify"
    ]  # fmt: skip
    for name, parts in made.phase_components_gib.items():
        total = getattr(made.phases_gib, name)
        each = [getattr(parts, f.name) for f in dataclasses.fields(parts) if f.name != "total"]
        assert sum(each) == pytest.approx(total, abs=0.001) and parts.total == total
    assert made.phases_gib.train == made.phases_gib.steady_step == made.memory_gib.total
    assert made.phases_gib.export == made.phases_gib.verify


def test_the_first_step_has_masters_and_no_moments() -> None:
    made = plan("lora", micro_batch_size=1)
    trained = made.model.trainable_parameters
    difference = made.phases_gib.steady_step - made.phases_gib.first_step
    assert difference == pytest.approx(8 * trained / GIB, abs=0.001)  # two fp32 moments
    assert made.phase_components_gib["first_step"].optimizer == pytest.approx(4 * trained / GIB, abs=0.001)


def test_between_steps_there_are_weights_and_states_and_nothing_else() -> None:
    made = plan("full", 8)
    save = made.phase_components_gib["save"]
    assert save == made.phase_components_gib["resume"]
    assert save.weights == pytest.approx(BF16 / 8, rel=0.01) and save.gradients == save.activations == 0
    assert save.optimizer == made.memory_gib.optimizer > 0


def test_quantized_bases_need_a_matrix_in_two_widths_while_they_load() -> None:
    loading = plan("qlora").phase_components_gib["load"]
    assert loading.quantization == pytest.approx(6 * 4096 * 14336 / GIB, abs=0.001)
    assert plan("lora", precision="bf16").phase_components_gib["load"].quantization == 0


def test_a_merge_takes_no_gpu_and_calibration_one_layer_of_it() -> None:
    none, gptq, awq = (plan("lora", formats=(name,)).phase_components_gib for name in ("fp8", "int4_gptq", "int4_awq"))
    assert none["merge"].total == none["quantize"].total == none["merge"].context
    layer = 2 * (8_030_261_248 - 2 * 128256 * 4096) / 32 / GIB
    assert gptq["quantize"].weights == pytest.approx(layer, rel=0.001)
    hessians = 4 * (5 * 4096**2 + 4096**2 + 14336**2) / GIB  # q, k, v, gate, up; o; down
    assert gptq["quantize"].quantization - awq["quantize"].quantization == pytest.approx(hessians, abs=0.001)


def test_exports_are_verified_whole_on_one_gpu_and_a_plan_says_when_that_does_not_fit() -> None:
    small = plan("lora")
    assert small.phase_components_gib["verify"].weights == pytest.approx(BF16, rel=0.02)
    assert not any("export will not pass" in reason for reason in small.reasons)
    large = plan("qlora", 8, model=ModelConfig(name="meta-llama/Llama-3.1-70B"))
    assert large.fits and large.phases_gib.verify > 131 > large.budget_gib
    said = [reason for reason in large.reasons if "export will not pass" in reason]
    assert said and "stop_after=evaluate" in said[0]


def test_answers_need_a_cache_where_the_job_has_a_task() -> None:
    with_task = plan("lora", evaluation=EvaluationConfig(task="json_fields"), activation_checkpointing="full")
    without = plan("lora", activation_checkpointing="full")
    assert with_task.phase_components_gib["verify"].activations > without.phase_components_gib["verify"].activations


def test_disk_holds_base_checkpoints_and_every_export_with_what_it_is_made_from() -> None:
    bf16, several = plan("lora"), plan("lora", formats=("bf16", "fp8", "int4"))
    fp8 = (8_030_261_248 - 2 * 128256 * 4096) + 2 * 2 * 128256 * 4096
    int4 = fp8 - (8 - 4.125) / 8 * (8_030_261_248 - 2 * 128256 * 4096)
    assert several.disk_gib - bf16.disk_gib == pytest.approx((fp8 + 2 * int4) / GIB, rel=0.01)
    one = plan("lora", checkpoint=dataclasses.replace(Job().checkpoint, keep_last=1))
    each = (2 + 12) * bf16.model.trainable_parameters / GIB
    assert bf16.disk_gib - one.disk_gib == pytest.approx(each, abs=0.02)
    assert plan("qlora").disk_gib > bf16.disk_gib + 0.9 * BF16  # both merges


def test_the_host_holds_the_rehearsals_copy_of_what_is_trained() -> None:
    shape, machine = find_shape(EIGHT), from_catalog("h100_80gb", 1)
    job = Job(model=EIGHT, method="full")
    light = Setup(
        method="full", precision="bf16", optimizer="adamw_8bit", master_weights=False, **fixed(job, machine, "none")
    )
    assert host_bytes(shape, light) - 3 * GIB == pytest.approx(2 * shape.parameters, rel=0.001)


def test_numbers_of_other_rooms_are_theirs() -> None:
    assert phases.REFERENCE_BYTES == verify.REFERENCE_BYTES
    assert phases.ANSWERS_AT_A_TIME == evaluation.AUTO_BATCH_SIZE
    calibrated = {name for name, made in candidates.CANDIDATES.items() if set(made) & set(candidates.CALIBRATED)}
    assert set(phases.CALIBRATED) == calibrated and set(phases.EXPORT_BITS) == set(candidates.CANDIDATES)
