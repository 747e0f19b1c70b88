"""One rank of the tests of ZeRO's edges: a step that is left out, a plan that DeepSpeed does not follow, and what it
keeps of models that are gone.

python -m tests.training.zero_rank CASES.json
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload

from loadmaster.data import MicroBatch
from loadmaster.errors import TrainingFailed
from loadmaster.preflight import zero_settings
from loadmaster.training.world import World, join, leave
from loadmaster.training.zero import Zero
from tests.training.parity import JOB, plan

TOKENS = 32


def batch(seed: int) -> MicroBatch:
    ids = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    return MicroBatch(ids, ids, torch.arange(TOKENS)[None])


def train(case: dict[str, Any], world: World, bad: bool) -> tuple[Zero, list[float]]:
    """Three steps, with one between them (bad) whose gradients are not finite; the norm of each."""
    strategy = Zero(JOB, plan(case), world)
    model, loss = strategy.prepare(strategy.load(Path(case["model"])))
    optimizer = strategy.optimizer(model)
    norms = []
    for number in (0, 1, *(["bad"] if bad else []), 2):
        seed = 99 if number == "bad" else 10 * number
        with strategy.accumulating(loss):
            strategy.backward(loss(batch(seed + world.rank)) / TOKENS)
        last = loss(batch(seed + 5 + world.rank)) / TOKENS
        strategy.backward(last * float("nan") if number == "bad" else last)
        norm = optimizer.clip(0.5).item()
        if number == "bad":
            assert norm != norm, norm
            optimizer.zero_grad()
        else:
            optimizer.step(1e-2)
            norms.append(norm)
    return strategy, norms


def disagreements(strategy: Zero) -> list[str]:
    """What `check` says of plans that are not what DeepSpeed was asked for."""
    said, plan, stage, world = [], strategy.plan, strategy.stage, strategy.world
    elsewhere = dataclasses.replace(world, device=torch.device("meta"))  # a plan for GPUs, and all is on the host
    for offload in ("none", "optimizer") if stage == 3 else ("none",):
        strategy.plan, strategy.world = dataclasses.replace(plan, offload=offload), elsewhere
        said.append(refusal(strategy))
    strategy.plan, strategy.world, strategy.stage = plan, world, stage % 3 + 1
    return [*said, refusal(strategy)]


def refusal(strategy: Zero) -> str:
    try:
        strategy.check(strategy.engine)
    except TrainingFailed as error:
        return str(error)
    return "nothing"


def whole(strategy: Zero, world: World) -> int:
    """Tensors that are whole after an evaluation batch, of those that are cut; others may be on their way."""
    with torch.no_grad():
        strategy.engine(batch(world.rank))
    cut = [p for p in strategy.engine.parameters() if not getattr(p, "ds_persist", True)]
    return sum(p.ds_status.name == "AVAILABLE" for p in cut)


def kept(case: dict[str, Any], world: World) -> list[int]:
    """(Modules that DeepSpeed takes to be running, tensors of a model that was evaluated and is gone.)"""
    strategy = Zero(JOB, plan(case), world)
    model, loss = strategy.for_evaluation(Path(case["model"]), None)
    with torch.no_grad():
        for _ in range(3):  # from the second on weights are gathered ahead
            loss(batch(world.rank))
    held = [weakref.ref(getattr(p, "ds_tensor", p).untyped_storage()) for p in model.parameters()]
    strategy.let_go(loss)
    running = len(parameter_offload.FWD_MODULE_STACK) - 1  # the root itself
    del model, loss
    gc.collect()
    return [running, sum(each() is not None for each in held)]


def main(path: str) -> None:
    # Or zero3 would cut nothing of so small a model, and gather all of it ahead.
    zero_settings.PERSISTENCE, zero_settings.PREFETCH_BUCKET = 600, 4000
    world = join("cpu", 300)
    for case in json.loads(Path(path).read_text()):
        _, good = train(case, world, bad=False)
        strategy, left_out = train(case, world, bad=True)
        found = {"good": good, "left_out": left_out, "whole": whole(strategy, world), "said": disagreements(strategy)}
        found["kept"] = kept(case, world)
        if world.lead:
            Path(case["out"]).write_text(json.dumps(found))
        world.barrier()
    leave(world)


if __name__ == "__main__":
    main(sys.argv[1])
