"""Real processes that meet over gloo on this machine, as torchrun's variables would have them."""

from __future__ import annotations

import os
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
    each: dict[int, dict[str, str]] | None = None, unfinished: tuple[int, ...] = (),
) -> Ended:
    """Run `script` as `size` ranks; wait for all but the `unfinished`, which are killed then.

    each: more environment by rank.
    """
    port, began = str(free_port()), time.monotonic()
    local = local_size or size
    running, files = [], [folder / f"output-{rank}.txt" for rank in range(size)]
    try:
        for rank in range(size):
            env = environment() | {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT), **(each or {}).get(rank, {}),
            }
            with open(files[rank], "w", encoding="utf-8") as log:
                running.append(
                    subprocess.Popen([sys.executable, str(script), *words], env=env, cwd=folder, stdout=log, stderr=log)
                )
        codes: list[int | None] = []
        for rank, process in enumerate(running):
            left = timeout_s - (time.monotonic() - began)
            codes.append(None if rank in unfinished else process.wait(timeout=max(1.0, left)))
        seconds = time.monotonic() - began
    finally:
        for process in running:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(codes, [file.read_text() for file in files], seconds)
