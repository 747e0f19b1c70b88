"""Predicted against measured: peak memory and tokens/s of the real engine over a grid, on this machine's GPU.

    python benchmarks/memory.py                          the whole grid in one call; stops itself after 9 minutes
    python benchmarks/memory.py --minutes 25             more time: compiled layers at every size
    python benchmarks/memory.py --resume FILE            what FILE does not have yet, and what failed but for memory
    python benchmarks/memory.py --model llama-3.2-1b     one size
    python benchmarks/memory.py --dry-run                the same way through on a CPU, each case on a tiny model
    python benchmarks/memory.py --again FILE             predict stored measurements again, with the model as it is now

Weights are random, steps are the engine's own. Results go to benchmarks/results/memory-<date>-<card>.json with card,
driver and versions, written anew after each case; a row holds the job, the prediction and the measurement. A case that
runs out of memory is a row that says so; one that takes its process with it is too, and the next process goes on
after it. benchmarks/fit_speed.py makes coefficients of such files.
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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from loadmaster.catalog import FOLDER
from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, LoraConfig, ModelConfig, OptimizerConfig
from loadmaster.files import write_json
from loadmaster.preflight import Plan, make_plan
from loadmaster.preflight.nvml import local_gpus

RESULTS = Path(__file__).with_name("results")
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "torchao")
SMALL, ONE, THREE, EIGHT = "smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}


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
    precision: str = "auto"
    dropout: float = 0.0
    accumulation: int = 1
    objective: str = "sft"
    compile: bool = False
    checkpointed_layers: int | None = None

    def config(self) -> dict[str, Any]:
        if self.model == "tiny":
            return TINY
        return json.loads((FOLDER / "shapes" / f"{self.model}.json").read_text(encoding="utf-8"))["config"]

    def job(self, gpu: str = "local", folder: Path | None = None) -> Job:
        """folder: with the config.json of a model that is no shipped shape."""
        if folder is None:
            shape = json.loads((FOLDER / "shapes" / f"{self.model}.json").read_text(encoding="utf-8"))
            model = ModelConfig(name=shape["names"][0])
        else:
            model = ModelConfig(name=self.model, path=str(folder))
        precision = "bf16" if self.precision == "auto" and gpu != "cpu" else self.precision
        return Job(
            recipe="benchmark", model=model, method=self.method, precision=precision,
            sequence_length=self.sequence_length, micro_batch_size=self.micro_batch_size,
            batch=BatchConfig(global_size=self.micro_batch_size * self.accumulation),
            activation_checkpointing=self.checkpointing, checkpointed_layers=self.checkpointed_layers or "auto",
            offload="none", objective=self.objective,
            lora=LoraConfig(rank=self.rank, dropout=self.dropout), compile=self.compile,
            optimizer=OptimizerConfig(name=self.optimizer, master_weights=self.master_weights),
            hardware=HardwareConfig(gpu=gpu, count=1),
        )


def grid() -> list[Case]:
    """At least 40 cases over sizes, methods, lengths, rows, checkpointing and optimizers, none of them compiled; then
    those that compile, which take a minute each."""
    light = {"optimizer": "adamw_8bit", "master_weights": False}
    cases = [
        Case(SMALL, "lora", 512, 1),
        Case(SMALL, "lora", 2048, 8),
        Case(SMALL, "lora", 2048, 8, "full"),
        Case(SMALL, "full", 512, 4),
        Case(SMALL, "full", 2048, 8, accumulation=2),
        Case(SMALL, "full", 8192, 2, "full"),
        Case(SMALL, "full", 2048, 4, **light),
        Case(SMALL, "full", 2048, 4, "selective", optimizer="adamw_bf16", master_weights=False),
        Case(SMALL, "qlora", 2048, 4),
        Case(ONE, "lora", 512, 1),
        Case(ONE, "lora", 4096, 1),
        Case(ONE, "lora", 2048, 8, dropout=0.05),
        Case(ONE, "lora", 8192, 2, "full"),
        Case(ONE, "lora", 4096, 2, rank=64),
        Case(ONE, "lora", 4096, 2, objective="dpo"),
        Case(ONE, "qlora", 512, 1),
        Case(ONE, "qlora", 4096, 2, "selective"),
        Case(ONE, "qlora", 2048, 8, "full"),
        Case(ONE, "full", 2048, 1),
        Case(ONE, "full", 2048, 8, accumulation=2),
        Case(ONE, "full", 8192, 2, "full"),
        Case(ONE, "full", 2048, 4, master_weights=False),
        Case(ONE, "full", 2048, 4, **light),
        Case(ONE, "full", 2048, 4, optimizer="adafactor", master_weights=False),
        # The last of its process: what bitsandbytes pages stays on the card until the process ends.
        Case(ONE, "full", 2048, 4, optimizer="paged_adamw_8bit", master_weights=False),
        Case(THREE, "lora", 2048, 2),
        Case(THREE, "lora", 4096, 4, "full"),
        Case(THREE, "lora", 4096, 2, "selective"),
        Case(THREE, "lora", 4096, 2, precision="fp8"),
        Case(THREE, "qlora", 2048, 2),
        Case(THREE, "qlora", 4096, 2, "full", accumulation=2),
        Case(THREE, "full", 2048, 1),
        Case(THREE, "full", 2048, 4, "full"),
        Case(THREE, "full", 4096, 1, master_weights=False),
        Case(THREE, "full", 2048, 2, **light),
        Case(EIGHT, "lora", 512, 1),
        Case(EIGHT, "lora", 4096, 1),
        Case(EIGHT, "lora", 2048, 4),
        Case(EIGHT, "lora", 8192, 2, "full"),
        Case(EIGHT, "lora", 4096, 2, "selective", rank=64),
        Case(EIGHT, "lora", 8192, 2, "full", checkpointed_layers=24),
        Case(EIGHT, "lora", 2048, 2, precision="fp8"),
        Case(EIGHT, "lora", 4096, 2, "full", precision="fp8"),
        Case(EIGHT, "qlora", 512, 1),
        Case(EIGHT, "qlora", 2048, 2),
        Case(EIGHT, "qlora", 4096, 1, dropout=0.05),
        Case(EIGHT, "qlora", 4096, 4, "full"),
        Case(EIGHT, "qlora", 8192, 1, "full"),
        Case(EIGHT, "full", 2048, 1, "full", **light),
        Case(EIGHT, "full", 2048, 2, **light),
    ]
    compiled = [
        Case(EIGHT, "lora", 2048, 2),
        Case(EIGHT, "qlora", 2048, 2),
        Case(EIGHT, "lora", 2048, 4, precision="fp8"),
        Case(THREE, "full", 2048, 4, "selective", optimizer="adamw_bf16", master_weights=False),
        Case(ONE, "full", 2048, 8),
        Case(ONE, "lora", 4096, 2),
        Case(EIGHT, "qlora", 4096, 4, "full"),
        Case(EIGHT, "qlora", 8192, 2, "full", checkpointed_layers=16),
        Case(EIGHT, "lora", 4096, 2, "selective"),
        Case(SMALL, "full", 2048, 8),
    ]
    return cases + [replace(case, compile=True) for case in compiled]


def dry(case: Case) -> Case:
    """The same settings at a size that a CPU runs in a second."""
    precision = "auto" if case.precision == "fp8" else case.precision  # a processor has no fp8
    return replace(
        case, model="tiny", sequence_length=case.sequence_length // 64, micro_batch_size=min(2, case.micro_batch_size),
        precision=precision, rank=4, compile=False, master_weights=False,
        checkpointed_layers=case.checkpointed_layers and 2,
    )


def predicted(plan: Plan) -> dict[str, Any]:
    return {
        "allocated_gib": plan.peak_gib.allocated,
        "reserved_gib": plan.peak_gib.reserved,
        "device_gib": plan.peak_gib.device,
        "tokens_per_second": plan.tokens_per_second,
        "fits": plan.fits,
        "memory_gib": asdict(plan.memory_gib),
        "phases_gib": asdict(plan.phases_gib),
    }


def measure_case(case: Case, dry_run: bool, folder: Path | None) -> dict[str, Any]:
    import torch
    from measure import measure

    row: dict[str, Any] = {"case": asdict(case)}
    start = time.perf_counter()
    try:
        small = dry(case) if dry_run else case
        job = small.job("cpu" if dry_run else "local", folder)
        plan = make_plan(job, with_alternatives=False)
        row["predicted"] = predicted(plan)
        row["measured"] = measure(job, plan, small.config(), steps=1 if dry_run else 3, warm_up=1 if dry_run else 2)
    except torch.OutOfMemoryError as error:
        row["failed"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # one case that fails must not lose the others
        row["failed"] = f"{type(error).__name__}: {error}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def run_some(indices: list[int], dry_run: bool, folder: Path | None) -> None:
    """These cases of the grid in this process; a JSON line for each."""
    cases = grid()
    for index in indices:
        print("AT " + str(index), flush=True)
        print("ROW " + json.dumps([index, measure_case(cases[index], dry_run, folder)]), flush=True)


def run_all(indices: list[int], out: Path, about: dict[str, Any], minutes: float, dry_run: bool) -> list[dict]:
    """Run the cases, a process for each size (and a new one after one that died), until the time is up."""
    cases, deadline = grid(), time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = about["rows"]
    folder = out.with_suffix(".model")
    if dry_run:
        write_json(folder / "config.json", TINY)
    while indices and time.monotonic() < deadline:
        first = cases[indices[0]]
        group = [i for i in indices if cases[i].model == first.model and cases[i].compile == first.compile]
        done = _run_group(group, rows, out, about, deadline, folder if dry_run else None)
        indices = [i for i in indices if i not in done]
    if indices:
        print(f"time is up: {len(indices)} cases left; go on with --resume {out}")
    return rows


def is_settled(row: dict[str, Any]) -> bool:
    """Whether a case need not run again: it was measured, or there was no room for it."""
    return "out of memory" in row.get("failed", "out of memory")


def _run_group(
    group: list[int], rows: list[dict], out: Path, about: dict[str, Any], deadline: float, folder: Path | None
) -> set[int]:
    """Cases of one size in one process; those that are done, the one that ended the process included."""
    command = [sys.executable, __file__, "--cases", ",".join(map(str, group))]
    command += ["--dry-run", "--folder", str(folder)] if folder is not None else []
    places = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    done: set[int] = set()
    at: int | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            if line.startswith("AT "):
                at = int(line[3:])
                if time.monotonic() > deadline:
                    process.terminate()
                    return done
            elif line.startswith("ROW "):
                index, row = json.loads(line[4:])
                done.add(index)
                _keep(row, rows, out, about)
    if process.returncode and at is not None and at not in done:
        _keep({"case": asdict(grid()[at]), "failed": f"its process ended with {process.returncode}"}, rows, out, about)
        done.add(at)
    elif at is None:
        raise SystemExit(f"no case ran: the process ended with {process.returncode}")
    return done


def _keep(row: dict[str, Any], rows: list[dict], out: Path, about: dict[str, Any]) -> None:
    rows.append(row)
    write_json(out, {**about, "rows": rows})
    print(one_line(row), flush=True)


def about_the_card() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL).splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        said = [next((name for name, *_ in local_gpus()), "cpu"), "", "", ""]  # some containers lack the program alone
    return {
        "date": str(datetime.date.today()),
        **dict(zip(("card", "driver", "power_limit", "memory"), said, strict=False)),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in VERSIONS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def predict_again(rows: list[dict[str, Any]], gpu: str = "h100_80gb") -> None:
    """Replace the stored predictions by those of the model as it is now."""
    for row in rows:
        row["predicted"] = predicted(make_plan(Case(**row["case"]).job(gpu), with_alternatives=False))


def error(row: dict[str, Any], what: str) -> float | None:
    """Prediction over measurement, minus one. what: allocated_gib, reserved_gib, device_gib or tokens_per_second."""
    key = what if what == "tokens_per_second" else f"peak_{what}"
    said, seen = row["predicted"][what], row["measured"][key]
    return None if said is None or not seen else said / seen - 1


def one_line(row: dict[str, Any]) -> str:
    case = Case(**row["case"])
    options = [case.precision] * (case.precision != "auto") + [f"dropout {case.dropout}"] * (case.dropout > 0)
    options += [f"x {case.accumulation}"] * (case.accumulation > 1) + [case.objective] * (case.objective != "sft")
    options += [f"{case.checkpointed_layers} layers"] * (case.checkpointed_layers is not None)
    options += ["compiled"] * case.compile + ["masters"] * case.master_weights + [f"r{case.rank}"] * (case.rank != 16)
    label = (
        f"{case.model:<13} {case.method:<5} {case.micro_batch_size:>2} x {case.sequence_length:<5} "
        f"{case.checkpointing:<9} {case.optimizer:<16} {' '.join(options):<20}"
    )
    if "measured" not in row:
        return f"{label} {row['failed']}"
    found = row["measured"]
    shown = {what: error(row, what) for what in ("allocated_gib", "device_gib", "tokens_per_second")}
    said = {what: "not predicted" if off is None else f"{off:+.2%}" for what, off in shown.items()}
    return (
        f"{label} allocated {found['peak_allocated_gib']:7.3f} GiB ({said['allocated_gib']}), "
        f"device {found['peak_device_gib']:7.3f} ({said['device_gib']}), "
        f"{found['tokens_per_second']:9.0f} tokens/s ({said['tokens_per_second']}), {row.get('seconds', 0):.0f} s"
    )


def summarise(rows: list[dict[str, Any]]) -> str:
    measured = [row for row in rows if "measured" in row]
    lines = [f"{len(measured)} of {len(rows)} cases measured"]
    for what in ("allocated_gib", "reserved_gib", "device_gib", "tokens_per_second"):
        errors = sorted(abs(off) for row in measured if (off := error(row, what)) is not None)
        if errors:
            at95 = errors[min(len(errors) - 1, int(0.95 * len(errors)))]
            lines.append(f"{what:<18} median {median(errors):.2%}, 95th percentile {at95:.2%}, worst {errors[-1]:.2%}")
    false_fits = [row for row in rows if row.get("predicted", {}).get("fits") and "out of mem" in row.get("failed", "")]
    refused = [row for row in measured if not row["predicted"]["fits"]]
    lines.append(f"planned to fit and ran out of memory: {len(false_fits)}; refused and ran: {len(refused)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(dict.fromkeys(case.model for case in grid())))
    parser.add_argument("--minutes", type=float, default=9.0, help="no case is begun later than this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path, help="a stored result to complete")
    parser.add_argument("--again", type=Path, help="a stored result to predict again; needs no GPU")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU: the script's own check")
    parser.add_argument("--cases", help=argparse.SUPPRESS)  # in a process of their own: numbers in the grid
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.cases:
        run_some([int(part) for part in told.cases.split(",")], told.dry_run, told.folder)
        return
    if told.again:
        rows = json.loads(told.again.read_text(encoding="utf-8"))["rows"]
        predict_again(rows)
        print("\n".join(map(one_line, rows)))
        print(summarise(rows))
        return
    about = {**about_the_card(), "rows": []}
    if told.resume:
        about = json.loads(told.resume.read_text(encoding="utf-8"))
        about["rows"] = [row for row in about["rows"] if is_settled(row)]
    card = about["card"].lower().replace("nvidia ", "").replace(" ", "_")
    out = told.resume or told.out or RESULTS / f"memory-{about['date']}-{card}.json"
    have = [row["case"] for row in about["rows"]]
    wanted = [
        index for index, case in enumerate(grid())
        if asdict(case) not in have and told.model in (None, case.model)
    ]
    rows = run_all(wanted, out, about, told.minutes, told.dry_run)
    print(out)
    print(summarise(rows))


if __name__ == "__main__":
    main()
