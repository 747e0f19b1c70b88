"""What PyTorch's allocator reserves above what is allocated: simulated for this engine's steps, on real shapes.

    python benchmarks/reserved.py                   # all cases, minutes of one core; prints a table
    python benchmarks/reserved.py 3 7               # these alone
    python benchmarks/reserved.py --eager           # those that compile nothing

No GPU and no weights: the engine's modules run on the meta device, every allocation goes to a simulated allocator
(caching_allocator.py), and for compiled layers inductor's own code for an H100 says what they allocate, in its order
(tests/gpu_code.py). A run is what training does with the card:

    load        transformers' one large allocation for all weights, let go; then weights one by one, quantized ones
                beside what they are made of
    rehearsal   two steps, an evaluation batch, states forgotten
    training    steps whose micro-batches train different numbers of tokens, as real rows do; an evaluation batch after
                every third. (A checkpoint takes nothing on the card.)

Peaks are those of the whole run; `preflight` is how far the plan's peak is from it. `needs` is the least that a card
must have for tensors if the run is not to end out of memory, found by trying: where a card is full, the allocator gives
back what is free and goes on, slower. `goes through`: on a card that the same peak and the context fill but for
plan.reserve, which is as full as a plan may make it. Segments are fixed (PyTorch's default) or grow
(expandable_segments:True, as training has them).
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("triton") is None:
    sys.path.append(str(Path(sys.prefix) / "triton"))  # where `make setup` puts it; torch looks once

import torch
from allocations import Recorder
from caching_allocator import Event, OutOfMemory, replay

sys.path.insert(0, str(Path(__file__).parents[1]))

import loadmaster.training.optimizer as optimizers
from loadmaster.config.schema import ModelConfig, OptimizerConfig
from loadmaster.data import MicroBatch
from loadmaster.models import compiled
from loadmaster.models.adapters import trainable
from loadmaster.models.forward import token_losses
from loadmaster.models.frozen import FrozenFP8Linear, FrozenLinear
from loadmaster.models.load import DTYPES
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.config_json import find_config, find_shape
from loadmaster.preflight.hardware import GIB, from_catalog
from loadmaster.preflight.memory import peaks, train_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.training.metas import Metas
from loadmaster.training.trace import _meta_model, with_trained_part

EIGHT, THREE, ONE = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-1B"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
STEPS = 6
CARD = from_catalog("h100_80gb", 1)
RESERVE = 0.03
"""That plans leave free of a card (plan.reserve)."""


@dataclass(frozen=True)
class Case:
    model: str
    method: str
    rows: int
    length: int = 2048
    checkpointing: str = "none"
    kept_layers: int = 0
    precision: str = "bf16"
    optimizer: str = "adamw"
    masters: bool = True
    accumulated: int = 1
    compiled: bool = False
    dropout: float = 0.0
    dora: bool = False

    def setup(self) -> Setup:
        return Setup(
            method=self.method, precision=self.precision, optimizer=self.optimizer, master_weights=self.masters,
            checkpointing=self.checkpointing, kept_layers=self.kept_layers, micro_batch_size=self.rows,
            sequence_length=self.length, gradient_accumulation_steps=self.accumulated, compiled=self.compiled,
            lora_dropout=self.dropout, dora=self.dora,
        )

    def __str__(self) -> str:
        name = self.model.rpartition("-" if "Llama" in self.model else "/")[2]
        said = [f"{name} {self.method}", f"{self.rows} x {self.length:,}"]
        said += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        said += [f"{self.kept_layers} layers kept"] if self.kept_layers else []
        said += ["FP8"] if self.precision == "fp8" else []
        said += [f"dropout {self.dropout}"] if self.dropout else []
        said += ["DoRA"] if self.dora else []
        said += [self.optimizer] if self.optimizer != "adamw" else []
        said += ["no masters"] if self.optimizer == "adamw" and not self.masters else []
        said += [f"{self.accumulated} micro-batches"] if self.accumulated > 1 else []
        return ", ".join([*said, "compiled" if self.compiled else "eager"])


LIGHT = {"optimizer": "adamw_bf16", "masters": False}
CASES = [
    Case(EIGHT, "lora", 2),
    Case(EIGHT, "lora", 2, 4096, "full"),
    Case(EIGHT, "lora", 4, 4096, "full", accumulated=2),
    Case(EIGHT, "lora", 4, 2048, "selective"),
    Case(EIGHT, "lora", 4, 2048, "full", kept_layers=16),
    Case(EIGHT, "qlora", 2),
    Case(EIGHT, "qlora", 4, 4096, "full", accumulated=2),
    Case(EIGHT, "lora", 2, precision="fp8"),
    Case(ONE, "lora", 8, 2048),
    Case(ONE, "full", 4, 2048),
    Case(ONE, "full", 8, 2048, "full", accumulated=2),
    Case(ONE, "full", 4, 2048, optimizer="adamw_8bit", masters=False),
    Case(THREE, "full", 4, 2048, "full"),
    Case(THREE, "full", 2, 2048, **LIGHT),
    Case(THREE, "full", 4, 2048, "full", optimizer="adafactor", masters=False),
    Case(THREE, "lora", 4, 2048),
    Case(EIGHT, "lora", 2, compiled=True),
    Case(EIGHT, "qlora", 2, compiled=True),
    Case(EIGHT, "lora", 4, 4096, "full", compiled=True),
    Case(EIGHT, "lora", 2, precision="fp8", compiled=True),
    Case(THREE, "full", 4, 2048, compiled=True, **LIGHT),
    Case(THREE, "full", 4, 2048, "full", kept_layers=8, compiled=True),
    Case(ONE, "full", 4, precision="fp8", compiled=True),
    Case(EIGHT, "lora", 2, dropout=0.05, compiled=True),
    Case(EIGHT, "lora", 2, dora=True, compiled=True),
    Case("Qwen/Qwen3-4B", "full", 2, compiled=True, **LIGHT),
    Case("google/gemma-3-1b-pt", "qlora", 4, 4096, "full", compiled=True),
    Case(PHI3, "lora", 2, compiled=True),
    Case(PHI3, "lora", 4, 4096, "full", compiled=True),
    Case(PHI3, "full", 2, compiled=True, **LIGHT),
    Case("microsoft/Phi-4-mini-instruct", "lora", 2, precision="fp8", compiled=True),
    Case("microsoft/phi-4", "lora", 2, compiled=True),
]


class Fused(torch.optim.Optimizer):
    """What the fused AdamW allocates, which the meta device has not: two moments and a count, in its first step."""

    def __init__(self, groups: list) -> None:
        super().__init__(groups, {"lr": 1e-3})

    def step(self) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None and not self.state[each]:
                    self.state[each] = {
                        "step": torch.zeros((), device=each.device), "exp_avg": torch.zeros_like(each),
                        "exp_avg_sq": torch.zeros_like(each),
                    }


def load(recorder: Recorder, model: torch.nn.Module) -> None:
    """As transformers reads a checkpoint; linears that are quantized are made from bf16, by way of fp32."""
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    recorder.passing(sum(held.values()))
    for module in model.modules():
        whole = []
        if isinstance(module, FrozenLinear):
            elements = module.in_features * module.out_features
            whole = [recorder.took(2 * elements)]
            whole += [recorder.took(4 * elements)] if isinstance(module, FrozenFP8Linear) else []
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            recorder.count(tensor)
        for number in whole:
            recorder.let_go(number)


def events(case: Case, seed: int = 0) -> list[Event]:
    optimizers._factory = _with_fused(optimizers._factory)
    config, _ = find_config(ModelConfig(name=case.model))
    setup = case.setup()
    recorder = Recorder("meta", Metas())
    base = _meta_model(config, DTYPES[setup.precision])
    model = with_trained_part(base, setup)
    load(recorder, model)
    checkpoint_activations(model, case.checkpointing, case.kept_layers)
    if case.compiled:
        from generated_allocations import Played

        compiled.BACKEND = Played(recorder)
        compiled.compile_layers(model)
    draw = random.Random(seed)
    with recorder:
        optimizer = optimizers.TrainingOptimizer(
            trainable(model), OptimizerConfig(), case.optimizer, case.masters, compiled=case.compiled
        )

    def step(*shares: float) -> None:
        model.train()
        optimizer.begin(1e-4)
        for share in shares:
            loss, _ = token_losses(model, batch(case, share))
            recorder.in_backward = True
            loss.backward()
            recorder.in_backward = False
            del loss
        optimizer.clip(1.0)
        optimizer.step(1e-4)

    def evaluate(share: float) -> None:
        model.eval()
        with torch.no_grad():
            token_losses(model, batch(case, share))

    with recorder:
        for _ in range(2):
            step(*[1.0] * min(2, case.accumulated))
        evaluate(1.0)
        optimizer.zero_grad()
        optimizer.reset()
        for number in range(STEPS):
            step(*[draw.uniform(0.2, 1.0) for _ in range(case.accumulated)])
            if number % 3 == 2:
                evaluate(draw.uniform(0.2, 1.0))
    return list(recorder.events)


def batch(case: Case, share: float) -> MicroBatch:
    """The first part of each of four documents in a row is a prompt."""
    ids = torch.zeros(case.rows, case.length, dtype=torch.long)
    places = torch.arange(case.length) % -(-case.length // 4)
    labels = torch.where(places >= (1 - share) * case.length / 4, 0, -100).repeat(case.rows, 1)
    return MicroBatch(ids, labels, places.repeat(case.rows, 1))


def _with_fused(factory: Callable) -> Callable:
    if getattr(factory, "has_fused", False):
        return factory

    def made(name: str, config: OptimizerConfig, dtype: torch.dtype, masters: bool, *more: Any) -> Callable:
        fused = name == "adamw" and (masters or dtype == torch.float32)
        return Fused if fused else factory(name, config, dtype, masters, *more)

    made.has_fused = True
    return made


def needs(found: list[Event], expandable: bool, low: int, high: int) -> int:
    """The least bytes of a card, to 16 MiB, in which the run goes through."""
    while high - low > 2**24:
        middle = (low + high) // 2
        try:
            replay(found, expandable, middle)
            high = middle
        except OutOfMemory:
            low = middle
    return high


def row(case: Case) -> str:
    started = time.perf_counter()
    found = events(case)
    fixed, grown = replay(found), replay(found, expandable=True)
    peak = fixed.peak_allocated
    predicted = peaks(CARD, train_bytes(find_shape(ModelConfig(name=case.model)), CARD, case.setup()).total).allocated
    said = [str(case), f"{peak / GIB:.3f}", f"{predicted * GIB / peak - 1:+.1%}"]
    context = value("context", "cuda_gib") * GIB
    room = (peak + context) / (1 - RESERVE) - context
    for expandable, run in ((False, fixed), (True, grown)):
        least = needs(found, expandable, peak - 2**24, run.peak_reserved)
        said += [f"{run.peak_reserved / peak - 1:.1%}", f"{least / peak - 1:.1%}", "yes" if least <= room else "**no**"]
    return f"| {' | '.join(said)} | {len(found):,} | {time.perf_counter() - started:.0f} |"


HEAD = (
    "| case | GiB allocated | preflight | fixed: reserved above it | needs above it | goes through | "
    "growing: reserved above it | needs above it | goes through | events | seconds |\n"
    "|---|---:|---:|---:|---:|---|---:|---:|---|---:|---:|"
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases, from 0")
    parser.add_argument("--eager", action="store_true")
    asked = parser.parse_args()
    print(HEAD, flush=True)
    for number, case in enumerate(CASES):
        if (not asked.cases or number in asked.cases) and not (asked.eager and case.compiled):
            print(row(case), flush=True)
