"""Real processes that meet over gloo on this machine, as torchrun's variables would have them.

Ranks are forks of a process that has imported what all of them need, most of what so short a process takes; each runs
its script as `python SCRIPT` would, to the interpreter's end.

python -m tests.training.processes < RANKS.json is that process; it says each rank's process, and its code as it ends.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT, environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Ended:
    """codes: exit code by rank, None for one that had to be killed at the end. output: by rank, both streams."""

    codes: list[int | None]
    output: list[str]
    seconds: float


def run_ranks(
    script: Path, *words: str, size: int, folder: Path, local_size: int | None = None, timeout_s: float = 60.0,
    each: dict[int, dict[str, str]] | None = None, unfinished: tuple[int, ...] = (), fork: bool = True,
) -> Ended:
    """Run `script` as `size` ranks; wait for all but the `unfinished`, which are killed then.

    each: more environment by rank. fork: not where the memory of each is measured, nor where some find other code.
    """
    port, began = str(free_port()), time.monotonic()
    local = local_size or size
    alike = environment() | {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    told = [
        {
            "words": [str(script), *words], "folder": str(folder), "log": str(folder / f"output-{rank}.txt"),
            "environment": alike | {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                **(each or {}).get(rank, {}),
            },
        }
        for rank in range(size)
    ]
    running = Forks(told, alike) if fork else Processes(told)
    try:
        codes: list[int | None] = []
        for rank in range(size):
            left = max(1.0, timeout_s - (time.monotonic() - began))
            codes.append(None if rank in unfinished else running.wait(rank, left))
        seconds = time.monotonic() - began
    finally:
        running.kill()
    return Ended(codes, [Path(rank["log"]).read_text() for rank in told], seconds)


class Processes:
    def __init__(self, ranks: list[dict]):
        self._ranks = []
        for rank in ranks:
            with open(rank["log"], "w", encoding="utf-8") as log:
                self._ranks.append(
                    subprocess.Popen(
                        [sys.executable, *rank["words"]], env=rank["environment"], cwd=rank["folder"], stdout=log,
                        stderr=log,
                    )
                )

    def wait(self, rank: int, timeout: float) -> int:
        return self._ranks[rank].wait(timeout=timeout)

    def kill(self) -> None:
        for process in self._ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


class Forks:
    """The process that ranks are forks of, and their codes."""

    def __init__(self, ranks: list[dict], env: dict[str, str]):
        command = [sys.executable, "-m", "tests.training.processes"]
        self._process = subprocess.Popen(
            command, env=env, cwd=ROOT, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._codes: dict[int, int] = {}
        json.dump(ranks, self._process.stdin)
        self._process.stdin.close()

    def wait(self, rank: int, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while rank not in self._codes:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(f"rank {rank}", timeout)
            line = os.read(self._process.stdout.fileno(), LINE).decode()
            assert len(line) == LINE, "the process that ranks are forks of has ended"
            ended, code = map(int, line.split())
            self._codes[ended] = code
        return self._codes[rank]

    def kill(self) -> None:
        """All ranks that are there, stopped ones too."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()


LINE = 12
"""Characters of a rank and its code: read at once, or none would know what a buffer still holds."""


def next_rank() -> list[str]:
    """What is to be run, in each rank's own process: this never returns in the one that they are forks of."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what is imported may print
    import torch.distributed  # noqa: F401

    import loadmaster.team
    import loadmaster.training.doctor
    import loadmaster.training.watchdog
    import loadmaster.training.world  # noqa: F401

    running = {}
    for rank, told in enumerate(json.load(sys.stdin)):
        child = os.fork()
        if not child:
            for number, path in enumerate([os.devnull, told["log"], told["log"]]):
                opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(opened, number)
                os.close(opened)
            os.close(answers)
            os.chdir(told["folder"])
            os.environ.clear()
            os.environ.update(told["environment"])
            return told["words"]
        running[child] = rank
    while running:
        child, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        os.write(answers, f"{running.pop(child)} {code}".ljust(LINE).encode())
    os._exit(0)


if __name__ == "__main__":
    sys.argv = next_rank()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
