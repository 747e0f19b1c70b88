"""The first layers checkpointed, the last ones not: bytes equal traces, and work lies between all and none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from rich.console import Console

from loadmaster.config.schema import PlanConfig
from loadmaster.preflight import make_plan
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.memory import worst_micro_batch
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.search import SPARE
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import training_step
from loadmaster.preflight.table import print_elsewhere, print_plan
from loadmaster.training.trace import Case
from tests.preflight.sharded_trace import sharded_peaks
from tests.preflight.test_make import job, plan
from tests.preflight.test_replay import random_config
from tests.preflight.traced import traced_peaks

TOLERANCE = 0.001
LAYERS = 12
"""Enough that neither run of layers is replayed one by one."""
KEPT = (1, 2, 5, 8, 11)


def deep(family: str, vocabulary: int = 1000) -> dict:
    config = {**random_config(family, 0), "num_hidden_layers": LAYERS, "vocab_size": vocabulary}
    if "layer_types" in config:
        config["layer_types"] = (config["layer_types"] * LAYERS)[:LAYERS]
    return config


def setup_of(method: str, case: Case, **fields) -> Setup:
    return Setup(
        method=method, precision="bf16", optimizer="adamw", master_weights=True, checkpointing=case.checkpointing,
        kept_layers=case.kept_layers, sequence_length=case.tokens,
        gradient_accumulation_steps=2 if case.accumulated else 1, **fields,
    )


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "phi3"))])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_bytes_equal_traces(family: str, method: str) -> None:
    config = deep(family)
    shape = from_config(config, family)
    cases = [Case(3000, "full", kept_layers=kept) for kept in KEPT] + [Case(3000, "full", True, kept_layers=5)]
    cases += [Case(512, "full", kept_layers=8, objective="dpo" if method == "lora" else "sft")]
    for case, truth in zip(cases, traced_peaks(config, method, cases), strict=True):
        setup = replace(setup_of(method, case), objective=case.objective)
        error = training_step(shape, setup, in_place=False).peak / truth - 1
        assert abs(error) < TOLERANCE, f"{case}: replay is {error:+.3%} from the trace of {truth} bytes"


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kept", [1, 4, 11])
def test_bytes_equal_traces_of_fully_shard(method: str, kept: int) -> None:
    config = deep("llama", 256)
    case = Case(3000, "full", kept_layers=kept)
    setup = setup_of(method, case, sharding="fsdp", world_size=64)
    _, peak = sharded_peaks(config, method, "bf16", case, 64)
    worst, gradients = worst_micro_batch(from_config(config, "llama"), setup, in_place=False)
    assert worst.peak + gradients == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize("dense", [[0, 1, 2], [3, 4], [11]])
def test_layers_with_and_without_experts_are_replayed_where_they_are(dense: list[int]) -> None:
    """Expert layers came first, and with few of them replayed no dense one was seen: full was up to 53% too low."""
    config = {**deep("qwen3_moe"), "mlp_only_layers": dense, "intermediate_size": 4096}
    shape, targets = from_config(config, "qwen3_moe"), ("q_proj", "k_proj", "v_proj", "o_proj")
    cases = [Case(1024), Case(1024, "full"), *(Case(1024, "full", kept_layers=kept) for kept in (1, 5, 10))]
    for case, truth in zip(cases, traced_peaks(config, "qlora", cases, 16, targets), strict=True):
        setup = setup_of("qlora", case, lora_targets=targets)
        error = training_step(shape, setup, in_place=False).peak / truth - 1
        assert abs(error) < TOLERANCE, f"{case}: replay is {error:+.3%} from the trace of {truth} bytes"


@pytest.mark.parametrize("compiled", [False, True])
def test_work_and_bytes_go_from_all_checkpointed_to_none(compiled: bool) -> None:
    shape = from_config(deep("llama"), "llama")
    setups = [
        replace(setup_of("lora", Case(3000, "full", kept_layers=kept)), compiled=compiled) for kept in range(LAYERS)
    ]
    setups.append(replace(setups[0], checkpointing="none"))
    steps = [training_step(shape, setup) for setup in setups]
    flops = [step.work.matmul_flops for step in steps]
    one = flops[0] - flops[1]
    assert one > 0 and flops == pytest.approx([flops[0] - kept * one for kept in range(LAYERS + 1)])
    peaks = [step.peak for step in steps]
    assert peaks[1:] == sorted(peaks[1:]) and peaks[1] < peaks[-1]
    # The last layer is the first of the backward pass: kept, it has nothing beside what it would make again.
    assert peaks[1] <= peaks[0] * (1.01 if compiled else 1)


def planned(**fields) -> Plan:
    return plan("meta-llama/Llama-3.1-70B", "qlora", "a100_80gb", sequence_length=4096, **fields)


def test_what_there_is_room_for_is_kept_and_not_a_layer_more(capsys) -> None:
    chosen, lean = planned(), planned(activation_checkpointing="full")
    some = chosen.checkpointed_layers
    assert chosen.fits and chosen.activation_checkpointing == "full" and 0 < some < 80
    assert lean.checkpointed_layers is None
    assert chosen.tokens_per_second > 1.1 * lean.tokens_per_second
    spare = chosen.budget_gib - chosen.memory_gib.total
    assert SPARE * chosen.budget_gib < spare < SPARE * chosen.budget_gib + 1  # a layer keeps 0.6 GiB
    rows = {"activation_checkpointing": "full", "micro_batch_size": chosen.micro_batch_size}
    print_plan(chosen, Console(width=200))
    assert f"activation checkpointing full of the first {some} of 80 layers" in capsys.readouterr().out
    again = planned(checkpointed_layers=some, **rows)
    assert (again.memory_gib, again.tokens_per_second) == (chosen.memory_gib, chosen.tokens_per_second)
    assert planned(checkpointed_layers=some - 3, **rows).fits  # the budget is theirs who write it
    assert not planned(checkpointed_layers=some - 6, **rows).fits
    told = planned(checkpointed_layers=81, **rows)
    assert not told.fits and "checkpointed_layers=81" in told.refusal and "80 layers" in told.refusal


def test_memory_as_the_objective_and_what_was_written_keep_nothing_more() -> None:
    assert planned(plan=PlanConfig(objective="memory")).checkpointed_layers is None
    assert planned(activation_checkpointing="full").checkpointed_layers is None


def test_a_row_that_a_machine_of_the_catalogue_recomputes_in_part_says_so(capsys) -> None:
    found = make_plan(job("meta-llama/Llama-3.1-70B", "qlora", "h200", sequence_length=4096), with_elsewhere=True)
    partly = [row for row in found.elsewhere if row["checkpointed_layers"] is not None]
    assert partly and all(0 < row["checkpointed_layers"] < 80 for row in partly)
    assert all(row["needs_gib"] <= row["budget_gib"] for row in partly)
    print_elsewhere(replace(found, elsewhere=partly[:1]), Console(width=200))
    assert f"checkpointing {partly[0]['checkpointed_layers']} of 80 layers" in capsys.readouterr().out


def test_what_a_written_number_of_layers_leads_to_works(capsys) -> None:
    written = {"activation_checkpointing": "full", "checkpointed_layers": 2}
    refused = planned(**written)
    text = " ".join(refused.reasons) + refused.rejected[0]["reason"]
    length = int(re.search(r"sequence_length=(\d+) fits", text)[1])
    assert length < 4096
    assert plan("meta-llama/Llama-3.1-70B", "qlora", "a100_80gb", sequence_length=length, **written).fits
    changes = [each["change"] for each in refused.alternatives]
    assert "checkpointed_layers=auto" in changes and "activation_checkpointing=auto" not in changes
    older = make_plan(job("meta-llama/Llama-3.1-8B", "lora", "a100_80gb"), with_elsewhere=True).to_dict()
    for row in [older, *older["elsewhere"]]:  # as it was written before there was such a number
        del row["checkpointed_layers"]
    print_plan(Plan.from_dict(older), Console(width=200))
    assert "machines of the catalogue" in capsys.readouterr().out
