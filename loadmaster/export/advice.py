"""Which GPU serves which format, and how: what a user would otherwise learn from a slow or failed server. Pure.

Compute capabilities are those that the sources of vllm 0.33.0 and sglang 0.5.23 ask for (read 2026-11-23); the GPU's
own is in catalog/gpus.yaml.
"""

from __future__ import annotations

from loadmaster import catalog

FP8_UNITS, FP4_UNITS = 8.9, 10.0
"""Least compute capability of FP8 and FP4 matrix units."""


def lines(format_name: str, gpu: str) -> list[str]:
    """What to know of serving this format on `gpu` (a name of the catalogue); empty: nothing.

    gpu: "auto" or a name that is not in the catalogue: advice that holds for any.
    """
    if format_name == "gguf":
        return ["for llama.cpp and Ollama; vLLM reads it only with its plugin vllm-gguf-plugin"]
    if (facts := catalog.gpus().get(gpu)) is None:
        return []
    capability = float(facts["compute_capability"])
    if format_name in ("fp8", "fp8_block") and capability < FP8_UNITS:
        return [
            f"{gpu} has no FP8 matrix units: vLLM reads these weights in FP8 and computes in bf16 (Marlin). That saves "
            "memory, not arithmetic; int4 saves twice the memory in the same way."
        ]
    if format_name == "fp8_block" and capability < 9.0:
        return [f"blocks of 128 x 128 are made for Hopper and Blackwell; on {gpu} take fp8"]
    if format_name == "nvfp4" and capability < FP4_UNITS:
        return [
            f"{gpu} has no FP4 matrix units (Blackwell has): vLLM reads these weights in FP4 and computes in bf16 "
            "(Marlin). int4 is as small, and better supported there."
        ]
    if format_name.startswith("int4") and capability >= FP8_UNITS:
        return [
            f"{gpu} computes int4 weights in bf16: the smallest in memory and quickest for a few requests at once. "
            "Where many run at once fp8 is faster, and loses less."
        ]
    return []
