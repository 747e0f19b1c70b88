"""How PyTorch's allocator takes memory of a GPU: in one segment that grows, instead of hundreds of fixed ones.

What is free in a fixed segment and too small for what comes next stays with the allocator. By a simulation of it
(benchmarks/reserved.py) a card needs up to 8% more than a run's tensors that way (11% with Adafactor), which is more
than plans leave free (plan.reserve), and up to 2% more with segments that grow (4%).

Set in this process alone, and not by a variable: what it starts (vLLM, whose kernels share memory between processes,
which this memory cannot be) goes by its own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch

GROWING, FIXED = "expandable_segments:True", "expandable_segments:False"
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
"""With one of them the user has decided."""
SHARING = "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
"""Has NCCL register segments, which it does with fixed ones."""


def stays_fixed(environment: Mapping[str, str], kernel: str) -> str:
    """Why segments are left as they are; empty where they are to grow.

    kernel: its release, as uname says. On Windows Subsystem for Linux the driver refuses memory of this kind, some of
    it from the first tensor on (pytorch #192330).
    """
    for name in VARIABLES:
        if environment.get(name):
            return f"{name} is set"
    if environment.get(SHARING, "0").lower() not in ("", "0", "false", "n", "no"):
        return f"{SHARING} is set"
    return "this is Windows Subsystem for Linux" if "microsoft" in kernel.lower() else ""


def settle(device: torch.device) -> str:
    """Let segments grow from now on, where that is known to work; returns what the allocator has: nothing on a CPU.

    Tried with a first tensor: a driver that has no such memory (some virtual GPUs) fails there, and fixed segments are
    taken as before.
    """
    if device.type != "cuda":
        return ""
    if reason := stays_fixed(os.environ, platform.release()):
        return f"as it was: {reason}"
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # there in torch 2.11 to 2.13
    if tell is None:
        return f"as it was: torch {torch.__version__} has no such setting"
    tell(GROWING)
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        tell(FIXED)
        return f"fixed segments: the driver has no others ({str(error).splitlines()[0]})"
    return "expandable segments"
