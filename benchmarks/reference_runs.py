"""Runs that others measured on one H100 80 GB, beside what the replay says of the same step.

    python benchmarks/reference_runs.py                 # print the tables, write benchmarks/results/reference-<date>.md

No card was at hand when this was written: what is measured here was measured before, by other engines, and what is
predicted is this engine's replay with the other engine's loss in the place of its own where that is what differs.

    transformers' loss      logits of all tokens in bf16 (2 bytes a token and word), in fp32 (4), their log-softmax (4);
                            backward two gradients in fp32 (8) while the logits still live: 14 in all, or 12 where the
                            model's output is dropped before the backward pass
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from loadmaster.config.schema import ModelConfig
from loadmaster.preflight import step
from loadmaster.preflight.blocks import Blocks
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.graph import Storage, Tensor
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.memory import peaks, train_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.speed import bytes_moved, tokens_per_second
from loadmaster.preflight.step import training_step

RESULTS = Path(__file__).parent / "results"
H100 = from_catalog("h100_80gb", 1)
EIGHT, THREE = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B"


@dataclass(frozen=True)
class Run:
    name: str
    model: str
    setup: Setup
    gib: float
    """Peak allocated, measured."""
    tokens_per_second: float | None
    differs: str
    """What the run did that this engine does not, or the other way round; empty: nothing that memory depends on."""
    whole_logits: bool = False
    """transformers' own loss."""
    default_cut: bool = False
    """Compiled layers keep norms' outputs and the product of gate and up, which this engine's make again."""
    layer_bytes: float | None = None
    """Moved for a token of a layer, where layers are compiled in another way than this engine's: read off the code that
    inductor 2.13 generates for an H100 and such a layer (peft's own, float8 casts of a weight at each use), in its
    elementwise kernels and adapters' products, with what dequantization moves."""


def lora(rows: int, length: int, **more) -> Setup:
    return Setup(
        **{"method": "lora", "precision": "bf16", "optimizer": "adamw", "master_weights": True, **more},
        micro_batch_size=rows, sequence_length=length,
    )


def full(**more) -> Setup:
    return Setup(
        **{"method": "full", "precision": "bf16", "optimizer": "adamw_bf16", "master_weights": False, **more},
        micro_batch_size=4, sequence_length=2048,
    )


TRANSFORMERS = (
    "transformers' Trainer step: its own loss, AdamW's moments in bf16 as bf16 adapters have them, attention through "
    "SDPA's flash kernel, which keeps the same tensors. Nothing else differs, so this is the replay against a card"
)
RECAST = (
    "torchao's products, a scale for each tensor, over a base in bf16 that is cast at each use, where this engine "
    "holds it in FP8 and multiplies a scale for each row in afterwards: 6.5 GiB less; the casts are counted in the "
    "predicted speed"
)
STATES = {"optimizer": "adamw_bf16", "master_weights": False}
RUNS = (
    Run("LoRA 8B, adapters in bf16, layers checkpointed, 1 x 4096", EIGHT,
        lora(1, 4096, checkpointing="full", **STATES), 23.169, None, TRANSFORMERS, True),
    Run("LoRA 8B, adapters in bf16, nothing recomputed, 1 x 4096", EIGHT, lora(1, 4096, **STATES),
        44.650, None, TRANSFORMERS, True),
    Run("sketch: LoRA 8B, layers compiled, 2 x 2048", EIGHT, lora(2, 2048, compiled=True), 32.9, 14587,
        "a sketch of this engine: compiled layers that keep what inductor keeps by default, which is counted (this "
        "engine's keep a third less); its loss and optimizer states are not known and counted as here",
        default_cut=True, layer_bytes=1_271e3),
    Run("sketch: LoRA 8B, layers compiled, nf4 base, 2 x 2048", EIGHT, lora(2, 2048, compiled=True, method="qlora"),
        23.2, 13778, "the same", default_cut=True, layer_bytes=1_554e3),
    Run("sketch: full 3B, layers compiled, 4 x 2048, bf16 moments", THREE, full(compiled=True), 38.6, 24639,
        "the same", default_cut=True, layer_bytes=342e3),
    Run("sketch: LoRA 8B, layers compiled, float8 products, 2 x 2048", EIGHT,
        lora(2, 2048, compiled=True, precision="fp8"), 32.7, 16729, RECAST, default_cut=True,
        layer_bytes=1_953e3),
    Run("sketch: LoRA 8B, layers compiled, float8 products, 4 x 2048", EIGHT,
        lora(4, 2048, compiled=True, precision="fp8"), 50.3, 19379, "the same", default_cut=True,
        layer_bytes=1_739e3),
    Run("sketch: full 3B, layers compiled, float8 products, 4 x 2048, bf16 moments", THREE,
        full(compiled=True, precision="fp8"), 32.5, 28761, "the same products; a sketch's memory, as above",
        layer_bytes=652e3),
    Run("TRL with Liger: QLoRA 8B, layers checkpointed, 2 x 2048", EIGHT,
        lora(2, 2048, method="qlora", checkpointing="full"), 7.3, 6211,
        "Liger's fused norm, rotary, SwiGLU and loss; its adapters' states in fp32"),
    Run("TRL with Liger: full 3B, layers checkpointed, 4 x 2048", THREE, full(checkpointing="full"), 24.9, 19842,
        "Liger's kernels; eager otherwise"),
    Run("TRL: full 3B, layers checkpointed, 4 x 2048", THREE, full(checkpointing="full"), 25.2, 15099,
        "TRL's own loss by tiles"),
    Run("Unsloth: QLoRA 8B, nothing recomputed, 2 x 2048", EIGHT, lora(2, 2048, method="qlora", compiled=True), 20.8,
        14028, "hand-written kernels for adapters, norms and SwiGLU, which keep fewer tensors than compiled layers"),
    Run("Unsloth: LoRA 8B, nothing recomputed, 2 x 2048", EIGHT, lora(2, 2048, compiled=True), 30.4, 14359,
        "the same"),
    Run("Unsloth: full 3B, its checkpointing, 4 x 2048", THREE, full(checkpointing="full"), 25.0, 19144,
        "its kernels; activations to host memory"),
)
"""Peak allocated GiB and tokens/s as measured on one H100 80GB HBM3, torch 2.11 with CUDA 13.0, on 2026-11-23."""


