"""Time and memory of the streamed exports on a CPU: Llama shapes of 1B, 3B and 8B with random weights, on disk.

    python benchmarks/export_speed.py --scratch /path/with/40_GB [--sizes 1B 3B 8B] [--threads 2]

Each export runs in a process of its own: from a folder of bf16 shards of 5 GB to the quantized folder, fsync included.
Its wall and processor seconds, and the largest resident memory (which counts the pages of the input that the system
maps), go to benchmarks/results/ with the date. `LoRA` merges a rank-16 adapter on every linear layer in the same pass.
The weights of each size are deleted when it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file

from loadmaster.export.adapter import read_adapter
from loadmaster.export.candidates import streamed
from loadmaster.export.linear import linear_weights
from loadmaster.export.merge import merge
from loadmaster.export.stream import ShardWriter
from loadmaster.export.weights import INDEX, Shapes
from loadmaster.files import write_json, write_text

SIZES = {  # hidden, intermediate, layers, query heads x 128 or 64, key-value width, tied embeddings
    "1B": (2048, 8192, 16, 2048, 512, True),
    "3B": (3072, 8192, 28, 3072, 1024, True),
    "8B": (4096, 14336, 32, 4096, 1024, False),
}
"""Llama 3.2 1B and 3B, Llama 3.1 8B."""
VOCABULARY = 128256
SHARD_BYTES = 5_000_000_000
RUNS = (("fp8", False), ("int4-rtn", False), ("fp8", True))
RANK = 16
RESULTS = Path(__file__).parent / "results"


def shapes_of(size: str) -> Shapes:
    hidden, intermediate, layers, queries, keys, tied = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return {name: (torch.bfloat16, shape) for name, shape in shapes.items()}


def write_model(size: str, folder: Path) -> int:
    """Random shards and an adapter; returns parameters. One block of noise fills them: its values do not matter."""
    folder.mkdir(parents=True)
    noise = (torch.randn(2**26, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    shapes = shapes_of(size)
    parts: list[Shapes] = [{}]
    held = 0
    for name, (dtype, shape) in shapes.items():
        count = torch.Size(shape).numel()
        if held and held + 2 * count > SHARD_BYTES:
            parts.append({})
            held = 0
        parts[-1][name] = (dtype, shape)
        held += 2 * count
    weight_map = {}
    for index, part in enumerate(parts, 1):
        file = f"model-{index:05}-of-{len(parts):05}.safetensors"
        writer = ShardWriter(folder / file, part)
        for name, (_, shape) in part.items():
            count = torch.Size(shape).numel()
            writer.write(name, noise.repeat(-(-count // len(noise)))[:count].reshape(shape))
            weight_map[name] = file
        writer.close()
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "llama", "tie_word_embeddings": SIZES[size][-1]})
    _write_adapter(folder / "adapter", linear_weights(folder))
    return sum(torch.Size(shape).numel() for _, shape in shapes.values())


def _write_adapter(folder: Path, linear: dict[str, tuple[int, int]]) -> None:
    folder.mkdir()
    tensors = {}
    for name, (outputs, inputs) in linear.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.01
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK})


def export(model: Path, target: Path, name: str, with_adapter: bool) -> None:
    """In a process of its own: the export, and what it took, as a line of JSON."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start, before = time.perf_counter(), os.times()
    target.mkdir()
    adapter = read_adapter(model / "adapter") if with_adapter else None
    merge(model, None, adapter, torch.bfloat16, None, {target: streamed([name], linear_weights(model))[name]})
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    after = os.times()
    print(json.dumps({
        "wall_s": time.perf_counter() - start,
        "cpu_s": after.user + after.system - before.user - before.system,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "output_gb": sum(path.stat().st_size for path in target.iterdir()) / 1e9,
    }))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--conditions", default="", help="what else the machine did, for the result file")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        model, target, name, with_adapter = arguments.one
        export(Path(model), Path(target), name, with_adapter == "True")
        return
    rows = []
    for size in arguments.sizes:
        model = arguments.scratch / f"export-speed-{size}"
        try:
            parameters = write_model(size, model)
            for name, with_adapter in RUNS:
                figures = _run(arguments, model, name, with_adapter)
                label = f"{name}{' + LoRA' if with_adapter else ''}"
                rows.append([
                    size, f"{parameters / 1e9:.2f}", label, f"{figures['wall_s']:.1f}", f"{figures['cpu_s']:.1f}",
                    f"{figures['cpu_s'] / parameters * 1e9:.1f}", f"{figures['peak_gib']:.2f}",
                    f"{figures['output_gb']:.2f}",
                ])
                print(*rows[-1], flush=True)
        finally:
            shutil.rmtree(model, ignore_errors=True)
    _write_result(arguments, rows)


def _run(arguments: argparse.Namespace, model: Path, name: str, with_adapter: bool) -> dict[str, float]:
    target = arguments.scratch / "export-speed-out"
    command = [sys.executable, __file__, "--scratch", ".", "--one", str(model), str(target), name, str(with_adapter)]
    try:
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        ).stdout
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return json.loads(output)


def _write_result(arguments: argparse.Namespace, rows: list[list[str]]) -> None:
    head = ["model", "10^9 parameters", "export", "wall s", "CPU s", "CPU s per 10^9", "peak GiB", "output GB"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    today = datetime.now(UTC).date().isoformat()
    text = (
        f"# Streamed exports on a CPU, {today}\n\n"
        f"`python benchmarks/export_speed.py`, {arguments.threads} threads, {cpu}, torch {torch.__version__}. Random "
        "weights of Llama's shapes, bf16 shards of 5 GB on disk, fsync included, each in a process of its own.\n"
        + (f"{arguments.conditions}\n" if arguments.conditions else "")
        + "\n" + "\n".join(lines) + "\n"
    )
    write_text(RESULTS / f"{today}_export_speed.md", text)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


if __name__ == "__main__":
    main()
