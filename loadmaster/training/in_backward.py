"""The optimizer stepped inside the backward pass: each layer's gradients go as soon as those of the next one are there.

All gradients are never there together, which of a full fine-tune in bf16 saves 2 bytes a parameter; the update is the
same. It asks for three things. A step is one micro-batch, for a later one would find changed weights. The norm of all
gradients is known only when most are gone, so they cannot be clipped. And a gradient that is not finite leaves out its
own layer, on all ranks, not the whole step; where the loss is not a number, that is every layer.

Whether a layer's gradients are finite is read on the host one layer later, so nothing waits for the GPU. Under
fully_shard the hooks see each rank's shards after they were reduced (torch.distributed.fsdp calls them there).

    backward of layer i     its gradients come; those of layer i + 1 are stepped and dropped
    clip                    steps the last of them, and gives the norm
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import local

LAYER = re.compile(r"\blayers\.\d+\.")


class BackwardOptimizer(TrainingOptimizer):
    """TrainingOptimizer with a bucket for each decoder layer, and one for every parameter outside of them."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._lr: float | None = None
        self._missing: list[int] = []
        self._norms: list[_Norm] = []
        self._waiting: tuple[int, _Norm] | None = None
        arrived = WeakMethod(self._arrived)  # the collector does not see hooks: one of ours would keep all for good
        for index, bucket in enumerate(self.buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: arrived()(index))

    @staticmethod
    def split(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            found = LAYER.search(name)
            groups.setdefault(found.group() if found else name, []).append((name, parameter))
        return list(groups.values())

    def begin(self, lr: float) -> None:
        self._lr, self._norms, self._waiting = lr, [], None
        self._missing = [len(bucket.parameters) for bucket in self.buckets]

    def _arrived(self, index: int) -> None:
        if self._lr is None:
            raise RuntimeError("gradients came before begin() said at which rate they are stepped")
        if not self._missing[index]:
            raise RuntimeError("a second micro-batch would find weights that the first one has stepped")
        self._missing[index] -= 1
        if not self._missing[index]:
            self._complete(index)

    @torch.no_grad()
    def _complete(self, index: int) -> None:
        gradients = [local(p.grad) for p in self.buckets[index].parameters if p.grad is not None]
        before, self._waiting = self._waiting, (index, _Norm(gradients, self.sum_over_shards if self.sharded else None))
        self._norms.append(self._waiting[1])
        self._step_waiting(before)

    def _step_waiting(self, waiting: tuple[int, _Norm] | None) -> None:
        if waiting is None:
            return
        index, norm = waiting
        if norm.is_finite():
            with _default_stream(norm):
                self._step(self.buckets[index], self._lr)
        else:
            for parameter in self.buckets[index].parameters:
                parameter.grad = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Step what the backward pass left, and give the norm of all gradients; they were not scaled."""
        for index, missing in enumerate(self._missing):
            if missing and any(p.grad is not None for p in self.buckets[index].parameters):
                self._complete(index)  # a parameter that the loss does not depend on has no gradient
        self._step_waiting(self._waiting)
        squares = torch.stack([norm.squares for norm in self._norms]).sum()
        self._lr, self._norms, self._waiting = None, [], None
        return squares.sqrt()

    def step(self, lr: float) -> None:
        """Nothing is left to do: the backward pass and `clip` have stepped everything."""


@contextmanager
def _default_stream(norm: _Norm) -> Iterator[None]:
    """After these gradients, and before what the current stream is given next: FSDP2 calls while a stream of its own is
    the current one, and bitsandbytes' kernels run in the default one, which does not wait for it. Nor is it to wait for
    all that stream has: the next layer's gradients are on their way there, beside the backward pass."""
    if norm.event is None:
        yield
        return
    device = norm.squares.device
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_event(norm.event)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)


class _Norm:
    """The sum of squares of some gradients, fp32, over all shards of them, on its way to the host."""

    def __init__(self, gradients: list[Tensor], over_shards: Callable[[Tensor], Tensor] | None):
        self.squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        if over_shards is not None:
            self.squares = over_shards(self.squares)
        self._here, self.event = self.squares, None
        if self.squares.is_cuda:
            self._here = torch.empty((), pin_memory=True)
            self._here.copy_(self.squares, non_blocking=True)
            self.event = torch.cuda.current_stream(self.squares.device).record_event()

    def is_finite(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return self._here.is_meta or math.isfinite(self._here.item())  # a trace has sizes alone
