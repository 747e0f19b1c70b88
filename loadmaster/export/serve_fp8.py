"""Whether a processor can serve FP8 in minutes.

PyTorch multiplies FP8 on a CPU through oneDNN, which on some processors has nothing but its reference code: 0.08
GFLOP/s (one with AMX for bf16 and int8, two cores, 2026-11-26), where a forward pass of a model of 135 million
parameters over 100 tokens took five minutes. Others took two minutes for the whole of serve-check.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from loadmaster.errors import ExportRejected
from loadmaster.export.process import foreign_environment

LEAST_FLOPS = 5e8
PROBE_S = 120
ROWS, SIZE = 16, 576
PROBE = f"""
import time, torch
x, w = (torch.ones(rows, {SIZE}).to(torch.float8_e4m3fn) for rows in ({ROWS}, {SIZE}))
one = torch.ones(())
taken = []
while len(taken) < 2 or len(taken) < 5 and sum(taken) < 2:
    start = time.perf_counter()
    torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    taken.append(time.perf_counter() - start)
print(min(taken))
"""
"""Seconds of the fastest of five products, of two where they are slow: the first prepares, any may be preempted."""


def refuse_slow_fp8(python: Path) -> None:
    """Raises ExportRejected where the interpreter's PyTorch takes too long for an FP8 product on this processor.

    An interpreter that cannot say goes on: its server will.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", PROBE], env=foreign_environment(), capture_output=True, text=True, timeout=PROBE_S
        )
        seconds = float(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError):
        return
    flops = 2 * ROWS * SIZE**2 / seconds
    if flops < LEAST_FLOPS:
        raise ExportRejected(
            f"not checked: PyTorch multiplies FP8 at {flops / 1e9:.2f} GFLOP/s on this processor, so a server would "
            "take hours; check it on a machine with a GPU (--python of an environment with vLLM there)"
        )
