"""Tokens a second and GiB of every rung of the ladder, and of the peers beside it, in one run on one GPU.

    python benchmarks/speed.py                                        everything, in less than nine minutes
    python benchmarks/speed.py --only bar1,bar3 --budget 540          some of it; --out adds to the same file
    python benchmarks/speed.py --only bar5 --budget 900               very long rows: ten minutes or more by themselves
    python benchmarks/speed.py --name 342,733 --budget 595 --folder F the longest alone, where a command may take ten
    python benchmarks/speed.py --peer trl=/opt/trl/bin/python --peer unsloth=/opt/unsloth/bin/python
    python benchmarks/speed.py --peer-folder unsloth=/opt/unsloth     installed with pip install --target
    python benchmarks/speed.py --shape tiny --peer trl=python         what the tests run, on a CPU

Every rung is a process of its own with a time limit; all load the same checkpoint (random weights of the shape, made
here) and read the same token ids: rows of one document (`full`), or documents as long as instruction data has them
(`short`: log-normal, median 90 tokens, longest 1,024). After each, benchmarks/results/speed-<date>-<card>.json and .md
are written anew. A rung that the budget leaves no time for is in them as not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "torchao")
LIMIT_S = 240
"""Of one rung that names no limit of its own."""
CHECKPOINT_S = 400
"""Of the checkpoint that a size's rungs load: 16 GB are written, which a slow disk takes minutes for."""
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}
LIGHT = {"name": "adamw_bf16", "master_weights": False}
LORA = {"method": "lora", "precision": "bf16"}


def rung(bar: str, name: str, shape: str = "llama-3.1-8b", **settings: Any) -> dict[str, Any]:
    common = {
        "kind": "run", "documents": "full", "sequence_length": 2048, "micro_batch_size": 2, "steps": 8, "warm_up": 3,
        "activation_checkpointing": "none", "compile": True,
    }
    return {"bar": bar, "name": name, "shape": shape, **common, **settings}


def peer(bar: str, name: str, who: str, shape: str = "llama-3.1-8b", **settings: Any) -> dict[str, Any]:
    return rung(bar, name, shape, kind="peer", peer=who, checkpointing=True, **settings)


def ladder() -> list[dict[str, Any]]:
    """Each rung adds one thing to the one before, on LoRA of an 8B over short documents."""
    base = {**LORA, "documents": "short", "activation_checkpointing": "full", "compile": False}
    return [
        rung("ladder", "baseline: padded rows, whole logits, checkpointing", loss="plain", **base),
        rung("ladder", "+ packing, under a mask", loss="packed", **base),
        rung("ladder", "+ variable-length attention", loss="varlen", **base),
        rung("ladder", "+ fused loss", **base),
        rung("ladder", "+ compiled layers", **{**base, "compile": True}),
        rung(
            "ladder", "+ selective checkpointing", **{**base, "compile": True, "activation_checkpointing": "selective"}
        ),
        rung("ladder", "+ no checkpointing", **{**base, "compile": True, "activation_checkpointing": "none"}),
        rung("ladder", "+ frozen base in fp8", **LORA | {"precision": "fp8", "documents": "short"}),
        rung(
            "ladder",
            "+ micro-batch of 4",
            **LORA | {"precision": "fp8", "documents": "short"} | {"micro_batch_size": 4},
        ),
    ]


