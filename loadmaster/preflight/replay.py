"""Eager autograd by sizes instead of numbers: the same operations, saved tensors and lifetimes, no arithmetic.

A training step is replayed on `Tape` in the order in which PyTorch runs it. A storage is alive from its
allocation until its last reference goes, as in CPython; a node of the graph keeps what its backward needs
until it has run; nodes run newest first; gradients that meet are added in place. The peak is what
`torch.cuda.max_memory_allocated` would show, but for temporaries inside a kernel, which the ops of
`blocks.py` name one by one. The same replay counts FLOPs, bytes moved and kernels for the speed model.

Proved against traces of the real modules on the meta device (tests/preflight/test_replay.py). A trace cannot
add gradients in place (its dispatch mode forbids it), so `in_place=False` replays a trace.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from loadmaster.preflight.graph import Leaf, Node, Split, Storage, Tensor

TAGS = ("activations", "logits", "gradients", "quantization", "communication", "optimizer")


class Stop(Exception):
    """Recomputation has made everything that was saved."""


class Region:
    """What a checkpointed function keeps: its input and how to run it again; selective, also some results."""

    def __init__(self, tape: Tape, function: Callable, argument: Tensor, selective: bool, offloaded: bool):
        self.tape, self.function = tape, function
        self.node, self.bytes, self.offloaded = argument.node, argument.bytes, offloaded
        self.fetched: Storage | None = None
        self.argument: Any = None
        if offloaded:
            tape.offloaded.append(self)
        else:  # inside another region, whose recomputation makes it
            self.argument = argument.storage if tape.pack is None else tape.pack(argument.storage)
        self.results: deque[Storage] | None = deque() if selective else None
        self.count = 0
        self.made: dict[int, Storage] | None = None

    def pack(self, storage: Storage) -> tuple[Region, int]:
        self.count += 1
        return self, self.count - 1

    def unpack(self, index: int) -> Storage:
        if self.made is None:
            self.made = {}
            recalled = self.tape.keeping(self.results, recalling=True)
            argument = Tensor(self._argument(), self.node, self.bytes)
            with self.tape.packing(self._keep), recalled, self.tape.gradients(True), suppress(Stop):
                self.function(argument)
        return self.made.pop(index)

    def _argument(self) -> Storage:
        if not self.offloaded:
            return self.argument if isinstance(self.argument, Storage) else self.argument[0].unpack(self.argument[1])
        self.fetch()
        storage, self.fetched = self.fetched, None
        self.tape.offloaded.pop()
        if self.tape.offloaded:
            self.tape.offloaded[-1].fetch()
        return storage

    def fetch(self) -> None:
        """From host memory, unless it is here."""
        if self.fetched is None:
            self.fetched = self.tape.alloc(self.bytes)

    def _keep(self, storage: Storage) -> None:
        made = self.made
        made[self.tape.recomputed] = storage
        self.tape.recomputed += 1
        if self.tape.recomputed == self.count:
            raise Stop


@dataclass
class Work:
    """What the replayed kernels do."""

    matmul_flops: float = 0.0
    fp8_flops: float = 0.0
    """Of matmuls on fp8 units, besides those."""
    attention_flops: float = 0.0
    bytes_moved: float = 0.0
    """By kernels that are bound by memory: every input read and every output written once."""
    bytes_unfused: float = 0.0
    """Of those, where layers are compiled, by kernels of their own: narrow products, attention, casts to fewer bits,
    and what is outside of layers."""
    narrow_bytes: float = 0.0
    """Of bytes moved, by products with few columns, which do `narrow_flops` beside."""
    narrow_flops: float = 0.0
    kernels: int = 0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(*(getattr(self, k) + times * getattr(other, k) for k in self.__dataclass_fields__))


def _references_when_alone() -> int:
    """What sys.getrefcount says of an object that only a list holds, looked at in a loop over it."""
    for thing in [object()]:
        return sys.getrefcount(thing)
    return 0


ALONE = _references_when_alone()


class Tagged:
    """While it is entered, what is allocated is of this component. A class, for a generator takes twice the time."""

    __slots__ = ("before", "tag", "tape")

    def __init__(self, tape: Tape, tag: str):
        self.tape, self.tag = tape, tag

    def __enter__(self) -> None:
        self.before, self.tape.tag = self.tape.tag, self.tag

    def __exit__(self, *_: object) -> None:
        self.tape.tag = self.before


class Tape:
    def __init__(self, in_place: bool = True):
        self.in_place = in_place
        self.live = self.peak = self.shown = 0
        self.tag, self.gradient_tag = "activations", "gradients"
        self.widens_gradients = False
        """Whether a bf16 gradient is kept, or added up, as an fp32 copy (zero1)."""
        self.by_tag = dict.fromkeys(TAGS, 0)
        self.climbing = False
        """Whether all is in use that was at the peak so far, which `at_peak` does not yet hold by component."""
        self.at_peak = dict(self.by_tag)
        self.phases: dict[str, dict[str, int]] = {}
        """Of each part of the step that has been told to `enter`, its peak by component."""
        self.phase = ""
        self.work = Work()
        self.in_layer = False
        """Whether what runs now is a decoder layer, forward or backward."""
        self.order = 0
        self.enabled = True
        self.pack: Callable | None = None
        self.recomputed = 0
        self.results: deque[Storage] | None = None
        self.recalling = False
        self.offloaded: list[Region] = []
        self.leaves: list[Leaf] = []

    def top(self) -> None:
        """Note what is in use now, if that is the peak: called before any of it goes."""
        if self.climbing:
            self.climbing, self.at_peak = False, dict(self.by_tag)

    def enter(self, phase: str) -> None:
        """What follows is another part of the step, with a peak of its own."""
        self.top()
        if self.phase:
            self.phases[self.phase] = self.at_peak
        self.phase, self.peak, self.at_peak = phase, self.live, dict(self.by_tag)

    def hide(self) -> None:
        """What is allocated until `show` is no peak, whatever its size: other code runs in its place."""
        self.top()
        self.shown, self.peak = self.peak, sys.maxsize

    def show(self) -> bool:
        """Look again, if `hide` was called; say whether it was."""
        hidden = self.peak == sys.maxsize
        if hidden:
            self.peak = self.shown
            self.correct(0)
        return hidden

    def correct(self, size: int) -> None:
        """Count activations that are there already with so many bytes more; less where negative."""
        self.top()
        self.live += size
        self.by_tag["activations"] += size
        if self.live > self.peak:
            self.peak, self.climbing = self.live, True

    # ------------------------------------------------------------ building

    def alloc(self, size: float) -> Storage:
        return Storage(self, int(size))

    def parameter(self, size: float, trainable: bool, accumulated: bool = False, uses: int = 1) -> Tensor:
        """A weight of `size` bytes. It takes no room here (what is always there is counted elsewhere); its gradient
        does, unless it is `accumulated`: there already, from an earlier micro-batch."""
        leaf = Leaf(self.alloc(0) if accumulated else None, uses) if trainable else None
        if leaf is not None:
            self.leaves.append(leaf)
        return Tensor(self.alloc(0), leaf, int(size))

    def tagged(self, tag: str) -> Tagged:
        return Tagged(self, tag)

    def moved(self, *sizes: float, fused: bool = True) -> None:
        """fused: in a compiled layer, with the kernels around it."""
        self.work.bytes_moved += sum(sizes)
        if not (fused and self.in_layer):
            self.work.bytes_unfused += sum(sizes)
        self.work.kernels += 1

    def narrow(self, flops: float, size: float) -> None:
        """A product with few columns, a kernel of its own."""
        self.moved(size, fused=False)
        self.work.narrow_flops += flops
        self.work.narrow_bytes += size

    def needs(self, *inputs: Tensor) -> bool:
        if self.enabled:
            for tensor in inputs:
                if tensor.node is not None:
                    return True
        return False

    def link(self, output: Tensor, inputs: Sequence[Tensor], saved: Sequence[Storage], backward: Callable) -> Tensor:
        """Give `output` its backward; does nothing where no gradient is needed."""
        nodes = [tensor.node for tensor in inputs]
        if not (self.enabled and any(nodes)):
            return output
        pack = self.pack
        kept = list(saved) if pack is None else [pack(s) for s in saved]
        self.order += 1
        output.node = Node(self.order, nodes, backward, kept)
        return output

    def on_gradient(self, x: Tensor, run: Callable[[], None], saved: Sequence[Storage] = ()) -> Tensor:
        """x as it is; `run` is called in the backward pass where x's gradient is there, before it goes on."""

        def backward(g: Storage, _: list) -> list:
            run()
            return [g]

        return self.link(Tensor(x.storage, x.node), [x], saved, backward)

    def enter_layer(self, x: Tensor) -> Tensor:
        """x, with which a decoder layer begins, and ends in the backward pass."""
        x = self.on_gradient(x, partial(setattr, self, "in_layer", False))
        self.in_layer = True
        return x

    def leave_layer(self, x: Tensor) -> Tensor:
        self.in_layer = False
        return self.on_gradient(x, partial(setattr, self, "in_layer", True))

    def op(
        self, size: float, inputs: Sequence[Tensor], saved: Sequence[Storage], backward: Callable, kept: bool = False
    ) -> Tensor:
        """An operation whose result has `size` bytes; `kept`: a selective checkpoint keeps it.

        Like PyTorch, what the backward needs is packed before the result is allocated.
        """
        output = Tensor.__new__(Tensor)
        output.node = None
        self.link(output, inputs, saved, backward)
        output.storage, output.bytes = self.alloc_kept(size) if kept else self.alloc(size), int(size)
        return output

    def alloc_kept(self, size: float) -> Storage:
        """What a selective checkpoint keeps: allocated once, and found again when the rest is made again."""
        if self.recalling and self.results is not None:
            return self.results.popleft()
        storage = self.alloc(size)
        if self.results is not None:
            self.results.append(storage)
        return storage

    def runs(self, kept: bool) -> bool:
        """Whether an operation does its work now: not when its result is recalled."""
        return not (kept and self.recalling and self.results is not None)

    @contextmanager
    def gradients(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def packing(self, pack: Callable) -> Iterator[None]:
        before, self.pack = self.pack, pack
        counted, self.recomputed = self.recomputed, 0
        try:
            yield
        finally:
            self.pack, self.recomputed = before, counted

    @contextmanager
    def keeping(self, results: deque[Storage] | None, recalling: bool) -> Iterator[None]:
        before = self.results, self.recalling
        self.results, self.recalling = results, recalling
        try:
            yield
        finally:
            self.results, self.recalling = before

    def checkpoint(
        self, function: Callable[[Tensor], Tensor], argument: Tensor, selective: bool = False, offloaded: bool = False
    ) -> Tensor:
        """torch.utils.checkpoint without reentrance: saved tensors are made again when first asked for.

        selective: by operation; results that are `kept` are not made again. offloaded: the argument goes to the host.
        """
        region = Region(self, function, argument, selective, offloaded)
        with self.packing(region.pack), self.keeping(region.results, recalling=False):
            return function(argument)

    # ------------------------------------------------------------ backward

    def backward(self, output: Node, gradient: list[Storage]) -> None:
        """Run the graph from `output`, newest node first. `gradient` is emptied: nobody else holds it."""
        buffers: dict[Node, Any] = {output: gradient.pop()}
        queue = [(-output.order, output)]
        while queue:
            node = heapq.heappop(queue)[1]
            results = self._run(node, buffers)
            results.reverse()
            for target in node.inputs:
                result = results.pop()
                if target is None or result is None:
                    continue
                if isinstance(target, Leaf):
                    box, result = [result], None
                    self._into_leaf(target, box)
                    box.clear()
                elif isinstance(target, Split):
                    if target not in buffers:
                        buffers[target] = []
                        heapq.heappush(queue, (-target.order, target))
                    buffers[target].append(result)
                elif target in buffers:
                    two, result = [buffers.pop(target), result], None
                    buffers[target] = self._sum(two)
                    del two
                else:
                    buffers[target] = result
                    heapq.heappush(queue, (-target.order, target))
                result = None
            node.inputs = []

    def _run(self, node: Node, buffers: dict[Node, Any]) -> list[Storage | None]:
        gradient = buffers.pop(node)
        saved = [s if isinstance(s, Storage) else s[0].unpack(s[1]) for s in node.saved]
        before, self.enabled = self.enabled, False
        results = list(node.backward(gradient, saved))
        self.enabled = before
        node.saved = node.backward = None
        return results

    def _sum(self, two: list[Storage], fused: bool = True) -> Storage:
        """The sum of two gradients, in the memory of one that nobody else holds."""
        self.moved(two[0].bytes, two[1].bytes, two[0].bytes, fused=fused)
        for storage in two:
            if self.in_place and sys.getrefcount(storage) == ALONE:
                return storage
        return self.alloc(two[0].bytes)

    def _into_leaf(self, leaf: Leaf, box: list[Storage]) -> None:
        leaf.uses -= 1
        if leaf.waiting is not None:
            box.append(leaf.waiting)
            leaf.waiting = None
            box[:] = [self._sum(box, fused=False)]
        if leaf.uses > 0:
            leaf.waiting = box.pop()
        elif leaf.gradient is None:
            if self.widens_gradients:
                self.moved(box[0].bytes, 2 * box[0].bytes, fused=False)
                box.append(self.alloc(2 * box[0].bytes))
            leaf.gradient = box.pop()
            leaf.gradient.retag(self.gradient_tag)
            if leaf.arrived is not None:
                leaf.arrived()
        else:
            self.moved(*(3 * [box[0].bytes]), fused=False)
            if self.widens_gradients:
                self.alloc(2 * box[0].bytes)
