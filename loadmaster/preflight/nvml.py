"""The GPUs that this process sees, asked through the driver's management library (NVML, by ctypes).

It answers in milliseconds and needs no CUDA context. Its memory figure counts what the driver itself keeps.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

NVML = "libnvidia-ml.so.1"


def local_gpus() -> list[tuple[str, float, float]]:
    """(driver's name, total memory in GiB, compute capability) of each visible GPU, in CUDA's order; empty without a
    driver. Of a part of a GPU (MIG) its own memory."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        parts = (chosen or "").startswith("MIG-")
        handles = _parts(nvml, chosen.split(",")) if parts else _whole(nvml, chosen)
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
    return [handles[number] for number in visible(chosen, uuids)]


def _parts(nvml: Any, uuids: list[str]) -> list[ctypes.c_void_p]:
    handles = []
    for uuid in uuids:
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByUUID(uuid.strip().encode(), ctypes.byref(device)) != 0:
            break
        handles.append(device)
    return handles


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
