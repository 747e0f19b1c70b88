"""The page of answers says what is planned now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_can_i_train_x_on_y_is_what_the_plans_say() -> None:
    script = load("can_i_train")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python benchmarks/can_i_train.py"


def test_the_benchmark_grid_covers_what_the_bar_asks_for() -> None:
    grid = load("memory").grid()
    assert len(grid) >= 40 and len(set(grid)) == len(grid)
    assert {case.method for case in grid} == {"lora", "qlora", "full"}
    assert len({case.model for case in grid}) == 4 and {case.checkpointing for case in grid} == {"none", "full"}
    assert {case.optimizer for case in grid} == {"adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"}


def test_stored_measurements_are_predicted_again_and_summarised() -> None:
    script = load("memory")
    rows = [{"case": script.asdict(case)} for case in script.grid()[:3]]
    script.predict_again(rows)
    for row in rows:
        predicted = row["predicted"]
        row["measured"] = {
            "peak_allocated_gib": predicted["allocated_gib"], "peak_reserved_gib": predicted["reserved_gib"],
            "peak_device_gib": predicted["device_gib"] * 2, "tokens_per_second": predicted["tokens_per_second"],
        }  # fmt: skip
    said = script.summarise(
        [*rows, {"case": rows[0]["case"], "predicted": rows[0]["predicted"], "failed": "out of memory: x"}]
    )
    assert "3 of 4 cases measured" in said and "ran out of memory: 1" in said
    assert "device_gib         median 50.00%" in said
