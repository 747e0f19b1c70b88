"""The GPUs that this process sees, asked through the driver's management library (NVML, by ctypes).

It answers in milliseconds and needs no CUDA context. Its memory figure counts what the driver itself keeps.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

NVML = "libnvidia-ml.so.1"
MOST_PARTS = 7
"""Of one GPU, by MIG."""


def local_gpus() -> list[tuple[str, float, float]]:
    """(driver's name, total memory in GiB, compute capability) of each visible GPU, in CUDA's order; empty without a
    driver. Of a part of a GPU (MIG) its own memory: CUDA shows a process one, and where no other is named the first."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        by_part = (chosen or "").startswith("MIG-")
        handles = _part(nvml, chosen.split(",")[0]) if by_part else _whole(nvml, chosen)
        cards = [_card(nvml, handle) for handle in handles]
        return [card for card in cards if card is not None]
    finally:
        nvml.nvmlShutdown()


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _whole(nvml: Any, chosen: str | None) -> list[ctypes.c_void_p]:
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    handles, uuids = [], []
    for index in range(count.value):
        device, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
            nvml.nvmlDeviceGetUUID(device, uuid, 96)
            handles.append(device)
            uuids.append(uuid.value.decode())
    shown = [handles[number] for number in visible(chosen, uuids)]
    whole = [device for device in shown if not _is_divided(nvml, device)]
    return whole or [part for device in shown for part in _first_part(nvml, device)][:1]


def _is_divided(nvml: Any, device: ctypes.c_void_p) -> bool:
    now, later = ctypes.c_uint(), ctypes.c_uint()
    return nvml.nvmlDeviceGetMigMode(device, ctypes.byref(now), ctypes.byref(later)) == 0 and now.value == 1


def _first_part(nvml: Any, device: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    """Empty where a GPU is to be divided and is not yet."""
    for index in range(MOST_PARTS):
        part = ctypes.c_void_p()
        if nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index, ctypes.byref(part)) == 0:
            return [part]
    return []


def _part(nvml: Any, uuid: str) -> list[ctypes.c_void_p]:
    device = ctypes.c_void_p()
    return [device] if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)) == 0 else []


def _card(nvml: Any, device: ctypes.c_void_p) -> tuple[str, float, float] | None:
    name, memory, whole = ctypes.create_string_buffer(96), _Memory(), ctypes.c_void_p()
    major, minor = ctypes.c_int(), ctypes.c_int()
    told = nvml.nvmlDeviceGetName(device, name, 96), nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    if nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device, ctypes.byref(whole)) == 0:
        device = whole
    if any(told) or nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)):
        return None  # of a chip that shares the host's memory the driver tells none
    return name.value.decode(), memory.total / 2**30, major.value + minor.value / 10


def visible(chosen: str | None, uuids: Sequence[str]) -> list[int]:
    """Which of a machine's GPUs CUDA shows, in its order, by CUDA_VISIBLE_DEVICES; None: all. Pure.

    Numbers, or beginnings of UUIDs. The list ends before what is no GPU; one that names a GPU twice shows none.
    """
    if chosen is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for part in map(str.strip, chosen.split(",")):
        if part.isdecimal():
            named = [number for number in range(len(uuids)) if number == int(part)]
        else:
            named = [number for number, uuid in enumerate(uuids) if part.startswith("GPU-") and uuid.startswith(part)]
        if len(named) != 1:
            break
        found += named
    return found if len(set(found)) == len(found) else []
