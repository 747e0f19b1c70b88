"""How much memory of this machine, or of this container, can still be taken."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Versions 2 and 1: folder, and the names of the limit, of what is taken, and of the cached part of that."""


def free_host_bytes() -> float:
    """Memory that can still be taken on this machine, or in this container."""
    import psutil  # not by plans, which take none

    found: list[float] = [psutil.virtual_memory().available]
    for folder, largest, current, inactive in CGROUPS:
        with suppress(OSError, ValueError):
            limit, used = (folder / largest).read_text().strip(), int((folder / current).read_text())
            cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if limit.isdigit():
                found.append(int(limit) - used + int(cached.get(inactive, 0)))
    return min(found)
