"""Fit the efficiencies of preflight/coefficients.yaml to stored measurements; needs no GPU.

    python benchmarks/fit_speed.py benchmarks/results/memory-*.json

Cyclic search: each efficiency in turn is moved to where the mean squared logarithm of predicted over measured
tokens/s is least. Prints the lines to put into coefficients.yaml, and the errors before and after.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from memory import Case

from loadmaster.preflight.coefficients import coefficients
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.memory import replay_key
from loadmaster.preflight.search import fixed
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import find_shape
from loadmaster.preflight.speed import tokens_per_second
from loadmaster.preflight.step import training_step

FITTED = ("matmul", "half_size", "attention", "memory", "launch_us")
FACTORS = (0.8, 0.9, 0.97, 1.03, 1.1, 1.25)
ROUNDS = 60


def squared_error(rows: list[tuple[Any, Any, Setup, float]]) -> float:
    return sum(math.log(tokens_per_second(s, h, setup) / truth) ** 2 for s, h, setup, truth in rows) / len(rows)


def load(paths: list[Path], gpu: str) -> list[tuple[Any, Any, Setup, float]]:
    rows = []
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            if "measured" not in row:
                continue
            job = Case(**row["case"]).job(gpu)
            shape, hardware, plan = find_shape(job.model), from_catalog(gpu, 1), make_plan(job)
            setup = Setup(
                method=plan.method,
                precision=plan.precision,
                optimizer=plan.optimizer,
                master_weights=plan.master_weights,
                checkpointing=plan.activation_checkpointing,
                micro_batch_size=plan.micro_batch_size,
                **fixed(job, hardware, plan.activation_checkpointing),
            )
            training_step(shape, replay_key(setup, keep=False))  # replays are cached: the search below is quick
            rows.append((shape, hardware, setup, row["measured"]["tokens_per_second"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--gpu", default="h100_80gb")
    arguments = parser.parse_args()
    rows = load(arguments.results, arguments.gpu)
    table = coefficients()["efficiency"]
    best = squared_error(rows)
    print(f"{len(rows)} cases, root mean square error before {math.sqrt(best):.1%}")
    for _ in range(ROUNDS):
        for name in FITTED:
            here = table[name]["value"]
            tried = {}
            for factor in FACTORS:
                table[name]["value"] = here * factor
                tried[squared_error(rows)] = here * factor
            least = min(tried)
            table[name]["value"] = tried[least] if least < best else here
            best = min(best, least)
    worst = max(abs(tokens_per_second(s, h, setup) / truth - 1) for s, h, setup, truth in rows)
    print(f"after {math.sqrt(best):.1%}, worst {worst:.1%}")
    for name in FITTED:
        print(f"  {name}: {{value: {table[name]['value']:.4g}, kind: measured, card: {arguments.gpu}, ...}}")


if __name__ == "__main__":
    main()