def whole_logits_loss(b: Blocks, hidden: Tensor, head: Tensor, rows: int) -> Tensor:
    """transformers' ForCausalLMLoss over a frozen head, outputs kept: every allocation of it."""
    tape, v, h = b.tape, b.shape.vocabulary_size, b.shape.hidden_size
    n = b.n
    with tape.tagged("logits"):
        logits = b.matmul(hidden, head, h, v, n)
        wide = b.elementwise(logits, 4 * n * v)
        size = 4 * n * v

        def softmax_backward(g: Storage, saved: list) -> list:
            tape.moved(size, size)
            return [tape.alloc(size)]

        def picked_backward(g: Storage, saved: list) -> list:
            return [tape.alloc(size)]

        log_softmax = tape.op(size, [], [], softmax_backward)
        tape.link(log_softmax, [wide], [log_softmax.storage], softmax_backward)
        del wide
        loss = tape.op(4, [log_softmax], [], picked_backward)
        del log_softmax
    b.outputs = logits  # the caller's name for them
    return loss


def predict(run: Run) -> tuple[float, float]:
    """(GiB allocated, tokens a second)."""
    shape = find_shape(ModelConfig(name=run.model))
    kept = step.chunked_loss, step.gather
    if run.whole_logits:
        step.chunked_loss, step.gather = whole_logits_loss, lambda b, hidden, rows: hidden
        step.training_step.cache_clear()
    try:
        gib = peaks(H100, train_bytes(shape, H100, run.setup).total).allocated
    finally:
        step.chunked_loss, step.gather = kept
        if run.whole_logits:
            step.training_step.cache_clear()
    if run.default_cut:
        gib += (4 * shape.hidden_size + 2 * shape.intermediate_size) * run.setup.tokens * shape.layers / 2**30
    seconds = run.setup.tokens / tokens_per_second(shape, H100, run.setup)
    if run.layer_bytes is not None:
        rate = H100.bandwidth_gb_per_s * 1e9 * value("efficiency", "memory")
        seconds += (run.layer_bytes - layer_bytes(shape, run.setup)) * shape.layers * run.setup.tokens / rate
    return gib, run.setup.tokens / seconds


def layer_bytes(shape: ModelShape, setup: Setup) -> float:
    """Moved for a token of one of this engine's layers."""
    fewer = replace(shape, layers=shape.layers // 2)
    more, less = (bytes_moved(each, training_step(each, setup).work, setup) for each in (shape, fewer))
    return (more - less) / (shape.layers - fewer.layers) / setup.tokens


def page(day: str) -> str:
    lines = [
        f"# Runs measured on an H100, beside the replay, {day}\n\nWritten by `python benchmarks/reference_runs.py`. "
        "Measured on one H100 80GB HBM3 (torch 2.11, CUDA 13.0) on 2026-11-23 by the engines that are named; predicted "
        "by the replay of this one. Nothing here was measured of this engine. Speeds are modelled, their efficiencies "
        f"({value('efficiency', 'matmul'):.2f} of the matmul peak and so on) chosen for the sketch's rows.\n\n"
        "| run | GiB measured | predicted | off | tokens/s measured | predicted | off |\n|---|---:|---:|---:|---:|---:|"
        "---:|\n"
    ]
    notes = []
    for run in RUNS:
        gib, speed = predict(run)
        seen = "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        said = "" if run.tokens_per_second is None else f"{speed:,.0f}"
        off = "" if run.tokens_per_second is None else f"{speed / run.tokens_per_second - 1:+.0%}"
        lines.append(
            f"| {run.name} | {run.gib:.3f} | {gib:.3f} | {gib / run.gib - 1:+.2%} | {seen} | {said} | {off} |\n"
        )
        notes.append(f"- {run.name}: {run.differs}.\n")
    return "".join([*lines, "\nWhat differs from this engine:\n\n", *notes])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"reference-{date.today()}.md"
    file.write_text(page(str(date.today())), encoding="utf-8")
    print(file.read_text(encoding="utf-8"))
