"""How many processors a process may keep busy, where libraries look at how many there are.

A container's limit is most often a quota of time, which neither the number of processors nor a process's affinity
shows: a Pod was seen to have a quota of 7.65 on a machine of 96 (github.com/tobocop2/lilbee, pull request 660,
2026-08). OpenMP starts a thread for each that it sees, and once those have used up the quota all of them stand still
until the next period, each waiting for the others: arithmetic on the CPU (offloaded optimizers, exports) becomes many
times slower. So it is told how many, unless the user has told it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
THREADS, COMPILERS = "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"
MOST_COMPILERS = 32
"""Processes in which PyTorch compiles by default, where there are as many processors or more."""

settled: dict[str, str] = {}
"""Variables that `settle` has set, with their values."""


def shown() -> int:
    """Processors of this process's affinity; all of them where a system knows none (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable() -> int:
    """Those that are shown, and no more than this process's container has whole ones of."""
    count, most = shown(), quota()
    return count if most is None else max(1, min(count, int(most)))


def threads() -> int:
    """Threads that libraries compute with: as OMP_NUM_THREADS says (the first number of several), else one a usable
    processor."""
    asked = os.environ.get(THREADS, "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable()


def quota() -> float | None:
    """Processors' worth of time that the container may take; None without a limit."""
    for read in (lambda: QUOTA.read_text().split(), lambda: [path.read_text() for path in QUOTA_V1]):
        with suppress(OSError, ValueError, ZeroDivisionError):
            taken, period = map(int, read())  # "max" and -1: no limit
            if taken > 0:
                return taken / period
    return None


def settle() -> None:
    """Tell libraries that are yet to be loaded, in this process and those that it starts, of a quota that binds."""
    if (count := usable()) < shown():
        for name, value in shares(count).items():
            if name not in os.environ:
                os.environ[name] = settled[name] = value


def shares(count: int) -> dict[str, str]:
    """What a process that may keep `count` processors busy is told. Two compilers at least: one would be the process
    itself, whose other threads (the watch over the ranks) would wait for it."""
    return {THREADS: str(max(1, count)), COMPILERS: str(min(max(2, count), MOST_COMPILERS))}


def is_ours(name: str) -> bool:
    """Whether a variable is free to be set: unset, or as `settle` has set it."""
    return name not in os.environ or os.environ[name] == settled.get(name)