def bars() -> list[dict[str, Any]]:
    open_ = {"precision": "auto", "activation_checkpointing": "auto", "compile": "auto", "micro_batch_size": "auto"}
    three, qlora = "llama-3.2-3b", {"method": "qlora"}
    return [
        rung("ceiling", "one product of 8192 x 8192 x 8192", kind="ceiling"),
        rung("bar1", "lora, as planned", method="lora", global_size=16, **open_),
        rung("bar1", "lora, bf16", **LORA),
        rung("bar1", "lora, fp8, micro-batch of 4", **LORA | {"precision": "fp8", "micro_batch_size": 4}),
        rung("bar2", "qlora, full checkpointing", **qlora, activation_checkpointing="full"),
        rung("bar2", "qlora, full checkpointing, inputs in host memory", **qlora, activation_checkpointing="offload"),
        rung(
            "bar2", "qlora, the same with 8-bit states", **qlora, activation_checkpointing="offload",
            optimizer={"name": "adamw_8bit", "master_weights": True},
        ),
        rung("bar2", "qlora, no checkpointing", **qlora),
        peer("bar2", "TRL, qlora", "trl", **qlora),
        peer("bar2", "TRL with Liger, qlora", "trl", **qlora, liger=True),
        peer("bar2", "Unsloth, qlora", "unsloth", **qlora),
        peer("bar2", "Unsloth, qlora, no checkpointing", "unsloth", **qlora) | {"checkpointing": False},
        rung("bar3", "full, bf16", three, method="full", precision="bf16", micro_batch_size=4, optimizer=LIGHT),
        rung("bar3", "full, fp8", three, method="full", precision="fp8", micro_batch_size=4, optimizer=LIGHT),
        peer("bar3", "TRL, full", "trl", three, method="full", micro_batch_size=4),
        peer("bar3", "TRL with Liger, full", "trl", three, method="full", micro_batch_size=4, liger=True),
        peer("bar3", "Unsloth, full", "unsloth", three, method="full", micro_batch_size=4),
        *ladder(),
        peer("bar4", "TRL, lora, its defaults", "trl", method="lora", documents="short", micro_batch_size=8),
        *(
            rung(
                "bar5", f"qlora, one row of {tokens:,} tokens in {gib or 80} GB", **qlora, sequence_length=tokens,
                activation_checkpointing="offload", compile=False, micro_batch_size=1, steps=1,
                warm_up=warm_up, memory_gib=gib, limit_s=limit_s,
            )
            # Attention alone is 4.5 x 32 layers x 2 x 4,096 x tokens^2 FLOPs: minutes for a step of the longer row.
            for tokens, gib, warm_up, limit_s in ((78_475, 24, 1, 240), (342_733, None, 0, 590))
        ),
        rung("bar6", "command to first step, nothing cached", kind="start", fresh=True),
        rung("bar6", "command to first step, compiled before", kind="start"),
        # Last, for what the budget leaves: 72 GiB by the plan, which an H100 just holds and an H200 easily.
        rung("bar3", "full 8B, bf16", method="full", precision="bf16", micro_batch_size=4, optimizer=LIGHT),
        rung("bar3", "full 8B, fp8", method="full", precision="fp8", micro_batch_size=4, optimizer=LIGHT),
        peer("bar3", "TRL with Liger, full 8B", "trl", method="full", micro_batch_size=4, liger=True),
        peer("bar3", "Unsloth, full 8B", "unsloth", method="full", micro_batch_size=4),
    ]


def on_a_cpu(each: dict[str, Any]) -> dict[str, Any]:
    """The same rung at a size that says nothing of speed and shows that it runs."""
    small = {"shape": "tiny", "sequence_length": 64, "steps": 2, "warm_up": 1, "precision": "auto", "memory_gib": None}
    rows = each["micro_batch_size"] if each["micro_batch_size"] == "auto" else 2
    return {**each, **small, "micro_batch_size": rows}


