"""The communication model: rings by hand, published runs, scaling over nodes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from loadmaster import catalog
from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig
from loadmaster.errors import ConfigError
from loadmaster.preflight import make_plan
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.communication import collective_seconds, step_communication, step_traffic
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.scaling import parse_nodes, print_scaling, scaling, verdict
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from tests.preflight.test_benchmark_scripts import load

LLAMA = "meta-llama/Llama-3.1-"


def shape_of(name: str) -> ModelShape:
    return from_config(json.loads((catalog.FOLDER / "shapes" / f"{name}.json").read_text())["config"], name)


def setup(sharding: str, world: int = 16, **fields) -> Setup:
    return Setup(
        **{
            "method": "full", "precision": "bf16", "optimizer": "adamw", "master_weights": True, "sharding": sharding,
            "world_size": world, "gpus_per_node": 8, **fields,
        }
    )


def test_a_ring_takes_as_long_as_its_slower_part() -> None:
    node = from_catalog("h100_80gb", 8)
    latency = 1e-6 * (value("latency", "collective_us") + 7 * value("latency", "link_us"))
    inside = 8e9 * 7 / 8 / (450e9 * value("efficiency", "link"))
    assert collective_seconds(8e9, 1, 8, 1, node) == pytest.approx(inside + latency)
    slow = replace(from_catalog("h100_80gb", 8, 2), network_gbps=100)
    between = 8e9 / 2 / (12.5e9 * value("efficiency", "network"))
    assert collective_seconds(8e9, 1, 8, 2, slow) == pytest.approx(between, rel=1e-3)
    assert collective_seconds(8e9, 1, 1, 1, node) == 0


def test_bytes_of_a_step_follow_what_each_sharding_gathers_and_reduces() -> None:
    shape, steps = shape_of("llama-3.1-8b"), 4
    weights = 2 * shape.parameters
    moved = {
        name: step_traffic(shape, setup(name, gradient_accumulation_steps=steps))
        for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    }
    root = 2 * 2 * shape.embedding_parameters  # whole from the forward pass to the end
    assert moved["fsdp"].gathered == pytest.approx(steps * (2 * weights - root), rel=1e-3)  # forward and backward
    whole = setup("fsdp", gradient_accumulation_steps=steps, reshard_after_forward=False)
    assert step_traffic(shape, whole).gathered == pytest.approx(weights, rel=1e-3)  # once a step
    assert moved["fsdp"].reduced == pytest.approx(steps * 2 * weights, rel=1e-3)  # in fp32
    assert moved["zero3"] == moved["fsdp"]
    assert moved["zero2"].gathered == moved["zero1"].gathered == pytest.approx(weights, rel=1e-3)
    assert moved["zero2"].reduced == steps * moved["zero1"].reduced
    assert moved["ddp"].gathered == moved["ddp"].reduced == weights


def test_hybrid_sharding_spares_the_network_the_frozen_weights() -> None:
    """Of a full fine-tune nothing is spared: fp32 gradients summed over nodes are as many bytes as two bf16 gathers."""
    shape, slow = shape_of("llama-3.1-8b"), replace(from_catalog("h100_80gb", 8, 2), network_gbps=100)
    whole, hybrid = setup("fsdp"), setup("fsdp", replicas=2)
    spared = step_communication(shape, slow, whole, 0.1) / step_communication(shape, slow, hybrid, 0.1)
    assert spared == pytest.approx(1, abs=0.1)
    adapters = setup("fsdp", method="lora"), setup("fsdp", method="lora", replicas=2)
    assert step_communication(shape, slow, adapters[1], 0.1) < 0.3 * step_communication(shape, slow, adapters[0], 0.1)


def test_published_runs_are_predicted_or_their_difference_is_explained() -> None:
    script = load("published_runs")
    assert script.unexplained() == []
    for run in script.RUNS:
        assert abs(script.predict(run)[1] / run.tokens_per_second - 1) < 0.35, run.name
    eager = script.RUNS[0]
    assert script.predict(eager)[0] == pytest.approx(82.4, rel=0.05)
    assert script.predict(eager)[1] == pytest.approx(8 * 5762, rel=0.2)
    newest = max(script.RESULTS.glob("published-*.md"))
    day = newest.stem.removeprefix("published-")
    assert newest.read_text(encoding="utf-8") == script.page(day), "run: python benchmarks/published_runs.py"
    assert script.table() in (script.RESULTS.parents[1] / "docs" / "preflight.md").read_text(encoding="utf-8")


def job(method: str = "full", rows: int = 64, gpu: str = "h100_80gb", model: str = "70B") -> Job:
    machine = HardwareConfig(gpu=gpu, count=8)
    return Job(model=ModelConfig(name=LLAMA + model), method=method, hardware=machine, batch=BatchConfig(rows))


def test_node_ranges_are_powers_of_two_and_lists_are_taken_as_written() -> None:
    assert parse_nodes("1..64") == [1, 2, 4, 8, 16, 32, 64] and parse_nodes("3..6") == [3, 4, 6]
    assert parse_nodes("8,1") == [1, 8]
    for wrong in ("", "0..4", "4..2", "1..x", "9999", "²"):
        with pytest.raises(ConfigError, match=r"1\.\.64"):
            parse_nodes(wrong)


def test_scaling_says_how_efficient_more_nodes_are_and_what_a_token_costs(capsys) -> None:
    asked = job()
    steps = scaling(asked, [1, 8, 64], None)
    assert [step.global_size for step in steps] == [64, 64, 512]
    assert steps[0].efficiency == 1 and 0.5 < steps[1].efficiency < 1.2
    first = steps[0].plan
    cost = 8 * 3.99 / 3600 / first.tokens_per_second * 1e9
    assert steps[0].usd_per_billion_tokens == pytest.approx(cost, rel=1e-3)
    print_scaling(asked, steps, Console(width=80))
    said = capsys.readouterr().out
    assert "modelled" in said and "up to 8 nodes" in said and "another batch" in said


def test_scaling_stops_paying_where_added_gpus_bring_less_than_half(monkeypatch) -> None:
    slow = [{**machine, "network_gbps": 25} for machine in catalog.machines()]
    monkeypatch.setattr(catalog, "machines", lambda: slow)
    steps = scaling(job(rows=256, model="8B"), [1, 2, 4, 8, 16], None)
    assert steps[-1].efficiency < 0.9 and "pays up to" in verdict(steps)
    nothing = scaling(job(model="405B"), [1], None)
    assert nothing[0].efficiency is None and "nothing fits" in verdict(nothing)


def test_a_run_that_is_mostly_start_loading_and_export_does_not_pay_on_more_nodes(capsys) -> None:
    """70B, some 40 steps: 27 minutes on one node and on two."""
    short = job(rows=64)
    steps = scaling(short, [1, 2, 4, 8], 64 * short.sequence_length * 4)
    assert steps[1].marginal > 0.8 and steps[1].run_marginal < 0.5
    said = verdict(steps)
    one, two = steps[0].plan, steps[1].plan
    assert said.startswith("for this run, 1 node is enough: 2 take")
    assert said.endswith("by speed alone it would pay up to 4 nodes")
    assert f"cost ${two.cost_usd:,.2f} instead of ${one.cost_usd:,.2f}" in said and two.cost_usd > 1.8 * one.cost_usd
    print_scaling(short, steps, Console(width=80))
    assert said in capsys.readouterr().out.replace("\n", " ")


def test_a_long_run_pays_and_what_its_tokens_cost_more_is_said() -> None:
    long = scaling(job(rows=64), [1, 8], 4_000_000_000)
    said = verdict(long)
    assert said.startswith("pays up to 8 nodes, the most that was asked for: 8 take") and "instead of" in said
    assert f"${long[1].plan.cost_usd:,.2f} instead of ${long[0].plan.cost_usd:,.2f} on 1" in said
    unknown = verdict(scaling(job(rows=64, model="8B"), [1, 8], None))
    assert "times as fast, and a billion tokens cost $" in unknown


def test_with_fixed_steps_a_larger_batch_is_no_shorter_run() -> None:
    steps = scaling(replace(job(rows=64), max_steps=100_000), [8, 16], None)
    said = verdict(steps, 100_000)
    assert steps[1].marginal > 0.8 and "more than 8 nodes do not pay: 16 take" in said
    assert "as its 100000 steps have more rows there" in said


def test_scaling_needs_a_machine_with_modelled_links() -> None:
    with pytest.raises(ConfigError, match="h100_80gb_x8"):
        scaling(job(gpu="cpu"), [1, 2], None)


def test_a_network_that_is_not_known_is_said_to_be_taken_for_a_slow_one(capsys) -> None:
    asked = job("lora", gpu="l40s", model="8B")
    unknown = replace(asked, hardware=replace(asked.hardware, nodes=2))
    said = "network between nodes of l40s is not known here and taken for 1 Gb/s"
    assert said in " ".join(make_plan(unknown).reasons)
    print_scaling(asked, scaling(asked, [1, 2], None))
    assert said in capsys.readouterr().out
    for one in (asked, replace(unknown, hardware=replace(unknown.hardware, gpu="h100_80gb"))):
        assert "network between nodes" not in " ".join(make_plan(one).reasons)
