"""What a search finds is the best of what fits: nothing that fits and is better is passed over."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from loadmaster.config.schema import BatchConfig, LoraConfig, OptimizerConfig
from loadmaster.preflight import largest, make_plan, shape
from loadmaster.preflight.candidate import Candidate
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.enumeration import Enumeration
from loadmaster.preflight.hardware import find_hardware
from loadmaster.preflight.search import ranking, search
from loadmaster.preflight.tiers import tiers
from tests.preflight.test_make import LLAMA, job

PHI_4_MINI = "microsoft/Phi-4-mini-instruct"


def found(job, explain: bool = True) -> Candidate:
    best = search(job, find_shape(job.model), find_hardware(job.hardware), explain).best
    assert best is not None
    return best


def fitting(speed: float, gib: float, precision: str = "bf16", shards: int = 1) -> SimpleNamespace:
    setup = SimpleNamespace(precision=precision, state_shards=shards)
    return SimpleNamespace(tokens_per_second=speed, memory=SimpleNamespace(needed_gib=gib), setup=setup)


@pytest.mark.parametrize(
    ("objective", "best_first"),
    [
        ("time", [fitting(100, 50), fitting(97, 30)]),
        ("time", [fitting(98.5, 30), fitting(100, 50)]),  # as fast, with less memory
        ("time", [fitting(98.5, 50), fitting(100, 30, shards=8)]),  # as fast, with nothing to gather
        ("time", [fitting(98.5, 50), fitting(100, 30, "fp8")]),  # as fast, with a base that is not rounded
        ("time", [fitting(98.5, 50, shards=8), fitting(100, 30, "fp8")]),
        ("time", [fitting(100, 30, "fp8"), fitting(97, 50)]),
        ("time", [fitting(100, 70), fitting(95, 60), fitting(94.5, 10), fitting(80, 5)]),
        ("memory", [fitting(90, 30), fitting(80, 30), fitting(100, 50)]),
    ],
)
def test_of_plans_that_are_as_fast_the_more_faithful_comes_first_then_the_smaller(objective, best_first) -> None:
    asked = job(LLAMA + "8B", "lora", "h100_80gb")
    asked = replace(asked, plan=replace(asked.plan, objective=objective))
    fit = best_first[::-1]
    assert sorted(fit, key=ranking(asked, fit)) == best_first


@pytest.mark.parametrize(
    ("model", "gpu", "master_weights"),
    [(LLAMA + "8B", "rtx5090", False), ("mistralai/Mistral-7B-v0.3", "l40s", True)],
)
def test_all_rows_at_once_are_tried_where_fewer_do_not_fit_beside_accumulated_gradients(
    model, gpu, master_weights
) -> None:
    open_ = job(model, "full", gpu, 4, sequence_length=512, batch=BatchConfig(global_size=16), optimizer="adamw")
    written = make_plan(replace(open_, micro_batch_size=4))
    for best in (make_plan(open_), written):
        assert best.fits and best.micro_batch_size == 4
        assert (best.optimizer, best.master_weights) == ("adamw", master_weights)
        assert best.tokens_per_second == written.tokens_per_second
        assert any("longest row" in reason for reason in best.reasons)
    quick = found(open_, explain=False)
    assert quick.setup.optimizer == "adamw" and quick.tokens_per_second > 0.98 * written.tokens_per_second


@pytest.mark.parametrize(
    ("model", "gpu", "count", "nodes", "rows", "length", "fields"),
    [
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "h100_80gb", 4, 1, 64, 512, {}),  # sharing the update
        ("Qwen/Qwen2.5-1.5B-Instruct", "h100_80gb", 8, 4, 64, 2048, {}),
        ("Qwen/Qwen3-30B-A3B-Base", "h100_nvl", 8, 1, 64, 8192, {}),  # fewer gathers in more than MOST_TOKENS
        ("mistralai/Mixtral-8x7B-v0.1", "b200", 8, 1, 32, 2048, {"sharding": "zero3"}),  # or by recomputing
        (LLAMA + "70B", "h100_80gb", 4, 1, 64, 4096, {}),
    ],
)
def test_a_quick_search_finds_what_is_some_per_cent_slower_at_most(
    model, gpu, count, nodes, rows, length, fields
) -> None:
    asked = job(model, "full", gpu, count, nodes, batch=BatchConfig(rows), sequence_length=length, **fields)
    asked = replace(asked, optimizer=OptimizerConfig(max_grad_norm=1.0))
    quick, best = found(asked, explain=False), found(asked)
    assert quick.tokens_per_second > 0.95 * best.tokens_per_second


def test_a_quick_search_keeps_layers_beside_as_many_rows_as_weights_are_gathered_for() -> None:
    """From host memory, 16 rows at a time take twice as many gathers as 32."""
    asked = job(LLAMA + "70B", "lora", "h100_80gb", 2, precision="bf16", sequence_length=256, offload="all")
    quick, best = found(asked, explain=False), found(asked)
    assert (best.setup.offload, best.setup.micro_batch_size) == ("all", 32) and best.setup.kept_layers
    assert quick.tokens_per_second > 0.95 * best.tokens_per_second


def test_unpacked_rows_of_kto_are_not_alone_in_a_micro_batch_where_more_fit() -> None:
    asked = job(LLAMA + "8B", "lora", "rtx4090", sequence_length=8192, objective="kto", batch=BatchConfig(4))
    assert found(asked).setup.micro_batch_size == 1
    asked = replace(asked, data=replace(asked.data, packing=False))
    for explain in (True, False):
        assert found(asked, explain).setup.micro_batch_size == 2
    assert found(replace(asked, micro_batch_size=1)).setup.micro_batch_size == 1


@pytest.mark.parametrize(("packing", "method"), [(True, "full"), (False, "lora")])
def test_kto_of_packed_rows_may_train_all_weights(packing, method) -> None:
    asked = job(LLAMA + "8B", "auto", "h200", objective="kto")
    assert found(replace(asked, data=replace(asked.data, packing=packing))).setup.method == method


def test_a_runner_up_takes_no_more_memory_than_its_own_speed_needs() -> None:
    """Recomputed, 16 rows at a time are as fast as two and take 19 GiB more than keeping all takes for one."""
    plan = make_plan(job(LLAMA + "8B", "lora", "a100_80gb", sequence_length=4096, batch=BatchConfig(16)))
    (recomputed,) = (other for other in plan.runners_up if "activation checkpointing full" in other["plan"])
    assert re.search(r": \d+% slower, \d+\.\d GiB less$", recomputed["difference"])


def test_targets_by_name_are_looked_for_in_every_layer_only_once(monkeypatch) -> None:
    looked, full_name = [], shape.full_name
    monkeypatch.setattr(shape, "full_name", lambda *args: looked.append(args) or full_name(*args))
    shape._named_layers.cache_clear()
    asked = job(LLAMA + "405B", "lora", "l40s", lora=LoraConfig(targets=["q_proj", "v_proj"]))
    assert not make_plan(asked).fits
    assert len(looked) <= 2 * 126 * len(find_shape(asked.model).matrices())


def test_the_number_of_rows_that_is_said_to_fit_does_and_its_double_does_not() -> None:
    asked = job(LLAMA + "8B", "full", "h100_80gb", optimizer="adafactor", offload="none", sequence_length=512)
    asked = replace(asked, micro_batch_size=64, activation_checkpointing="none")
    said = next(reason for reason in make_plan(asked).reasons if "is the largest that divides" in reason)
    rows = int(re.findall(r"[(](\d+) is the largest", said)[0])
    assert make_plan(replace(asked, micro_batch_size=rows)).fits
    assert not make_plan(replace(asked, micro_batch_size=2 * rows)).fits


def test_rows_that_are_said_to_fit_in_a_step_in_the_backward_pass_are_all_of_it_and_do() -> None:
    asked = job(LLAMA + "8B", "full", "a100_80gb", 2, batch=BatchConfig(128), sequence_length=4096)
    asked = replace(asked, optimizer=OptimizerConfig(name="adafactor", in_backward=True, max_grad_norm=0))
    asked = replace(asked, micro_batch_size=64, activation_checkpointing="full")
    said = " ".join(make_plan(asked, with_alternatives=False).reasons)
    rows, each = map(int, re.findall(r"; batch.global_size=(\d+) micro_batch_size=(\d+) fits", said)[-1])
    for more, fits in ((0, True), (1, False)):
        written = replace(asked, batch=BatchConfig(rows + 2 * more), micro_batch_size=each + more)
        assert make_plan(written, with_alternatives=False).fits == fits


@pytest.mark.parametrize(
    ("method", "gpu", "rows"), [("lora", "l40s", 16), ("full", "h100_80gb", 4), ("qlora", "a100_80gb", 16)]
)
def test_the_longest_rows_that_are_said_to_fit_do_and_longer_ones_do_not(method, gpu, rows) -> None:
    asked = job(LLAMA + ("70B" if method == "qlora" else "8B"), method, gpu, batch=BatchConfig(rows))
    chosen = make_plan(asked)
    said = next(reason for reason in chosen.reasons if "longest row" in reason)
    kept, offloaded = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:tokens|with layers)", said))
    same = replace(asked, precision=chosen.precision, optimizer=OptimizerConfig(name=chosen.optimizer), offload="none")
    for tokens, ways in ((kept, "full"), (offloaded, "auto")):
        written = replace(same, activation_checkpointing=ways)
        assert make_plan(replace(written, sequence_length=tokens)).fits
        assert not make_plan(replace(written, sequence_length=tokens + 256)).fits


@pytest.mark.parametrize(
    ("model", "fields", "chosen"),
    [
        (LLAMA + "8B", {"method": "lora", "gpu": "h100_80gb", "count": 8}, ("ddp", True)),
        ("google/gemma-2-2b", {"method": "full", "gpu": "rtx4090", "count": 2, "sequence_length": 64}, ("fsdp", False)),
    ],
)
def test_the_longest_row_is_of_weights_that_are_cut_though_short_ones_leave_them_whole(model, fields, chosen) -> None:
    asked = job(model, precision="bf16", **fields)
    found = make_plan(asked)
    assert (found.sharding, found.reshard_after_forward) == chosen
    said = next(reason for reason in found.reasons if "longest row" in reason)
    longest = int(re.findall(r"([\d,]+) tokens", said)[0].replace(",", ""))
    same = replace(asked, optimizer=OptimizerConfig(name=found.optimizer, master_weights=found.master_weights))
    same = replace(same, offload="none", activation_checkpointing="full", micro_batch_size=1)
    assert make_plan(replace(same, sequence_length=longest)).fits
    assert not make_plan(replace(same, sequence_length=longest + 256), with_alternatives=False).fits


def test_rows_far_too_long_are_not_replayed_to_find_the_longest_that_fits(monkeypatch) -> None:
    tried, evaluate = [], largest.evaluate
    monkeypatch.setattr(largest, "evaluate", lambda *args: tried.append(args[3].sequence_length) or evaluate(*args))
    refused = make_plan(job(LLAMA + "8B", "lora", "h100_80gb", sequence_length=4_000_000), with_alternatives=False)
    longest = int(re.findall(r"sequence_length=(\d+) fits", " ".join(refused.reasons))[0])
    assert not refused.fits and longest in tried and max(tried) < 2 * longest


@pytest.mark.parametrize(
    ("model", "dora", "offered"),
    [(PHI_4_MINI, True, False), (PHI_4_MINI, False, True), (f"{LLAMA}8B", True, True)],
)
def test_selective_checkpoints_are_not_offered_under_dora_where_their_code_was_not_seen(model, dora, offered) -> None:
    """Phi-3 mini's, with dropout, has 7% of three layers more than eager ones (its generated code, 2026-12-01)."""
    asked = job(model, "lora", "h100_80gb", lora=LoraConfig(dora=dora, dropout=0.05))
    known, hardware = find_shape(asked.model), find_hardware(asked.hardware)
    tried = {
        candidate.setup.checkpointing for tier in tiers(asked, hardware)
        for candidate in Enumeration(asked, known, hardware, tier).candidates()
    }
    assert ("selective" in tried) is offered
