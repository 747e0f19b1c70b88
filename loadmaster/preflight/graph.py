"""What a replay is made of: storages, tensors that view them, and the graph of backward functions behind these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadmaster.preflight.replay import Tape


class Storage:
    """Bytes on the device under a component's name; gone with the last reference to it."""

    __slots__ = ("bytes", "tag", "tape")

    def __init__(self, tape: Tape, size: int):
        self.bytes, self.tape, self.tag = size, tape, tape.tag
        tape.by_tag[self.tag] += size
        tape.live += size
        if tape.live > tape.peak:
            tape.peak, tape.climbing = tape.live, True

    def __del__(self):
        tape = self.tape
        if tape.climbing:
            tape.top()
        tape.live -= self.bytes
        tape.by_tag[self.tag] -= self.bytes

    def retag(self, tag: str) -> None:
        self.tape.top()
        self.tape.by_tag[self.tag] -= self.bytes
        self.tape.by_tag[tag] += self.bytes
        self.tag = tag


class Tensor:
    """A view of a storage (`bytes` may be less than the storage's), with its place in the graph if it has one."""

    __slots__ = ("bytes", "node", "storage")

    def __init__(self, storage: Storage, node: Node | None = None, size: int | None = None):
        self.storage, self.node = storage, node
        self.bytes = storage.bytes if size is None else size


class Node:
    """One backward function: `backward(gradient, saved)` gives a Storage (or None) for each input."""

    __slots__ = ("backward", "inputs", "order", "saved")

    def __init__(self, order: int, inputs: list[Node | Leaf | None], backward: Callable, saved: list):
        self.order, self.inputs, self.backward, self.saved = order, inputs, backward, saved


class Split(Node):
    """The backward of a function with several results: it takes all their gradients, without adding them."""

    __slots__ = ()


class Leaf:
    """Where a parameter's gradient ends up, once all its `uses` in the graph have given theirs (tied weights: 2)."""

    __slots__ = ("arrived", "gradient", "uses", "waiting")

    def __init__(self, gradient: Storage | None = None, uses: int = 1):
        self.gradient, self.uses = gradient, uses
        self.waiting: Storage | None = None
        self.arrived: Callable[[], None] | None = None
        """Called when the gradient is there."""