class Run:
    """What is measured so far, and where it is written."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.folder = arguments, folder
        self.began = time.monotonic()
        self.about = about_the_machine()
        self.about["command"] = shlex.join(["python", *sys.argv])
        name = self.about["card"].lower().replace("nvidia ", "").replace(" ", "_")
        self.out: Path = arguments.out or RESULTS / f"speed-{datetime.date.today()}-{name}.json"
        earlier = json.loads(self.out.read_text())["rows"] if self.out.exists() else []
        self.rows: list[dict[str, Any]] = earlier
        self.peers = {name: (python, None) for name, python in arguments.peer}
        self.peers |= {name: (sys.executable, target) for name, target in arguments.peer_folder}

    @property
    def left_s(self) -> float:
        return self.arguments.budget - (time.monotonic() - self.began)

    def measure(self, each: dict[str, Any]) -> None:
        start = time.monotonic()
        row = {"bar": each["bar"], "name": each["name"], "settings": each}
        if each["kind"] == "peer" and each["peer"] not in self.peers:
            row["not_run"] = f"no environment was given (--peer {each['peer']}=PYTHON)"
        elif self.left_s < 10:
            row["not_run"] = f"the {self.arguments.budget} s of the budget were spent"
        else:
            row |= self.start(each) if each["kind"] == "start" else self.spawn(self.placed(each))
        row["seconds"] = round(time.monotonic() - start, 1)
        self.rows = [r for r in self.rows if (r["bar"], r["name"]) != (row["bar"], row["name"])] + [row]
        self.write()
        print(one_line(row), flush=True)

    def placed(self, each: dict[str, Any]) -> dict[str, Any]:
        """The rung with its checkpoint and documents, which are made where they are not there."""
        if each["kind"] == "ceiling":
            return each
        model = self.folder / each["shape"]
        config = TINY if each["shape"] == "tiny" else shape_config(each["shape"])
        if not (model / "tokenizer_config.json").is_file():
            made = self.spawn({"kind": "checkpoint", "model": str(model), "config": config, "limit_s": CHECKPOINT_S})
            if "failed" in made:
                raise SystemExit(f"no checkpoint of {each['shape']}: {made['failed']}")
        documents = self.folder / f"{each['shape']}-{each['documents']}-{each['sequence_length']}.jsonl"
        if not documents.exists():
            write_documents(documents, each["documents"], each["sequence_length"], config["vocab_size"])
        return {**each, "model": str(model), "documents": str(documents)}

    def spawn(self, placed: dict[str, Any]) -> dict[str, Any]:
        """Run a rung in its own process; {"failed": why} when it gives no row."""
        python, target = self.peers[placed["peer"]] if placed["kind"] == "peer" else (sys.executable, None)
        script = HERE / ("speed_peers.py" if placed["kind"] == "peer" else "speed_rungs.py")
        path = self.folder / "rung.json"
        path.write_text(json.dumps(placed))
        environment = dict(os.environ)
        places = [target] if target else [] if placed["kind"] == "peer" else [str(ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
        limit = max(5.0, min(placed.get("limit_s", LIMIT_S), self.left_s))
        try:
            done = subprocess.run(
                [python, str(script), str(path)], capture_output=True, text=True, timeout=limit, env=environment,
                cwd=self.folder, check=False,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {limit:.0f} s"}
        except OSError as error:
            return {"failed": str(error)}
        rows = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if rows:
            return json.loads(rows[-1])
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"failed": last[0][:300]}

    def start(self, each: dict[str, Any]) -> dict[str, Any]:
        """Seconds from the command to the first step's line in metrics.jsonl."""
        placed = self.placed(each)
        chats = self.folder / "chats.jsonl"
        if not chats.exists():
            talk = {
                "messages": [{"role": "user", "content": "question " * 40}, {"role": "assistant", "content": "answer"}]
            }
            chats.write_text((json.dumps(talk) + "\n") * 400)
        run_dir, cache = self.folder / each["name"].replace(" ", "-").replace(",", ""), self.folder / "cache"
        for left in (run_dir, *[cache] * each.get("fresh", False)):  # of an earlier call: its first step is no news
            shutil.rmtree(left, ignore_errors=True)
        small = ["sequence_length=512"] if each["shape"] == "tiny" else []
        command = [
            sys.executable, str(ROOT / "train.py"), "recipe=lora_8b", f"model.path={placed['model']}", "data=file",
            f"data.path={chats}", f"run_dir={run_dir}", "max_steps=1", "stop_after=train", "tracker=none", *small,
        ]
        # Triton's own folder is one for all runs of a machine: other rungs' kernels lie in it.
        caches = {"LOADMASTER_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        environment = {**os.environ, **caches, "HF_HUB_OFFLINE": "1"}
        began, limit = time.monotonic(), max(5.0, min(LIMIT_S, self.left_s))
        log = self.folder / "start.log"
        with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
            metrics = run_dir / "metrics.jsonl"
            while process.poll() is None and time.monotonic() - began < limit:
                if metrics.exists() and metrics.stat().st_size:
                    seconds = time.monotonic() - began
                    process.wait()
                    return {"first_step_s": seconds} | parts_of_start(run_dir / "result.json")
                time.sleep(0.1)
            ended = process.poll()
            process.kill()
        last = log.read_text().strip().splitlines()[-1:] or [""]
        why = f"no step within {limit:.0f} s" if ended is None else f"it ended with {ended} before a step"
        return {"failed": f"{why}: {last[0][:300]}"}

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")
        self.out.with_suffix(".md").write_text(page(self.about, self.rows))


def parts_of_start(result: Path) -> dict[str, Any]:
    """Where a start's seconds went, by the run itself (docs/training.md); {} where it has not said."""
    if not result.is_file():
        return {}
    known = json.loads(result.read_text())
    return {key: known[key] for key in ("start_s", "compiler_cache") if known.get(key)}


def shape_config(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "loadmaster" / "catalog" / "shapes" / f"{name}.json").read_text())["config"]


