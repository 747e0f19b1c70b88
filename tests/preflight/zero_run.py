"""One rank of the memory test of ZeRO: real DeepSpeed trains, and every byte that its tensors take is counted.

    python -m tests.preflight.zero_run CASES.json

The settings are made small, so that a small model has more than one bucket of everything.
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

from loadmaster.data import MicroBatch
from loadmaster.preflight import zero_settings
from loadmaster.training.trace import Live
from loadmaster.training.world import World, join, leave
from loadmaster.training.zero import Zero
from tests.training.parity import JOB, plan

SETTINGS = {"REDUCE_BUCKET": 3_000_000, "PREFETCH_BUCKET": 1_000_000, "PERSISTENCE": 600}
TOKENS, RANK = 64, 16


class Held(Live):
    """Bytes of every storage in the process's memory."""

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "cpu" or key in self.sizes or not storage.nbytes():
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def count_all(self) -> None:
        gc.collect()
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self.count(thing)


def measure(case: dict[str, Any], world: World) -> dict[str, int]:
    """(bytes between two steps, peak of a step of two micro-batches) of this rank."""
    job = dataclasses.replace(JOB, lora=dataclasses.replace(JOB.lora, rank=RANK))
    before = Held()
    before.count_all()
    strategy = Zero(job, plan(case), world)
    model, loss = strategy.prepare(strategy.load(Path(case["model"])))
    optimizer = strategy.optimizer(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.arange(TOKENS)[None], [["row"]])

    def step() -> None:
        with strategy.accumulating(loss):
            strategy.backward(loss(batch) / TOKENS)
        strategy.backward(loss(batch) / TOKENS)
        optimizer.clip(1.0)
        optimizer.step(1e-3)

    step()
    live = Held()
    live.count_all()
    resting = live.live - before.live
    live.peak = live.live
    with live:
        step()
    return {"resting": resting, "peak": live.peak - before.live}


def main(path: str) -> None:
    for name, value in SETTINGS.items():
        setattr(zero_settings, name, value)
    world = join("cpu", 300)
    for case in json.loads(Path(path).read_text()):
        found = world.gather(measure(case, world))
        if world.lead:
            Path(case["out"]).write_text(json.dumps(found))
    leave(world)


if __name__ == "__main__":
    main(sys.argv[1])
