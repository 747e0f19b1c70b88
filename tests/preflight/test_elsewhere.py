"""The same job priced on every machine of the catalogue that holds it, in the objective's order."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from loadmaster.config.compose import compose
from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig, PlanConfig
from loadmaster.preflight import make_plan, print_plan
from loadmaster.preflight.plan import Plan

EIGHT = ModelConfig(name="meta-llama/Llama-3.1-8B")
TOKENS = 20_000_000


def job(**fields) -> Job:
    return Job(**{"model": EIGHT, "method": "lora", "hardware": HardwareConfig(gpu="h100_80gb", count=1),
                  "batch": BatchConfig(global_size=64), **fields})


def plan(**fields) -> Plan:
    return make_plan(job(**fields), TOKENS, with_elsewhere=True)


def test_every_machine_that_holds_the_job_is_priced_and_those_that_do_not_are_left_out() -> None:
    made = plan()
    places = {(row["gpu"], row["count"], row["nodes"]): row for row in made.elsewhere}
    assert ("h100_80gb", 1, 1) in places and ("rtx4090", 1, 1) in places and len(places) == len(made.elsewhere) == 24
    for row in made.elsewhere:
        assert row["needs_gib"] <= row["budget_gib"] and row["price"]
        assert row["cost_usd"] == pytest.approx(row["hours"] * row["usd_per_hour"], rel=0.02)
        assert row["global_size"] == 64 and 64 % (row["micro_batch_size"] * row["count"]) == 0
    own = places["h100_80gb", 1, 1]
    assert (own["tokens_per_second"], own["cost_usd"]) == (made.tokens_per_second, made.cost_usd)
    full = plan(method="full", optimizer=replace(Job().optimizer, name="adamw_8bit"))
    held = {(row["gpu"], row["count"]) for row in full.elsewhere}
    assert ("rtx4090", 1) not in held and ("h100_80gb", 1) in held


def test_each_row_is_what_planning_on_that_machine_gives() -> None:
    for row in plan().elsewhere[::7]:
        there = make_plan(
            job(hardware=HardwareConfig(gpu=row["gpu"], count=row["count"]), precision=row["precision"]), TOKENS
        )
        assert row["tokens_per_second"] == pytest.approx(there.tokens_per_second, rel=0.021)


def test_what_is_in_host_memory_is_each_machines_own_but_where_it_is_written() -> None:
    """What two small cards need was asked of eight large ones too, at a third of their speed."""
    fields = {
        "method": "full", "hardware": HardwareConfig(gpu="rtx4090", count=2), "activation_checkpointing": "none",
    }
    made, written = plan(**fields), plan(**fields, offload="all")
    assert made.offload == written.offload == "all"
    offloads = {(row["gpu"], row["count"]): row["offload"] for row in made.elsewhere}
    assert offloads["h100_80gb", 8] == offloads["h100_80gb", 1] == "none" and offloads["rtx4090", 2] == "all"
    assert {row["offload"] for row in written.elsewhere} == {"all"}


def test_the_objective_ranks_and_equals_go_by_what_they_cost() -> None:
    by_cost = plan(plan=PlanConfig(objective="cost")).elsewhere
    costs = [row["cost_usd"] for row in by_cost]
    assert costs[0] == min(costs) and all(later > 0.97 * earlier for earlier, later in pairwise(costs))
    by_time = plan().elsewhere
    assert by_time[0]["hours"] <= 1.03 * min(row["hours"] for row in by_time)
    by_memory = plan(plan=PlanConfig(objective="memory")).elsewhere
    assert by_memory[0]["needs_gib"] <= 1.03 * min(row["needs_gib"] for row in by_memory)


def test_where_memory_is_all_that_counts_each_row_is_the_smallest_plan_there() -> None:
    """A machine with room for all activations was shown with them, and ranked by that."""
    rows = plan(plan=PlanConfig(objective="memory")).elsewhere
    assert {row["activation_checkpointing"] for row in rows} == {"full", "offload"}
    for row in rows[::5]:
        machine = HardwareConfig(gpu=row["gpu"], count=row["count"], nodes=row["nodes"])
        asked = job(hardware=machine, precision=row["precision"], plan=PlanConfig(objective="memory"))
        there = make_plan(asked, TOKENS).phases_gib
        assert row["needs_gib"] == pytest.approx(max(there.load, there.train, there.evaluate, there.save), abs=0.01)


def test_a_cluster_is_priced_where_one_node_does_not_hold_the_job_and_only_the_smallest() -> None:
    made = make_plan(
        Job(model=ModelConfig(name="meta-llama/Llama-3.1-405B"), method="lora", precision="fp8",
            hardware=HardwareConfig(gpu="h100_80gb", count=8), batch=BatchConfig(global_size=64)),
        with_elsewhere=True,
    )
    assert made.fits
    machines = {(row["gpu"], row["count"], row["nodes"], row["precision"]) for row in made.elsewhere}
    assert ("h200", 8, 1, "fp8") in machines and {row[0] for row in machines} <= {
        "h200",
        "b200",
        "h100_80gb",
        "a100_80gb",
    }
    a100 = [row for row in machines if row[0] == "a100_80gb"]  # no fp8 units: 810 GB in bf16
    assert a100 == [("a100_80gb", 8, 2, "bf16")]


def test_the_table_prints_the_first_and_the_cheapest_with_the_dates_of_prices() -> None:
    console = Console(file=io.StringIO(), width=100)
    made = plan()
    print_plan(made, console)
    said = console.file.getvalue()
    assert "machines of the catalogue that hold it (and 17 more in plan.json), shortest run first (plan.objec" in said
    assert "2026-11-09" in said
    cheapest = min(made.elsewhere, key=lambda row: row["cost_usd"])
    assert f"{cheapest['count']}x {cheapest['gpu']}, cheapest " in said and "longest row that fits here" in said


@pytest.mark.parametrize(("objective", "first"), [
    ("time", "shortest run first"), ("cost", "cheapest run first"), ("memory", "least memory first"),
])
def test_the_table_says_its_order_and_marks_this_plan_and_the_cheapest(objective, first) -> None:
    console = Console(file=io.StringIO(), width=100)
    job = compose(["recipe=lora_8b", "hardware=l40s_x1", f"plan.objective={objective}"]).job
    made = make_plan(job, 500_000, with_elsewhere=True)
    print_plan(made, console)
    said = console.file.getvalue()
    assert f"{first} (plan.objective={objective}; of equals within 2% the cheaper)" in said
    assert said.count(", cheapest  ") == 1 and said.count(", this plan  ") == (objective == "cost")
    print_plan(replace(made, elsewhere_order=None), console)
    assert "best first by plan.objective, at" in console.file.getvalue()  # a plan of before


def test_runners_up_are_in_the_order_of_their_speed() -> None:
    made = make_plan(compose(["recipe=auto", "hardware=h100_80gb_x1"]).job)
    speeds = [other["tokens_per_second"] for other in made.runners_up]
    assert len(speeds) > 3
    assert all(one > 0.97 * after for one, after in pairwise(speeds))  # what is 2% slower than the fastest is as good


def test_of_many_runners_up_the_first_are_printed_and_the_others_counted() -> None:
    console = Console(file=io.StringIO(), width=100)
    made = make_plan(job(hardware=HardwareConfig("h100_80gb", 8, 2)))
    runners_up = [reason for reason in made.reasons if reason.startswith("runner-up")]
    assert len(runners_up) > 5
    print_plan(made, console)
    said = console.file.getvalue()
    assert [reason in said for reason in runners_up[:5]] == [True] * 4 + [False]
    assert f"- and {len(runners_up) - 4} more of them in plan.json" in said