def write_documents(path: Path, kind: str, length: int, vocabulary: int) -> None:
    """Token ids and labels, a document a line: 64 of `length` tokens, or short ones, two thirds of each trained."""
    draw = np.random.default_rng(0)
    count = 64 if kind == "full" and length <= 8192 else 2 if kind == "full" else 4000
    sizes = np.full(count, length)
    if kind == "short":
        sizes = np.clip(draw.lognormal(np.log(min(90, length / 4)), 0.8, count), 8, min(1024, length)).astype(int)
    with open(path, "w", encoding="utf-8") as file:
        for size in sizes.tolist():
            ids = draw.integers(0, vocabulary, size).tolist()
            labels = ids if kind == "full" else [-100] * (size // 3) + ids[size // 3 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def about_the_machine() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,memory.total", "--format=csv,noheader"]
    try:
        card, driver, power, memory = subprocess.check_output(query, text=True).splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        from loadmaster.preflight.nvml import local_gpus

        # Some containers lack the program alone.
        card, driver, power, memory = next((name for name, *_ in local_gpus()), "cpu"), "none", "unknown", "unknown"
    return {
        "date": str(datetime.date.today()), "card": card, "driver": driver, "power_limit": power, "memory": memory,
        "python": platform.python_version(), "versions": {package: _version(package) for package in VERSIONS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the rungs that need it say so
        return None


def one_line(row: dict[str, Any]) -> str:
    what = row.get("not_run") or row.get("failed")
    said = f"{row['bar']:<8} {row['name']:<52} "
    if what:
        return said + what
    if "tokens_per_second" in row:
        return said + f"{row['tokens_per_second']:10,.0f} tokens/s {row.get('peak_allocated_gib') or 0:7.2f} GiB"
    return said + ", ".join(f"{k} {row[k]:.1f}" for k in row if k.endswith(("_s", "tflops")) and k != "start_s")


def page(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# Speed on {about['card']}, {about['date']}", "",
        f"Driver {about['driver']}, power limit {about['power_limit']}, memory {about['memory']}, Python "
        f"{about['python']}, {versions}.", "", f"    {about['command']}", "",
        "Tokens leave padding out. GiB are the peak that PyTorch allocated. Random weights, so losses say nothing.", "",
        "| | rung | tokens/s | trained tokens/s | GiB | padding | first step, s | compiled anew | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        figures = [
            _said(row, "tokens_per_second", ",.0f"), _said(row, "trained_tokens_per_second", ",.0f"),
            _said(row, "peak_allocated_gib", ".2f"), _said(row, "padding", ".1%"), _said(row, "first_step_s", ".1f"),
            _said(row, "recompilations", "d"),
        ]
        notes = [verdict(row, rows), beside_peers(row, rows), of_the_ceiling(row, rows)]
        note = row.get("not_run") or row.get("failed") or _products(row) or _start(row)
        note = note or "; ".join(filter(None, notes))
        lines.append("| " + " | ".join([row["bar"], row["name"], *figures, note]) + " |")
    return "\n".join(lines) + "\n"


def _start(row: dict[str, Any]) -> str:
    """The parts of a start, and how many graphs the compiler found in its cache."""
    parts = [f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in row.get("start_s", {}).items()]
    graphs = row.get("compiler_cache", {})
    return ", ".join(parts + [f"{count} graphs {name}" for name, count in graphs.items()])


def _products(row: dict[str, Any]) -> str:
    return ", ".join(f"{key.split('_')[0]} {row[key]:,.0f} TFLOP/s" for key in row if key.endswith("_tflops"))


def _said(row: dict[str, Any], key: str, how: str) -> str:
    return "" if row.get(key) is None else format(row[key], how)


def verdict(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Of a rung of the ladder, what it brought over the one before; one that brought nothing does not pay."""
    steps = [r for r in rows if r["bar"] == "ladder" and "tokens_per_second" in r]
    if row not in steps[1:]:
        return ""
    before = steps[steps.index(row) - 1]
    gain = row["trained_tokens_per_second"] / before["trained_tokens_per_second"] - 1
    if gain > 0 or not (row.get("peak_allocated_gib") and before.get("peak_allocated_gib")):
        return f"{gain:+.0%}"
    saved = before["peak_allocated_gib"] - row["peak_allocated_gib"]
    return f"{gain:+.0%}, {saved:.1f} GiB less" if saved > 0 else f"{gain:+.0%}: does not pay"


def beside_peers(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Trained tokens a second over those of the best peer at its job, of one that recomputes alike if there is."""
    if not is_ours(row):
        return ""
    job = [row["settings"].get(key) for key in ("shape", "method", "documents")]
    peers = [
        peer for peer in rows
        if peer["settings"]["kind"] == "peer" and "trained_tokens_per_second" in peer
        and job == [peer["settings"].get(key) for key in ("shape", "method", "documents")]
    ]
    recomputes = row["settings"]["activation_checkpointing"] != "none"
    alike = [peer for peer in peers if peer["settings"]["checkpointing"] == recomputes] or peers
    if not alike:
        return ""
    best = max(alike, key=lambda peer: peer["trained_tokens_per_second"])
    return f"{row['trained_tokens_per_second'] / best['trained_tokens_per_second']:.2f}x {best['name']}"


def of_the_ceiling(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The share of the measured product of bf16 that the model's own FLOPs take, without what is recomputed."""
    ceiling = next((each["bf16_tflops"] for each in rows if "bf16_tflops" in each), None)
    each = row.get("plan", {}).get("flops_per_token")
    if ceiling is None or each is None or not is_ours(row):
        return ""
    return f"{row['tokens_per_second'] * each / 1e12 / ceiling:.0%} of bf16's ceiling"


def is_ours(row: dict[str, Any]) -> bool:
    return row["settings"]["kind"] == "run" and "tokens_per_second" in row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair = {"action": "append", "default": [], "type": lambda text: tuple(text.split("=", 1))}
    parser.add_argument("--only", help="ceiling, ladder, bar1 to bar6; several with commas between")
    parser.add_argument("--name", default="", help="rungs whose name has this in it")
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything")
    parser.add_argument("--peer", help="NAME=PYTHON: the peer's own interpreter (trl, unsloth)", **pair)
    parser.add_argument("--peer-folder", help="NAME=FOLDER: where pip --target has put a peer", **pair)
    parser.add_argument("--shape", choices=["real", "tiny"], default="real", help="tiny: on a CPU, to see it run")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made and found again; else a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else None
    rungs = [each for each in bars() if (wanted is None or each["bar"] in wanted) and arguments.name in each["name"]]
    if not rungs:
        known = "\n".join(f"{each['bar']:<8} {each['name']}" for each in bars())
        parser.error(f"no rung of --only {arguments.only} has {arguments.name!r} in its name; known are\n{known}")
    rungs = [on_a_cpu(each) for each in rungs] if arguments.shape == "tiny" else rungs
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(arguments, folder)
        for each in rungs:
            run.measure(each)
    print(run.out)


if __name__ == "__main__":
    main()
