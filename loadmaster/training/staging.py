"""Copies of what a checkpoint holds, on the host, so that the loop goes on while they are written.

What lies on a GPU is copied into pinned memory, which is kept from one checkpoint to the next: only into pinned memory
does the driver copy at the link's rate, and pinning anew each time would take longer than the copy. The loop waits for
that copy (`save_stall_s` in metrics.jsonl) and for nothing else.

Where the host has no room for a copy, nothing is copied and the loop waits until all is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loadmaster.host_memory import free_host_bytes
from loadmaster.preflight.pinned import pinned

SPARE = 0.1
"""Share of the free host memory that is left alone."""


class Staging:
    """This rank's copies. `beside`: processes on this machine that copy as much at the same time."""

    def __init__(self, beside: int = 1):
        self.beside = beside
        self.copying = True
        """Whether the last `begin` found room."""
        self._pinned: dict[str, Tensor] = {}

    def begin(self, tensors: dict[str, Tensor]) -> None:
        """Before a save of these: is there room for copies of those that have none yet?"""
        needed = sum(host_bytes(t) for key, t in tensors.items() if key not in self._pinned)
        self.copying = needed * self.beside <= (1 - SPARE) * free_host_bytes()

    def take(self, key: str, tensor: Tensor) -> Tensor:
        """A copy on the host, which is there after `settle`; the tensor itself where there is no room."""
        if not self.copying:
            return tensor.detach()
        if not tensor.is_cuda:
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        held = self._pinned.get(key)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._pinned[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return held.copy_(tensor.detach(), non_blocking=True)

    def settle(self) -> None:
        """Until all copies are there."""
        if self._pinned:
            torch.cuda.synchronize()


def host_bytes(tensor: Tensor) -> int:
    """What a copy of it takes: what lies on a GPU is copied into pinned memory."""
    return pinned(tensor.nbytes) if tensor.is_cuda else tensor.nbytes
