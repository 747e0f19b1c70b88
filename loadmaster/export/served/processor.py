"""Whether vLLM on this processor can serve a format, and in minutes.

FP8: PyTorch multiplies it on a CPU through oneDNN, which on some processors has no kernel for it, or nothing but its
reference code: 0.08 GFLOP/s (one with AMX for bf16 and int8, two cores, 2026-11-26), where a forward pass of a model of
135 million parameters over 100 tokens took five minutes. Others took two minutes for the whole of serve-check.

fp8_block: vLLM 0.32 has a product of its own (fp8_scaled_mm_cpu), with AMX alone. int4: its library for x86 processors
without AVX-512 lacks the product (cpu_gemm_wna16). nvfp4: it has one for no processor.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from loadmaster.errors import NotChecked
from loadmaster.export.process import foreign_environment

LEAST_FLOPS = 5e8
PROBE_S = 120
ROWS, SIZE = 16, 576
LACKING = "no kernel"
FP8_PROBE = f"""
import time, torch
x, w = (torch.ones(rows, {SIZE}).to(torch.float8_e4m3fn) for rows in ({ROWS}, {SIZE}))
one = torch.ones(())
taken = []
try:
    while len(taken) < 2 or len(taken) < 5 and sum(taken) < 2:
        start = time.perf_counter()
        torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        taken.append(time.perf_counter() - start)
    print(min(taken))
except RuntimeError:
    print("{LACKING}")
"""
"""vLLM's product: seconds of the fastest of five, of two where slow: the first prepares, any may be preempted."""
BLOCK_PROBE = f"""
import torch
print("" if torch.cpu._is_amx_tile_supported() else "{LACKING}")
"""
INT4_PROBE = f"""
import platform, torch
print("{LACKING}" if platform.machine() == "x86_64" and not torch.cpu._is_avx512_supported() else "")
"""
PRODUCTS = {
    "fp8": (FP8_PROBE, "PyTorch has none of FP8"), "fp8_block": (BLOCK_PROBE, "vLLM's of FP8 in blocks needs AMX"),
    "int4": (INT4_PROBE, "vLLM's of int4 needs AVX-512"),
    "nvfp4": (f"print('{LACKING}')", "vLLM's of nvfp4 needs a GPU"),
}
"""Format (int4 of all its kinds) -> what asks for its product, and why there is none."""
ELSEWHERE = "check it on a machine with a GPU (--python of an environment with vLLM there)"


def refuse_unserved(python: Path, name: str) -> None:
    """Raises NotChecked where the interpreter's vLLM has no product of the format's for this processor, or takes
    too long for it. An interpreter that cannot say goes on: its server will."""
    probe, why = PRODUCTS.get("int4" if name.startswith("int4") else name, ("", ""))
    said = _said(python, probe) if probe else ""
    if said == LACKING:
        raise NotChecked(f"this processor has no such product ({why}); {ELSEWHERE}")
    try:
        flops = 2 * ROWS * SIZE**2 / float(said)
    except ValueError:
        return
    if flops < LEAST_FLOPS:
        raise NotChecked(
            f"PyTorch multiplies FP8 at {flops / 1e9:.2f} GFLOP/s on this processor, so a server would "
            f"take hours; {ELSEWHERE}"
        )


def _said(python: Path, probe: str) -> str:
    """The last line that the probe prints; empty where it does not end."""
    try:
        done = subprocess.run(
            [str(python), "-c", probe], env=foreign_environment(), capture_output=True, text=True, timeout=PROBE_S
        )
    except (subprocess.TimeoutExpired, OSError):
        return ""
    return done.stdout.strip().rpartition("\n")[2]
