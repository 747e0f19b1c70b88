"""A rank under the watchdog that trains nothing: it reduces a number each step, and one rank misbehaves at step 3.

python watched.py HOW RANK LOGS, with torchrun's variables. HOW: sleep, stop (SIGSTOP), kill (SIGKILL), raise, none, or
early: stop, before there is a watchdog.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from loadmaster.config.show import show_error
from loadmaster.errors import LoadmasterError, TrainingFailed
from loadmaster.training import watchdog
from loadmaster.training.watchdog import Watchdog
from loadmaster.training.world import join, leave

HANG_S, SILENCE_S = 8.0, 4.0


def misbehave(how: str) -> None:
    if how == "sleep":
        time.sleep(600)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise TrainingFailed("the disk is full")


def begin(world, bad_rank: int) -> None:
    watchdog.JOIN_S = 2.0
    with watchdog.as_they_begin(world.rank):
        if world.rank == bad_rank:
            misbehave("stop")
        world.barrier()


def main(how: str, bad_rank: int, logs: Path) -> int:
    world = join("cpu")
    try:
        if how == "early":
            begin(world, bad_rank)
        with Watchdog(world, logs, HANG_S, SILENCE_S) as watch:
            for step in range(1, 6):
                watch.at(step, "forward")
                if step == 3 and world.rank == bad_rank:
                    misbehave(how)
                watch.at(step, "update")
                world.sum(torch.ones(1))
        print(f"rank {world.rank} done", flush=True)
        leave(world)
    except LoadmasterError as error:
        show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
