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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from loadmaster.data import MicroBatch
from loadmaster.preflight import zero_settings
from loadmaster.preflight.pinned import pinned
from loadmaster.training import zero
from loadmaster.training.trace import Live
from loadmaster.training.world import World, join, leave
from loadmaster.training.zero import Zero
from tests.training.parity import JOB, plan

SETTINGS = {"REDUCE_BUCKET": 3_000_000, "PREFETCH_BUCKET": 1_000_000, "PERSISTENCE": 600, "SUB_GROUP": 2_000_000}
TOKENS, RANK = 64, 16


class Held(Live):
    """Bytes of every storage in the process's memory."""

    counting = True

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not self.counting or tensor.device.type != "cpu" or key in self.sizes or not storage.nbytes():
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


@contextmanager
def asked_to_pin() -> Iterator[list[int]]:
    """DeepSpeed is asked to pin, as with a GPU; of each block that it pins, its bytes. (A CPU's are not pinned.)"""
    from deepspeed.accelerator import get_accelerator

    accelerator, blocks, configure = get_accelerator(), [], zero.deepspeed_config

    def pin(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        blocks.append(tensor.nbytes)
        return tensor

    def pinning(sharding: str, offload: str, _: bool, *rest: int) -> dict[str, Any]:
        return configure(sharding, offload, True, *rest)

    with patch.object(accelerator, "pin_memory", pin), patch.object(zero, "deepspeed_config", pinning):
        yield blocks


@contextmanager
def without_gloos_copy(live: Held) -> Iterator[None]:
    """To reduce and scatter, gloo copies all that it is given, which NCCL does not."""
    from deepspeed.runtime.comm import coalesced_collectives

    reduce = coalesced_collectives._torch_reduce_scatter_fn

    def reduce_uncounted(*arguments: Any, **named: Any) -> None:
        live.counting = False
        reduce(*arguments, **named)
        live.counting = True

    with patch.object(coalesced_collectives, "_torch_reduce_scatter_fn", reduce_uncounted):
        yield


def measure(case: dict[str, Any], world: World) -> dict[str, int]:
    """(bytes between two steps, peak of a step of two micro-batches, pinned host memory with a GPU) of this rank."""
    job = dataclasses.replace(JOB, lora=dataclasses.replace(JOB.lora, rank=RANK))
    before = Held()
    before.count_all()
    strategy = Zero(job, plan(case), world)
    with asked_to_pin() as blocks:
        model, loss = strategy.prepare(strategy.load(Path(case["model"])))
        optimizer = strategy.optimizer(model)
        found = train(strategy, loss, optimizer, before)
    return {**found, "pinned": sum(map(pinned, blocks))}


def train(strategy: Zero, loss: Any, optimizer: Any, before: Held) -> dict[str, int]:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.arange(TOKENS)[None])

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
    with live, without_gloos_copy(live):
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
