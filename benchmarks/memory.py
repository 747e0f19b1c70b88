"""Predicted against measured: peak memory and tokens/s of the real engine over a grid, on this machine's GPU.

    python benchmarks/memory.py                          the whole grid, a process a model size; 8 minutes on an H100
    python benchmarks/memory.py --model llama-3.2-1b     one size
    python benchmarks/memory.py --again results.json     predict stored measurements again, with the model as it is now

Weights are random, steps are the engine's own. Results go to benchmarks/results/memory-<date>-<card>.json with
card, driver and versions; each row holds the job, the prediction and the measurement.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from loadmaster.catalog import FOLDER
from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, LoraConfig, ModelConfig, OptimizerConfig
from loadmaster.preflight import Plan, make_plan

RESULTS = Path(__file__).with_name("results")
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class Case:
    model: str
    method: str
    sequence_length: int
    micro_batch_size: int
    checkpointing: str = "none"
    optimizer: str = "adamw"
    master_weights: bool = True
    rank: int = 16

    def job(self, gpu: str = "local") -> Job:
        name = json.loads((FOLDER / "shapes" / f"{self.model}.json").read_text())["names"][0]
        return Job(
            recipe="benchmark",
            model=ModelConfig(name=name),
            method=self.method,
            sequence_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            batch=BatchConfig(global_size=self.micro_batch_size),
            activation_checkpointing=self.checkpointing,
            offload="none",
            lora=LoraConfig(rank=self.rank),
            optimizer=OptimizerConfig(name=self.optimizer, master_weights=self.master_weights),
            hardware=HardwareConfig(gpu=gpu, count=1),
        )


def grid() -> list[Case]:
    """At least 40 cases over sizes, methods, lengths, rows, checkpointing and optimizers; small models first."""
    small, one, three, eight = "smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"
    cases = [
        Case(small, "lora", 512, 1),
        Case(small, "lora", 2048, 8),
        Case(small, "lora", 2048, 8, "full"),
        Case(small, "full", 512, 4),
        Case(small, "full", 2048, 8),
        Case(small, "full", 8192, 2, "full"),
        Case(small, "full", 2048, 4, optimizer="adamw_8bit", master_weights=False),
        Case(small, "full", 2048, 4, master_weights=False),
        Case(small, "qlora", 2048, 4),
        Case(one, "lora", 512, 1),
        Case(one, "lora", 4096, 1),
        Case(one, "lora", 2048, 8),
        Case(one, "lora", 8192, 2, "full"),
        Case(one, "lora", 4096, 2, rank=64),
        Case(one, "qlora", 512, 1),
        Case(one, "qlora", 4096, 2),
        Case(one, "qlora", 2048, 8, "full"),
        Case(one, "full", 2048, 1),
        Case(one, "full", 2048, 8),
        Case(one, "full", 8192, 2, "full"),
        Case(one, "full", 2048, 4, master_weights=False),
        Case(one, "full", 2048, 4, optimizer="adamw_8bit", master_weights=False),
        Case(one, "full", 2048, 4, optimizer="paged_adamw_8bit", master_weights=False),
        Case(one, "full", 2048, 4, optimizer="adafactor", master_weights=False),
        Case(three, "lora", 2048, 2),
        Case(three, "lora", 4096, 4, "full"),
        Case(three, "lora", 4096, 2),
        Case(three, "qlora", 2048, 2),
        Case(three, "qlora", 4096, 2, "full"),
        Case(three, "full", 2048, 1),
        Case(three, "full", 2048, 4, "full"),
        Case(three, "full", 4096, 1, master_weights=False),
        Case(three, "full", 2048, 2, optimizer="adamw_8bit", master_weights=False),
        Case(eight, "lora", 512, 1),
        Case(eight, "lora", 4096, 1),
        Case(eight, "lora", 2048, 4),
        Case(eight, "lora", 8192, 2, "full"),
        Case(eight, "lora", 4096, 1, "full", rank=64),
        Case(eight, "qlora", 512, 1),
        Case(eight, "qlora", 2048, 2),
        Case(eight, "qlora", 4096, 1),
        Case(eight, "qlora", 4096, 4, "full"),
        Case(eight, "qlora", 8192, 1, "full"),
        Case(eight, "full", 2048, 1, "full", optimizer="adamw_8bit", master_weights=False),
        Case(eight, "full", 2048, 2, optimizer="adamw_8bit", master_weights=False),
        Case(eight, "full", 4096, 1, "full", optimizer="paged_adamw_8bit", master_weights=False),
    ]
    return cases


def predicted(plan: Plan) -> dict[str, Any]:
    return {
        "allocated_gib": plan.peak_gib.allocated,
        "reserved_gib": plan.peak_gib.reserved,
        "device_gib": plan.peak_gib.device,
        "tokens_per_second": plan.tokens_per_second,
        "fits": plan.fits,
        "memory_gib": asdict(plan.memory_gib),
    }


def measure_case(case: Case) -> dict[str, Any]:
    import torch

    from loadmaster.preflight.shape import find_config
    from loadmaster.training.measure import measure

    job = case.job()
    plan = make_plan(job)
    row: dict[str, Any] = {"case": asdict(case), "predicted": predicted(plan)}
    start = time.perf_counter()
    try:
        row["measured"] = measure(job, plan, find_config(job.model)[0], steps=3, warm_up=2)
    except torch.OutOfMemoryError as error:
        row["failed"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # one case that fails must not lose the others
        row["failed"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    torch.cuda.empty_cache()
    return row


def run_model(model: str) -> None:
    """One size in this process; a JSON line for each case."""
    for case in grid():
        if case.model == model:
            print("ROW " + json.dumps(measure_case(case)), flush=True)


def run_all(models: list[str], out: Path | None) -> Path:
    rows: list[dict[str, Any]] = []
    for model in models:
        command = [sys.executable, __file__, "--model", model, "--rows"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout or ():
                if line.startswith("ROW "):
                    rows.append(json.loads(line[4:]))
                    print(one_line(rows[-1]), flush=True)
    card = about_the_card()
    name = card["card"].lower().replace("nvidia ", "").replace(" ", "_")
    out = out or RESULTS / f"memory-{datetime.date.today()}-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**card, "rows": rows}, indent=1) + "\n")
    return out


def about_the_card() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,memory.total", "--format=csv,noheader"]
    name, driver, power, memory = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    return {
        "date": str(datetime.date.today()),
        "card": name,
        "driver": driver,
        "power_limit": power,
        "memory": memory,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in VERSIONS},
    }


def predict_again(rows: list[dict[str, Any]]) -> None:
    """Replace the stored predictions by those of the model as it is now, for an H100."""
    for row in rows:
        row["predicted"] = predicted(make_plan(Case(**row["case"]).job("h100_80gb")))


def error(row: dict[str, Any], what: str) -> float:
    """Prediction over measurement, minus one. what: allocated_gib, reserved_gib, device_gib or tokens_per_second."""
    key = what if what == "tokens_per_second" else f"peak_{what}"
    return row["predicted"][what] / row["measured"][key] - 1


def one_line(row: dict[str, Any]) -> str:
    case = row["case"]
    label = (
        f"{case['model']:<14} {case['method']:<5} {case['micro_batch_size']:>2} x {case['sequence_length']:<5} "
        f"{case['checkpointing']:<4} {case['optimizer']:<16} master {case['master_weights']!s:<5} r{case['rank']:<3}"
    )
    if "measured" not in row:
        return f"{label} {row['failed']}"
    found = row["measured"]
    return (
        f"{label} allocated {found['peak_allocated_gib']:7.3f} GiB ({error(row, 'allocated_gib'):+.2%}), "
        f"device {found['peak_device_gib']:7.3f} ({error(row, 'device_gib'):+.1%}), "
        f"{found['tokens_per_second']:9.0f} tokens/s ({error(row, 'tokens_per_second'):+.0%})"
    )


def summarise(rows: list[dict[str, Any]]) -> str:
    measured = [row for row in rows if "measured" in row]
    lines = [f"{len(measured)} of {len(rows)} cases measured"]
    for what in ("allocated_gib", "reserved_gib", "device_gib", "tokens_per_second"):
        errors = sorted(abs(error(row, what)) for row in measured)
        if errors:
            at95 = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
            lines.append(f"{what:<18} median {median(errors):.2%}, 95th percentile {at95:.2%}, worst {errors[-1]:.2%}")
    false_fits = [row for row in rows if row["predicted"]["fits"] and "out of memory" in row.get("failed", "")]
    lines.append(f"planned to fit and ran out of memory: {len(false_fits)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = list(dict.fromkeys(case.model for case in grid()))
    parser.add_argument("--model", choices=models)
    parser.add_argument("--rows", action="store_true", help="print rows as JSON, in this process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", type=Path, help="a stored result to predict again; needs no GPU")
    arguments = parser.parse_args()
    if arguments.rows:
        run_model(arguments.model)
        return
    if arguments.again:
        rows = json.loads(arguments.again.read_text())["rows"]
        predict_again(rows)
        print("\n".join(map(one_line, rows)))
    else:
        out = run_all([arguments.model] if arguments.model else models, arguments.out)
        rows = json.loads(out.read_text())["rows"]
        print(out)
    print(summarise(rows))


if __name__ == "__main__":
    main()
