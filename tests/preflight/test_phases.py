"""Every phase of a run by component: what each holds, and which numbers of the engine they rest on."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from loadmaster.config.schema import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    HardwareConfig,
    Job,
    ModelConfig,
)
from loadmaster.export import answers, candidates
from loadmaster.preflight import make_plan, print_plan, verification
from loadmaster.preflight.answers import answer_bytes
from loadmaster.preflight.calibration import CALIBRATED
from loadmaster.preflight.candidate import evaluate, fixed
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.disk import EXPORT_BITS, export_bytes
from loadmaster.preflight.explain import about_verification
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.memory import Bytes, backward_and_step_bytes, communicator_bytes, host_bytes
from loadmaster.preflight.phases import answering
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import evaluation_batch
from loadmaster.preflight.verification import can_export, verifying

GIB = 2**30
EIGHT = ModelConfig(name="meta-llama/Llama-3.1-8B")
BF16 = 2 * 8_030_261_248 / GIB


def plan(method: str, count: int = 1, formats: tuple[str, ...] = ("bf16",), **fields) -> Plan:
    return make_plan(
        Job(model=fields.pop("model", EIGHT), method=method, hardware=HardwareConfig(gpu="h100_80gb", count=count),
            batch=BatchConfig(global_size=64), export=ExportConfig(formats=list(formats)), **fields)
    )


def test_phases_come_in_the_order_of_a_run_and_their_components_add_up() -> None:
    made = plan("lora")
    assert list(made.phase_components_gib) == [
        "load", "first_step", "steady_step", "evaluate", "save", "resume", "merge", "quantize", "verify"
    ]
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


def test_inside_the_backward_pass_the_first_step_has_masters_and_the_moments_made_so_far() -> None:
    shape, hardware = find_shape(EIGHT), from_catalog("h100_80gb", 1)
    setup = Setup(
        method="full", precision="bf16", optimizer="adamw", master_weights=True, checkpointing="none",
        sequence_length=16384, in_backward=True,
    )
    for checkpointing, moments in (("none", 0.07), ("full", 1.0)):  # the last layer, with the head's; the end
        given = replace(setup, checkpointing=checkpointing)
        first, steady = (backward_and_step_bytes(shape, hardware, given, each)[0] for each in (True, False))
        assert steady.optimizer == 12 * shape.parameters and first.total < steady.total
        made = (first.optimizer - 4 * shape.parameters) / (8 * shape.parameters)
        assert moments - 0.05 <= made <= moments, checkpointing


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
    stacked = 2 * 4 * 14336**2 / GIB  # down's, normalised and stacked
    assert gptq["quantize"].quantization == pytest.approx(hessians + stacked, abs=0.001)
    kept = 2 * 64 * 2048 * (2 * 4096 + 14336 + 2 * 4096) / GIB  # inputs of 64 rows, and outputs twice
    assert awq["quantize"].activations == pytest.approx(kept, rel=0.02)


def test_calibration_has_scores_where_they_are_capped_and_nowhere_else() -> None:
    def more(name: str) -> float:
        """GiB of rows twice as long beyond twice as much."""
        model = ModelConfig(name=name)
        made = [plan("lora", formats=("nvfp4",), model=model, sequence_length=length) for length in (2048, 4096)]
        one, two = (each.phase_components_gib["quantize"].activations for each in made)
        return two - 2 * one

    assert more("meta-llama/Llama-3.1-8B") == pytest.approx(0.0, abs=0.001)
    assert more("google/gemma-2-9b") == pytest.approx(10 * 16 * 2 * 2048**2 / GIB, abs=0.001)


SEVENTY = ModelConfig(name="meta-llama/Llama-3.1-70B")


def test_answers_that_may_not_fit_are_said_with_the_number_that_does() -> None:
    def asked(**fields) -> Plan:
        evaluation = EvaluationConfig(task="exact_match", **fields)
        return plan("lora", precision="bf16", sequence_length=131072, evaluation=evaluation)

    def said(made: Plan) -> list[str]:
        return [reason for reason in made.reasons if "evaluate stage needs" in reason]

    made = asked(batch_size=16)
    assert made.fits and made.phases_gib.evaluate > made.budget_gib and len(said(made)) == 1
    fit = int(said(made)[0].partition("evaluation.batch_size=")[2].split()[0])
    assert asked(batch_size=fit).phases_gib.evaluate <= made.budget_gib < asked(batch_size=fit + 1).phases_gib.evaluate
    assert said(asked(batch_size=fit)) == said(plan("lora", evaluation=EvaluationConfig(task="exact_match"))) == []


def test_answers_to_be_read_are_counted_where_a_gpu_holds_all_weights() -> None:
    shape, hardware = find_shape(EIGHT), from_catalog("h100_80gb", 8)
    alone = Setup("lora", "bf16", "adamw", True, sharding="ddp", sequence_length=8192, world_size=8)
    job = Job(model=EIGHT, sequence_length=8192, hardware=HardwareConfig(gpu="h100_80gb", count=8))
    need, asked = answering(job, shape, hardware, alone)
    assert asked == 8 and need.activations == answer_bytes(shape, 2, 8, 1024, 128)
    assert need.weights / GIB == pytest.approx(BF16, rel=0.01)
    of_a_task = replace(job, evaluation=EvaluationConfig(max_rows=1))  # the limit is on what a task scores
    assert answering(of_a_task, shape, hardware, alone)[1] == 8
    for spread in ({"sharding": "fsdp"}, {"sharding": "zero3"}, {"sharding": "fsdp", "offload": "all"}):
        assert answering(job, shape, hardware, replace(alone, **spread)) == (Bytes(), 0)
    for data in (DataConfig(validation=None), DataConfig(format="text")):
        assert answering(replace(job, data=data), shape, hardware, alone) == (Bytes(), 0)
    scored = replace(job, evaluation=EvaluationConfig(task="exact_match"))
    for reshard in (True, False):  # where layers stay whole the embedding is among what is gathered for a batch
        setup = replace(alone, sharding="fsdp", reshard_after_forward=reshard)
        need, asked = answering(scored, shape, hardware, setup)
        batch = communicator_bytes(hardware) + evaluation_batch(shape, setup).at_peak["communication"]
        assert asked == 16 and need.communication - batch == reshard * 2 * shape.embedding_parameters


def test_fewer_answers_are_asked_at_a_time_where_more_do_not_fit() -> None:
    """A quarter of such a row at each of 16 prompts needs 150 GiB: the export was said not to pass, and did not."""
    evaluation = EvaluationConfig(task="exact_match")
    made = plan("lora", precision="bf16", sequence_length=131072, evaluation=evaluation)
    assert max(made.phases_gib.evaluate, made.phases_gib.verify) <= made.budget_gib
    assert made.verification["answers_at_a_time"] == 4 and made.verification["layers"]["host"] == 0
    assert not any("will not pass" in reason or "evaluate stage needs" in reason for reason in made.reasons)
    written = replace(evaluation, batch_size=16)
    refused = plan("lora", precision="bf16", sequence_length=131072, evaluation=written)
    assert not refused.verification["fits"] and refused.verification["answers_at_a_time"] == 16


def test_more_answers_are_asked_at_a_time_where_each_pass_moves_layers() -> None:
    def alone(batch_size: int | str) -> dict[str, Any]:
        evaluated = EvaluationConfig(task="json_fields", max_rows=128, max_new_tokens=256, batch_size=batch_size)
        return plan("qlora", 1, model=SEVENTY, evaluation=evaluated).verification

    chosen, usual = alone("auto"), alone(16)
    assert chosen == alone(128) and usual["answers_at_a_time"] == 16
    assert chosen["layers"]["host"] > usual["layers"]["host"] and chosen["moving_hours"] < usual["moving_hours"] / 3


def test_exports_are_verified_on_one_gpu_where_it_holds_them() -> None:
    small = plan("lora")
    assert small.phase_components_gib["verify"].weights == pytest.approx(BF16, rel=0.02)
    found = small.verification
    assert found["fits"] and found["layers"] == {"gpus": [32], "host": 0, "disk": 0} and found["moving_hours"] == 0
    assert not any("verified" in reason for reason in small.reasons)


def test_exports_that_one_gpu_does_not_hold_are_verified_over_several() -> None:
    """131 GiB of bf16 weights, which a plan used to say would not pass on cards of 80 GB."""
    large = plan("qlora", 8, model=SEVENTY)
    assert large.fits and large.phases_gib.verify <= large.budget_gib
    found = large.verification
    assert found["fits"] and sum(found["layers"]["gpus"]) == 80 and found["host_gib"] == found["disk_gib"] == 0
    assert sum(1 for count in found["layers"]["gpus"] if count) == 2 and found["moving_hours"] == 0
    said = [reason for reason in large.reasons if "exports are verified" in reason]
    assert "80 of 80 layers on 2 GPUs" in said[0] and "not seen on several GPUs yet" in said[0]
    assert Plan.from_dict(large.to_dict()) == large


@pytest.mark.parametrize(
    ("evaluation", "answers", "prompts", "passes"),
    [
        ({"task": "none"}, 16, None, 64),  # 16 answers of 64 tokens, in one batch
        ({"task": "none"}, 8, None, 2 * 64),
        ({"task": "none"}, 8, 3, 64),
        ({"task": "none", "max_new_tokens": 40}, 16, 500, 40),
        ({"task": "exact_match", "max_rows": 100}, 16, None, 7 * 256),
        ({"task": "exact_match", "max_rows": 100}, 16, 40, 3 * 256),
        ({"task": "exact_match", "max_rows": 100}, 16, 500, 7 * 256),
        ({"task": "exact_match", "max_rows": None}, 16, None, 8 * 256),  # 128, where no number is set
        ({"task": "exact_match", "max_rows": None}, 16, 500, 32 * 256),
    ],
)
def test_each_token_of_a_batch_of_answers_is_a_pass(evaluation, answers, prompts, passes) -> None:
    assert verification.answer_passes(EvaluationConfig(**evaluation), answers, prompts) == passes


def test_passes_are_of_every_candidate_and_of_the_trained_model_and_its_base() -> None:
    def passes(method: str, *formats: str) -> tuple[int, int]:
        job = Job(model=EIGHT, method=method, export=ExportConfig(formats=list(formats), verification_rows=10))
        setup = Setup(method, "bf16", "adamw", False)
        return verification.forward_passes(job, setup, 16)

    each, beside = 10 + 64, 4 * 32 + 2 * 4  # rows and answers; four recorded answers of 32 tokens, two stops of 4
    assert passes("lora", "bf16") == (each + beside, each + 10)
    assert passes("lora", "bf16", "int4") == (3 * each + 2 * beside, each + 10)  # of int4 two roundings
    assert passes("qlora", "bf16") == (2 * 10 + each + beside, each + 10)  # two merges, which answer nothing
    assert passes("qlora", "adapter") == (each + beside, each + 10)


def test_no_more_answers_are_asked_at_a_time_than_there_are_prompts() -> None:
    for rows, size, asked in ((None, "auto", 16), (5, "auto", 5), (200, "auto", 16), (5, 3, 3), (2, 3, 2)):
        evaluation = EvaluationConfig(task="exact_match", max_rows=rows, batch_size=size)
        assert verification.answers_at_a_time(Job(model=EIGHT, evaluation=evaluation)) == asked


def test_what_the_gpus_do_not_hold_is_in_host_memory_and_costs_time() -> None:
    alone = plan("qlora", 1, model=SEVENTY, max_steps=10)
    found = alone.verification
    count, host = found["layers"]["gpus"][0], found["layers"]["host"]
    assert found["fits"] and count + host == 80 and count > 20 and host > 20
    layer = 2 * (70_553_706_496 - 2 * 128256 * 8192 - 8192) / 80
    assert found["host_gib"] == pytest.approx(host * layer / GIB, abs=0.01) and found["disk_gib"] == 0
    machine = from_catalog("h100_80gb", 1)
    rate = machine.host_gb_per_s * 1e9 * 0.25
    assert found["moving_hours"] == pytest.approx(found["passes"] * host * layer / rate / 3600, abs=0.001)
    stops = plan("qlora", 1, model=SEVENTY, max_steps=10, stop_after="evaluate")
    written = alone.hours - stops.hours - found["moving_hours"]
    assert written * 3600 == pytest.approx(4 * 141.1 / 0.5, rel=0.01)  # two merges, and each read back, at 0.5 GB/s
    assert any("hours (modelled)" in reason for reason in alone.reasons)
    assert not any("verified" in reason for reason in stops.reasons)


def test_on_a_cpu_what_memory_does_not_hold_is_read_from_disk_and_the_plan_says_so(monkeypatch) -> None:
    monkeypatch.setattr("loadmaster.preflight.hardware.host_memory_gib", lambda: 18.0)
    job = Job(model=EIGHT, method="qlora", hardware=HardwareConfig(gpu="cpu"))
    made = make_plan(job)
    layers = made.verification["layers"]
    assert made.fits and layers["gpus"][0] + layers["disk"] == 32 and layers["disk"] > 4 and layers["host"] == 0
    layer = 2 * (8_030_261_248 - 2 * 128256 * 4096 - 4096) / 32 / GIB  # exports are in bf16, whatever trains
    assert made.verification["disk_gib"] == pytest.approx(layers["disk"] * layer, abs=0.01)
    assert made.phases_gib.verify <= made.budget_gib and made.verification["moving_hours"] > 0
    said = [reason for reason in made.reasons if "exports are verified" in reason]
    assert f"{layers['gpus'][0]} of 32 layers in host memory, {layers['disk']} on disk: " in said[0]
    assert "GiB are read from there in each" in said[0] and "GPU" not in said[0]
    monkeypatch.setattr("loadmaster.preflight.hardware.host_memory_gib", lambda: 64.0)
    assert make_plan(job).verification["layers"] == {"gpus": [32], "host": 0, "disk": 0}


def test_a_cpu_holds_the_whole_model_while_it_quantizes_and_its_peaks_are_of_host_memory(monkeypatch, capsys) -> None:
    job = Job(model=EIGHT, method="qlora", hardware=HardwareConfig(gpu="cpu"), export=ExportConfig(formats=["int4"]))
    for has, said in ((20.0, True), (64.0, False)):
        monkeypatch.setattr("loadmaster.preflight.hardware.host_memory_gib", lambda has=has: has)
        made = make_plan(job)
        assert made.fits and (made.phases_gib.quantize > made.budget_gib) == said
        assert any(reason.startswith("int4 cannot be quantized here") for reason in made.reasons) == said
    print_plan(made, Console(width=300))
    printed = capsys.readouterr().out
    assert "peaks in GiB of host memory: load" in printed and "; disk" in printed and "; host memory" not in printed
    monkeypatch.setattr("loadmaster.preflight.hardware.host_memory_gib", lambda: 20.0)
    assert not any("cannot be quantized" in reason for reason in make_plan(replace(job, stop_after="train")).reasons)


def test_layers_go_to_disk_where_the_host_is_too_small_and_frozen_ones_do_not() -> None:
    shape, machine = find_shape(SEVENTY), replace(from_catalog("h100_80gb", 1), host_memory_gib=40.0)
    job = Job(model=SEVENTY, method="full", batch=BatchConfig(global_size=64))
    setup = Setup(method="full", precision="bf16", optimizer="adafactor", master_weights=False,
                  **fixed(job, machine, "full", "full", 0))
    need = verifying(job, shape, machine, setup)
    assert need.placement.disk > 0 and need.disk_bytes >= need.host_bytes > 0 and need.summary()["fits"]
    on_host = verifying(job, shape, replace(machine, host_memory_gib=400.0), setup)
    assert on_host.placement.disk == 0 and need.seconds > on_host.seconds > 0
    fp8 = replace(setup, method="lora", precision="fp8", optimizer="adamw")
    small = replace(machine, memory_gib=40.0, host_memory_gib=16.0)
    nowhere = verifying(job, shape, small, fp8)
    assert not can_export(job, nowhere.summary()) and can_export(replace(job, stop_after="train"), nowhere.summary())
    chosen = evaluate(job, shape, small, fp8)
    assert "will not pass here: its verification needs 1" in about_verification(job, chosen, nowhere)[0]
    assert about_verification(replace(job, stop_after="evaluate"), chosen, nowhere) == []
    assert verifying(job, shape, small, replace(fp8, precision="bf16")).summary()["fits"]


def test_answers_need_a_cache_where_the_job_has_a_task() -> None:
    evaluation = EvaluationConfig(task="json_fields", batch_size=64)
    with_task = plan("lora", evaluation=evaluation, activation_checkpointing="full")
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
    kept = Job().checkpoint.keep_best + 1 + 1  # and the one that is being written; then the adapter, base and export
    assert one.disk_gib == pytest.approx((kept + 2 / 14) * each + 2 * BF16, rel=0.001)
    assert plan("qlora").disk_gib > bf16.disk_gib + 0.9 * BF16  # both merges


def test_the_host_holds_the_rehearsals_copy_of_what_is_trained() -> None:
    shape, machine = find_shape(EIGHT), from_catalog("h100_80gb", 1)
    job = Job(model=EIGHT, method="full")
    light = Setup(
        method="full", precision="bf16", optimizer="adamw_8bit", master_weights=False,
        **fixed(job, machine, "full", "none", 0),
    )
    assert host_bytes(shape, light) - 3 * GIB == pytest.approx(2 * shape.parameters, rel=0.001)


def test_a_gguf_takes_as_much_disk_as_its_type_has_bits() -> None:
    """The volume that a rented machine writes to is as large as the plan says."""
    shape, setup = find_shape(EIGHT), Setup("full", "bf16", "adamw", True)
    exports = {kind: ExportConfig(formats=["gguf"], gguf_type=kind) for kind in ("q8_0", "bf16", "f16")}
    sizes = {kind: export_bytes(Job(model=EIGHT, export=export), shape, setup) for kind, export in exports.items()}
    assert sizes["bf16"] == sizes["f16"] and sizes["bf16"] - sizes["q8_0"] == 7.5 / 8 * shape.parameters


def test_numbers_of_other_rooms_are_theirs() -> None:
    assert answers.ANSWER_TOKENS * (answers.PROMPTS + 1) < verification.OTHER_PASSES
    calibrated = {name for name, made in candidates.CANDIDATES.items() if set(made) & set(candidates.CALIBRATED)}
    assert set(CALIBRATED) == calibrated and {*EXPORT_BITS, "gguf"} == set(candidates.CANDIDATES)


def test_the_plan_says_in_which_phase_training_needs_most() -> None:
    assert plan("lora").reasons[0].endswith("GiB, in a step")
    least = plan("qlora", micro_batch_size=1, activation_checkpointing="offload")
    assert f"{least.memory_gib.total:.1f}" not in least.reasons[0]
    assert least.reasons[0].endswith("GiB, where it takes the held-out loss")
