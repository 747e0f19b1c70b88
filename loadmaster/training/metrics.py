"""metrics.jsonl, peak memory, and the rate at which tokens pass."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from loadmaster.files import write_text
from loadmaster.preflight.hardware import GIB

RECENT_STEPS = 20
"""Steps over which train_loss is the mean: one step's loss is mostly its rows' difficulty."""


class MetricsLog:
    """One JSON object a step, appended; on a resume the lines after the checkpoint's step are dropped.

    last: the row of that step, for a log that ends before it. Only the lead writes; on another rank all this does
    nothing.
    """

    def __init__(self, path: Path, resume_step: int, lead: bool = True, last: dict[str, Any] | None = None):
        self._path, self._file = path, None
        if lead:
            rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
            lacks = last is not None and all(row["step"] < resume_step for row in rows)
            self._begin([*rows, last] if lacks else rows)

    def _begin(self, rows: list[dict[str, Any]]) -> None:
        self.close()
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Say this, too, of `step`, if it is the last one that is logged."""
        rows = read_metrics(self._path) if self._file is not None else []
        if rows and rows[-1]["step"] == step and rows[-1] | values != rows[-1]:
            self._begin([*rows[:-1], rows[-1] | values])

    def append(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps, without lines that a kill tore or a disk damaged."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line.decode())
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


def recent_loss(rows: list[dict[str, Any]]) -> float | None:
    """Mean loss of the last steps, up to RECENT_STEPS of them; skipped steps have none."""
    losses = [row["loss"] for row in rows[-RECENT_STEPS:] if row["loss"] is not None]
    return sum(losses) / len(losses) if losses else None


class Throughput:
    """Tokens per second over the last steps; time begins when it is made."""

    WINDOW = 20

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = [(time.perf_counter(), 0)]

    def update(self, tokens: int) -> float:
        self._marks = [*self._marks[-self.WINDOW :], (time.perf_counter(), self._marks[-1][1] + tokens)]
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(end - start, 1e-9)

    def pause(self) -> None:
        """Leave out what has passed since the last step (evaluation, saving)."""
        gap = time.perf_counter() - self._marks[-1][0]
        self._marks = [(moment + gap, tokens) for moment, tokens in self._marks]


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak GiB: allocated by tensors, reserved by the allocator, and in use on the device by all processes.

    On a CPU all three are the process's largest resident set.
    """
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
        return {"peak_allocated_gib": peak, "peak_reserved_gib": peak, "peak_device_gib": peak}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "peak_device_gib": (total - free) / GIB,
    }


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, on a GPU without what the allocator holds for nobody."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def most(peaks: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure the largest of all ranks'."""
    return {name: max(each[name] for each in peaks) for name in peaks[0]}


def saving_sentence(saves: dict[str, Any]) -> str:
    """Checkpoints.figures for the log."""
    how = " behind it" if saves["behind"] else ": the host has no room for a copy"
    return (
        f"checkpoints: {saves['count']} of {saves['gib']:.3f} GiB; the loop waited {saves['stall_s_mean']:.3f} s for "
        f"each, at most {saves['stall_s_max']:.3f} s; writing took {saves['write_s_mean']:.3f} s{how}"
    )


def allocated_gib(device: torch.device) -> float:
    """By tensors, now; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
