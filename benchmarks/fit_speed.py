"""Fit the coefficients of preflight/coefficients.yaml to stored measurements; needs no GPU and takes seconds.

    python benchmarks/fit_speed.py benchmarks/results/memory-*.json

Speed: cyclic search; each efficiency in turn is moved to where the mean squared logarithm of predicted over measured
tokens/s is least. Memory: what is measured beside the replay (context, workspaces, fragmentation) is read off, each as
a median. Prints the lines to put into coefficients.yaml, and the errors before and after.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from memory import Case

from loadmaster.preflight.candidate import fixed
from loadmaster.preflight.coefficients import coefficients, value
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.hardware import Hardware, from_catalog
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.memory import peaks, train_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.speed import tokens_per_second

FITTED = (
    ("efficiency", "matmul"), ("efficiency", "half_size"), ("efficiency", "attention"), ("efficiency", "memory"),
    ("efficiency", "launch_us"), ("efficiency", "fp8_matmul"), ("efficiency", "fp8_row_matmul"),
    ("compiled", "kernels"),
)
"""What only a card can tell; what compiled layers move is read off their code (tests/models/test_gpu_code.py)."""
FACTORS = (0.8, 0.9, 0.97, 1.03, 1.1, 1.25)
ROUNDS = 60
Row = tuple[ModelShape, Hardware, Setup, dict[str, Any]]


def load(paths: list[Path], gpu: str) -> list[Row]:
    rows = []
    for path in paths:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if "measured" not in row:
                continue
            job = Case(**row["case"]).job(gpu)
            shape, hardware = find_shape(job.model), from_catalog(gpu, 1)
            plan = make_plan(job, with_alternatives=False)
            setup = Setup(
                method=plan.method, precision=plan.precision, optimizer=plan.optimizer,
                master_weights=plan.master_weights, checkpointing=plan.activation_checkpointing,
                kept_layers=plan.kept_layers,
                micro_batch_size=plan.micro_batch_size, gradient_accumulation_steps=plan.gradient_accumulation_steps,
                **fixed(job, hardware, plan.method, plan.activation_checkpointing,
                        plan.micro_batch_size * job.sequence_length),
            )
            rows.append((shape, hardware, setup, row["measured"]))
    return rows


def logarithm(row: Row) -> float:
    """Of predicted over measured tokens/s. Replays are cached, so the search is quick."""
    shape, hardware, setup, measured = row
    return math.log(tokens_per_second(shape, hardware, setup) / measured["tokens_per_second"])


def squared_error(rows: list[Row]) -> float:
    return sum(logarithm(row) ** 2 for row in rows) / len(rows)


def fit_speed(rows: list[Row]) -> tuple[float, float]:
    """Move the efficiencies to where the error is least; (root mean square error before, after)."""
    table = coefficients()
    before = best = squared_error(rows)
    for _ in range(ROUNDS):
        moved = False
        for group, name in FITTED:
            here = table[group][name]["value"]
            tried = {}
            for factor in FACTORS:
                table[group][name]["value"] = here * factor
                tried[squared_error(rows)] = here * factor
            least = min(tried)
            table[group][name]["value"] = tried[least] if least < best else here
            moved = moved or least < best
            best = min(best, least)
        if not moved:
            break
    return math.sqrt(before), math.sqrt(best)


def fit_memory(rows: list[Row]) -> dict[str, tuple[float, float, float]]:
    """Coefficient -> (median, least, largest) of what the measurements leave for it."""
    context = [m["peak_device_gib"] - m["peak_reserved_gib"] for *_, m in rows]
    share = [m["peak_reserved_gib"] / m["peak_allocated_gib"] - 1 for *_, m in rows]
    workspaces = []
    for shape, hardware, setup, measured in rows:
        if setup.compiled:  # what its kernels take inside themselves is not counted
            continue
        replayed = peaks(hardware, train_bytes(shape, hardware, setup).total).allocated
        workspaces.append(measured["peak_allocated_gib"] - replayed + value("context", "cublas_workspace_gib"))
    found = {"context.cuda_gib": context, "fragmentation.share": share, "context.cublas_workspace_gib": workspaces}
    return {name: (median(values), min(values), max(values)) for name, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--gpu", default="h100_80gb")
    told = parser.parse_args()
    rows = load(told.results, told.gpu)
    if not rows:
        raise SystemExit("no row in these files was measured")
    before, after = fit_speed(rows)
    worst = max(abs(math.expm1(logarithm(row))) for row in rows)
    print(f"{len(rows)} cases; tokens/s: root mean square error {before:.1%}, fitted {after:.1%}, worst {worst:.1%}")
    for group, name in FITTED:
        print(f"  {group}.{name}: {{value: {value(group, name):.4g}, kind: measured, card: {told.gpu}, ...}}")
    print("memory, as median (least to largest); a workspace far from the others is a term that the replay lacks")
    for name, (middle, least, largest) in fit_memory(rows).items():
        print(
            f"  {name}: {{value: {middle:.4g}, kind: measured, card: {told.gpu}, ...}}  # {least:.4g} to {largest:.4g}"
        )


if __name__ == "__main__":
    main()
