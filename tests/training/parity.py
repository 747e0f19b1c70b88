"""One rank of the parity tests: trains small models in each case that it is given, and leaves what came of it.

    python -m tests.training.parity CASES.json

The world is torchrun's, from the environment; without it this is the run of one process that others are held against.
A case: name, method, sharding, offload, checkpointing, count and nodes, and the folders of model and output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from loadmaster.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Job,
    LoraConfig,
    OptimizerConfig,
    TrackerConfig,
)
from loadmaster.data import packed_rows
from loadmaster.models import compiled, recompute
from loadmaster.preflight import zero_settings
from loadmaster.preflight.plan import HardwareSummary, MemoryGib, ModelSummary, PhasesGib, Plan
from loadmaster.training import loop
from loadmaster.training.display import Display
from loadmaster.training.save import write_trained
from loadmaster.training.stop import StopSignal
from loadmaster.training.world import World, join, leave

VOCABULARY = 512
JOB = Job(
    data=DataConfig(path="in memory"),
    sequence_length=64,
    batch=BatchConfig(8),
    optimizer=OptimizerConfig(lr=3e-3, max_grad_norm=0.5, eps=1e-5),  # of a gradient of 0, rounding would be a step
    lora=LoraConfig(rank=4),
    tracker=TrackerConfig("none"),
    checkpoint=CheckpointConfig(every_steps=4, keep_last=9),
    evaluation=EvaluationConfig(every_steps=4),
)


def plan(case: dict[str, Any]) -> Plan:
    world = case["count"] * case["nodes"]
    return Plan(
        fits=True,
        model=ModelSummary("tiny", 0, 0, 2, 64, VOCABULARY, case.get("family", "llama")),
        hardware=HardwareSummary("cpu", case["count"], case["nodes"], 8.0, 8.0),
        method=case["method"], precision=case.get("precision", "fp32"), sharding=case["sharding"],
        compile=case.get("compile", False), offload=case["offload"], replicas=case["nodes"],
        reshard_after_forward=case.get("reshard_after_forward", True),
        activation_checkpointing=case["checkpointing"], checkpointed_layers=case.get("checkpointed_layers"),
        optimizer=case["optimizer"],
        master_weights=case.get("master_weights", case.get("precision") == "bf16"),
        optimizer_in_backward=case.get("in_backward", False),
        micro_batch_size=case.get("micro_batch_size", 1),
        gradient_accumulation_steps=8 // world // case.get("micro_batch_size", 1), sequence_length=64,
        memory_gib=MemoryGib(*[0.0] * 9), phases_gib=PhasesGib(*[0.0] * 5), budget_gib=8.0, host_memory_gib=0.0,
        disk_gib=0.0, tokens_per_second=None, hours=None, cost_usd=None,
    )


def rows(documents: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(documents):
        size = int(generator.integers(8, 40))
        made.append((generator.integers(3, VOCABULARY, size).tolist(), (np.arange(size) >= size // 3).tolist()))
    return packed_rows(made, 64)


def begin(ids) -> tuple[int, ...]:
    """By which a row is known: no two documents begin alike."""
    return tuple(ids[:8].tolist())


def run(case: dict[str, Any], world: World) -> None:
    """Train one case; losses and norms go to out/metrics.jsonl, the rows of each step to out/rows-RANK.json."""
    from loadmaster.evaluation import held_out

    out, validation = Path(case["out"]), rows(9, seed=1)
    optimizer = dataclasses.replace(JOB.optimizer, max_grad_norm=case.get("max_grad_norm", 0.5))
    kinds = {"modules_to_save": case.get("modules_to_save", []), "dora": case.get("dora", False)}
    lora = dataclasses.replace(JOB.lora, **kinds)
    job = dataclasses.replace(JOB, max_steps=case["steps"], optimizer=optimizer, lora=lora)
    train, seen = rows(60), list[list[str]]()
    named = {begin(row.input_ids): row.document_ids for row in train}
    split = loop.Session.split

    def record(self: loop.Session, picked: list):
        batches = split(self, picked)
        step = []
        for batch in batches:
            trained = (batch.labels != -100).any(dim=1)  # copies that only fill up a rank are not
            for ids in batch.input_ids[trained]:
                step += named.get(begin(ids), [])  # the rehearsal has rows of its own
        seen.append(step)
        return batches

    loop.Session.split = record
    try:
        session, outcome = loop.train(
            job, plan(case), SimpleNamespace(train=train, validation=validation),
            SimpleNamespace(pad_token_id=0), Path(case["model"]), out, "hash",
            lambda session, stopping: held_out(
                session.model, validation, 0, 1, world.device, session.loss, world, stopping, session.fixed_length
            ),
            StopSignal(), Display(Console(quiet=True) if world.lead else None), world,
        )
    finally:
        loop.Session.split = split
    folder = out / "saved"
    if world.lead:
        folder.mkdir()
    world.barrier()
    write_trained(session.model, folder, session.strategy.placed, world)
    (out / f"rows-{world.rank}.json").write_text(json.dumps(seen[2:]))  # the first two are the rehearsal's
    figures = {
        "train_loss": outcome.train_loss, "eval_loss": outcome.eval_loss, "recompilations": outcome.recompilations,
    }
    if case.get("evaluated"):  # read back from what was saved
        world.barrier()
        strategy, fixed_length = session.strategy, session.fixed_length
        del session
        model, loss = strategy.for_evaluation(Path(case["model"]), folder)
        found = held_out(model, validation, 0, 1, world.device, loss, world, lambda: False, fixed_length)
        figures["evaluated"] = found["loss"]
    if world.lead:
        (out / "outcome.json").write_text(json.dumps(figures))


def main(path: str) -> None:
    compiled.BACKEND = "aot_eager"  # all of compiling but the C++ compiler, which takes its time
    recompute.WIDE = VOCABULARY // 8  # or nothing of so small a layer would be kept
    # Or zero3 would cut nothing of so small a model, and gather all of it ahead.
    zero_settings.PERSISTENCE, zero_settings.PREFETCH_BUCKET = 600, 4000
    world = join("cpu", 300)
    for case in json.loads(Path(path).read_text()):
        run(case, world)
        world.barrier()
    leave(world)


if __name__ == "__main__":
    main(sys.argv[1])
