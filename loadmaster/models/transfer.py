"""From host to device without waiting: a copy from memory that is not pinned waits for what the GPU still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the host, on the device; later work on the device's stream finds it there."""
    here = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return here.to(device, non_blocking=True)
