"""What a training program allocates on a card, in its order, where there is no card: tensors with sizes and no values.

Every storage is an event when an operation makes it and when its last reference goes, as the allocator of a card would
hear of it. Besides: cuBLAS's workspaces (32 MiB for the thread that runs forward, and for autograd's), and what the
flash kernel's backward pass takes inside itself.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from caching_allocator import Event
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

WORKSPACE = 32 * 2**20
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm"}
ATTENTION = ("flash_attention_backward", "varlen_attn_backward")
"""Ends of names."""


class Recorder(TorchDispatchMode):
    def __init__(self, device: str, metas: Any = None):
        """metas: does operations, or remembers what they make."""
        super().__init__()
        self.device, self.metas = device, metas
        self.events: list[Event] = []
        self.numbers: dict[int, int] = {}
        self.last = 0
        self.workspaces = {False: False, True: False}
        self.in_backward = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def took(self, size: int) -> int:
        self.last += 1
        self.events.append((self.last, size))
        return self.last

    def let_go(self, number: int) -> None:
        self.events.append((number, 0))

    def passing(self, *sizes: int) -> None:
        """Allocated and let go again."""
        for number in [self.took(size) for size in sizes if size]:
            self.let_go(number)

    def multiplied(self) -> None:
        """cuBLAS keeps a workspace for each thread."""
        if not self.workspaces[self.in_backward]:
            self.workspaces[self.in_backward] = True
            self.took(WORKSPACE)

    def count(self, tensor: torch.Tensor) -> None:
        fake = isinstance(tensor, FakeTensor) and self.device == "meta"  # a compiler's
        if fake or is_traceable_wrapper_subclass(tensor) or tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.numbers and size:
            self.numbers[key] = self.took(size)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.let_go(self.numbers.pop(key))

    def held(self, model: nn.Module) -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            self.count(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name in PRODUCTS:
            self.multiplied()
        result = self.metas(function, args, kwargs) if self.metas else function(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.count(value)
        if name.endswith(ATTENTION):
            self.passing(*flash_scratch(args[1], args[2]))
        return result


def flash_scratch(query: torch.Tensor, key: torch.Tensor) -> list[int]:
    """A sum for each row, queries' gradient added up in fp32, and where several of their heads share one of the keys,
    keys' and values' gradients of each."""
    grouped = query.numel() > key.numel()
    each = query.numel() * query.element_size() if grouped else 0
    return [4 * (query.numel() // query.shape[-1]), 4 * query.numel(), each, each]
