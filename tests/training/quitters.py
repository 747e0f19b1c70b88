"""Pairs of ranks that end right after a collective, while their gloo threads have hardly had the time to let go of it.

python -m tests.training.quitters PAIRS; prints the exit codes that were seen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from loadmaster.training.world import join, leave
from tests.training.processes import free_port


def rank(number: int, port: int) -> dist.ProcessGroup:
    """One rank on a core of its own, whose gloo threads run only when nothing else would."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number % os.cpu_count()]})
    here = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")
    world = join("cpu", 60)
    kept = dist.group.WORLD  # as FSDP and DeepSpeed keep it
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text() == "pt_gloo_runloop\n":
            os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        world.gather(number)
    world.barrier()
    leave(world)
    return kept


def main(pairs: int) -> None:
    codes = set()
    for _ in range(pairs):
        port, children = free_port(), []
        for number in range(2):
            child = os.fork()
            if child == 0:
                global kept
                kept = rank(number, port)
                return
            children.append(child)
        codes |= {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    print(*codes)


if __name__ == "__main__":
    main(int(sys.argv[1]))
