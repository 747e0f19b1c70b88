"""The GPUs that this process sees, asked through the driver's management library (NVML, by ctypes).

It answers in milliseconds and needs no CUDA context. Its memory figure counts what the driver itself keeps.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

NVML = "libnvidia-ml.so.1"


def local_gpus() -> list[tuple[str, float, float]]:
    """(driver's name, total memory in GiB, compute capability) of each visible GPU; empty without a driver."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        cards = [_card(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    return _visible([card for card in cards if card is not None])


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _card(nvml: Any, index: int) -> tuple[str, float, float] | None:
    device, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return None
    failed = (
        nvml.nvmlDeviceGetName(device, name, 96),
        nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)),
        nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)),
    )
    if any(failed):  # of a chip that shares the host's memory the driver tells none
        return None
    return name.value.decode(), memory.total / 2**30, major.value + minor.value / 10


def _visible(cards: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return cards
    indices = [part.strip() for part in chosen.split(",") if part.strip()]
    if all(part.isdecimal() for part in indices):
        return [cards[int(part)] for part in indices if int(part) < len(cards)]
    return cards[: len([part for part in indices if not part.startswith("-")])]
