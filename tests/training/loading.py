"""One rank of a model that is loaded sharded; the lead says how much memory that took: loading.py CASE.json

What counts is what the processes hold at the same moment (RssAnon and RssShmem of /proc/PID/status, looked at every few
milliseconds), and, apart, pages of the checkpoint's files that one maps: the page cache's, which all share.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import bitsandbytes  # noqa: F401  (their memory is not the model's)
import peft  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

from loadmaster.training.placement import local
from loadmaster.training.sharding import STRATEGIES
from loadmaster.training.world import join, leave
from tests.training.parity import JOB, plan


class Memory(threading.Thread):
    """Peaks in bytes of some processes together, over what they had when it was made."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids = pids
        self.first = self.now()
        self.held = self.mapped = 0
        self.done = threading.Event()

    def now(self) -> tuple[int, int]:
        """(held by all, mapped by the one that maps most)."""
        held, mapped = 0, 0
        for pid in self.pids:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            size = {n: int(v.split()[0]) * 1024 for n, v in (line.split(":") for line in lines if line[:3] == "Rss")}
            held, mapped = held + size["RssAnon"] + size["RssShmem"], max(mapped, size["RssFile"])
        return held, mapped

    def look(self) -> None:
        held, mapped = self.now()
        self.held, self.mapped = max(self.held, held - self.first[0]), max(self.mapped, mapped - self.first[1])

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.look()


def main(path: str) -> None:
    case = json.loads(Path(path).read_text())
    world = join("cpu", 300)
    pids = world.gather(os.getpid())
    memory = Memory(pids if world.lead else pids[:0])
    memory.start()
    world.barrier()
    strategy = STRATEGIES[case["sharding"]](JOB, plan(case), world)
    model, _ = strategy.prepare(strategy.load(Path(case["model"])))
    kept = [*model.parameters(), *model.buffers()]
    shard = sum(world.gather(sum(local(tensor).nbytes for tensor in kept)))
    memory.done.set()
    memory.join()
    if world.lead:
        Path(case["out"]).write_text(json.dumps({"held": memory.held, "mapped": memory.mapped, "shard": shard}))
    leave(world)


if __name__ == "__main__":
    main(sys.argv[1])
