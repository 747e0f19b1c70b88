"""What sharded weights add to a replay: units gathered for use, and gradients on their way to their shards.

fully_shard, in the order in which it takes and frees memory (torch.distributed.fsdp 2.13, traced):

    forward    a unit is gathered into one buffer and copied out of it into parameters; the buffer stays until the
               next unit's is copied out, the parameters until the unit has run (the root's to the end). While a
               layer runs, the next one's buffer is filled; while the last one does, the head's, which stays whole. The
               embedding goes when it has run.
    backward   a unit's buffer was filled while the one after it ran; it is copied out and let go, and the buffer of
               the unit before it is taken. Afterwards the unit's gradients are copied into a buffer in fp32, which
               stays until the next unit's; the shard that comes out is kept in the weights' dtype. The embedding is not
               gathered again. Where it is in the root and a pass without gradients came first, the first layer's is
               followed by the buffer of what ran last in that, in vain.
    end        the gradients of root and embedding, and those of a first layer whose input needs none.

A plan that keeps layers whole (reshard_after_forward false) has nothing to gather in the backward pass; with several
micro-batches in a step no parameters go before its last one, so they are whole from the start. So is the head after a
pass without gradients.

Hybrid, what comes out of a reduction is summed over nodes, and its fp32 form stays to the end of the backward pass.
Weights that live in host memory are copied to the GPU for each gathering, and gradients back.
"""

from __future__ import annotations

from functools import partial

from loadmaster.preflight.blocks import Blocks
from loadmaster.preflight.graph import Leaf, Storage, Tensor
from loadmaster.preflight.shards import Unit, units, whole


class Units:
    """Does nothing where weights are not sharded."""

    def __init__(self, b: Blocks, before: bool):
        """before: whether a pass without gradients came before."""
        self.b, self.tape, self.sharded, self.before = b, b.tape, b.setup.shards > 1, before
        self.outside: dict[str, list[Leaf]] = {}
        """What is trained outside of layers, by the name of its unit."""
        if not self.sharded:
            return
        b.tape.gradient_tag = "communication"  # whole gradients are on their way to their shards
        self.kinds, self.root, self.embedding, self.head = units(b.shape, b.setup)
        self.held: list[Storage] = []
        self.ahead: list[Storage] = []
        self.prefetched: list[Storage] = []
        self.summed: list[Storage] = []
        self.scattering: list[Storage] = []
        self.shards: list[Storage] = []
        self.layers: list[Storage] = []
        """Those that are whole from before, and whose parameters are not counted one by one."""
        self.parameters: dict[int | str, Storage] = {}
        self.order: list[tuple[int, Unit]] = []
        """The layers that have run forward and are not through the backward pass."""
        self.leaves: dict[int | str, list[Leaf]] = {}

    def shard_gradients(self, second: bool) -> int:
        """Bytes that a layer's gradients leave on a GPU."""
        unit, setup = self.kinds[second], self.b.setup
        summed = unit.reduced // setup.shards if setup.replicas > 1 and setup.width < 4 else 0
        gone = self._accumulated or setup.offload == "all" or setup.in_backward
        return summed + (0 if gone else unit.trained_shard)

    def trained_shard(self, second: bool) -> int:
        """Bytes of a layer's trained parameters on a GPU."""
        return self.kinds[second].trained_shard

    @property
    def _accumulated(self) -> bool:
        return self.b.setup.gradient_accumulation_steps > 1

    def _alloc(self, size: float) -> Storage:
        with self.tape.tagged("communication"):
            return self.tape.alloc(size)

    def start(self) -> None:
        """Before the embedding."""
        if not self.sharded:
            return
        if self._stays:
            self.parameters["root"] = self._alloc(whole(self.b.shape, self.b.setup).gathered)
            return
        if self.before:
            self._find_whole()
        else:
            self._gather("root", self.root)
        if self.embedding and "embedding" not in self.parameters:
            self._gather("embedding", self.embedding)

    def _find_whole(self) -> None:
        """What a pass without gradients has left whole; of one in the same forward pass the last buffer, too."""
        shape, setup = self.b.shape, self.b.setup
        if setup.passes_first:
            self.held = [self._buffer(self.head or self.kinds[shape.is_second(shape.layers - 1)])]
        found = {"root": self.root, "head": self.head, "embedding": self.embedding if self._keeps else None}
        self.parameters |= {name: self._alloc(unit.gathered) for name, unit in found.items() if unit}
        if self._keeps:
            layers = sum(count * self.kinds[second].gathered for second, count in shape.layer_kinds)
            self.layers.append(self._alloc(layers))

    def embedded(self) -> None:
        """After the embedding."""
        if self.sharded and self.embedding and not self._keeps:
            del self.parameters["embedding"]

    @property
    def _keeps(self) -> bool:
        return self.b.setup.keeps_weights

    @property
    def _stays(self) -> bool:
        return self._accumulated and self._keeps

    def _buffer(self, unit: Unit) -> Storage:
        if self.b.setup.offload != "all":
            return self._alloc(unit.gathered)
        shards = self._alloc(unit.shard)
        buffer = self._alloc(unit.gathered)
        del shards
        return buffer

    def _gather(self, index: int | str, unit: Unit) -> None:
        buffer = self.ahead or [self._buffer(unit)]
        self.parameters[index] = self._alloc(unit.gathered)
        self.held, self.ahead = buffer, []

    def begin(self, x: Tensor, index: int, second: bool, following: bool | None) -> Tensor:
        """Before a layer runs forward; in the backward pass, after it has run.

        following: whether the next layer is of the second kind; None for the last one.
        """
        if not self.sharded:
            return x
        unit = self.kinds[second]
        self.order.append((index, unit))
        self.last = unit
        if self.layers:
            self._resize(self.layers, self.layers[0].bytes - unit.gathered)
            self.parameters[index] = self._alloc(unit.gathered)
        elif not self._stays:
            self._gather(index, unit)
            ahead = self.kinds[following] if following is not None else None if self.before else self.head
            self.ahead = [self._buffer(ahead)] if ahead else []

        def end_backward() -> None:
            self._reduce(index, unit)
            self.order.pop()

        return self.tape.on_gradient(x, end_backward)

    def end(self, x: Tensor, index: int, leaves: list[Leaf]) -> Tensor:
        """After a layer has run forward; in the backward pass, before it runs."""
        if not self.sharded:
            return x
        unit = self.order[-1][1]
        if not self._keeps:
            del self.parameters[index]
        self.leaves[index] = leaves

        def begin_backward() -> None:
            if not self._keeps:
                self.parameters[index] = self._alloc(unit.gathered)
                self.prefetched.clear()
                if ahead := self.order[-2][1] if len(self.order) > 1 else self._in_vain:
                    self.prefetched.append(self._buffer(ahead))

        return self.tape.on_gradient(x, begin_backward)

    @property
    def _in_vain(self) -> Unit | None:
        """What is gathered before the first layer's backward pass ends, for nobody."""
        return (self.head or self.last) if self.before and not self.embedding else None

    def skip(self, x: Tensor, first: bool, last: bool, following: bool) -> Tensor:
        """Layers that are not replayed, and the kinds of the first and the last of them, and of the one after them:
        these leave behind what they have on its way, forward and in the backward pass."""
        if not self.sharded:
            return x
        unit = self.order[-1][1]
        self._resize(self.held, self.kinds[last].gathered)
        self._resize(self.ahead, self.kinds[following].gathered)
        if x.node is None or not self.tape.enabled:
            return x
        self.order.append((-2, self.kinds[last]))

        def end_backward() -> None:
            self.order.pop()
            self.layers.clear()
            self._resize(self.prefetched, unit.gathered)
            self._resize(self.scattering, self.kinds[first].reduced)

        return self.tape.on_gradient(x, end_backward)

    def _resize(self, buffer: list[Storage], size: int) -> None:
        if buffer and buffer[0].bytes != size:
            buffer.clear()
            buffer.append(self._alloc(size))

    @property
    def passing(self) -> int:
        """Bytes of the buffers that are there now, which come and go with layers."""
        return sum(each.bytes for each in (*self.held, *self.ahead)) if self.sharded else 0

    def enter_head(self, x: Tensor) -> Tensor:
        """x, of which the head makes the loss; in the backward pass, after it has run."""
        if not self.sharded or not self.head:
            return x
        if not self._stays and "head" not in self.parameters:
            self._gather("head", self.head)
        self.leaves["head"] = self.outside.pop("head")
        return self.tape.on_gradient(x, partial(self._reduce, "head", self.head))

    def finish(self, loss: Tensor) -> Tensor:
        """After the loss; in the backward pass, before it."""
        if not self.sharded:
            return loss
        self.held.clear()

        def prefetch() -> None:
            if not self._keeps:
                self.prefetched.append(self._buffer(self.order[-1][1]))

        return self.tape.on_gradient(loss, prefetch)

    def reduce_rest(self) -> None:
        """The last of the backward pass."""
        if not self.sharded:
            return
        embedding = self.outside.pop("embedding") if self.embedding else []
        self.leaves |= {"root": [leaf for leaves in self.outside.values() for leaf in leaves], "embedding": embedding}
        self._reduce("root", self.root)
        if self.embedding:
            self._reduce("embedding", self.embedding)
        for index, unit in self.order:
            self._reduce(index, unit)

    def _reduce(self, index: int | str, unit: Unit) -> None:
        if not self._stays:
            self.parameters.pop(index, None)
        self.scattering.clear()
        if not unit.reduced:
            return
        self.scattering.append(self._alloc(unit.reduced))
        for leaf in self.leaves.pop(index):
            leaf.gradient = None
        last = self._alloc(unit.last_gradient)  # kept by the name that the reduction goes through gradients with
        self._keep_shard(index, unit)
        del last

    def _keep_shard(self, index: int | str, unit: Unit) -> None:
        """What comes out of a reduction."""
        setup = self.b.setup
        shard = self._alloc(unit.reduced // setup.shards)
        if setup.replicas > 1:
            self.summed.append(shard)
        if self.b.w < 4:
            shard = self._alloc(unit.trained_shard)
        if not self._accumulated and setup.offload != "all":
            shard.retag("gradients")
            if self.b.stepping is None:
                self.shards.append(shard)
                return
            views = [(shard, size) for size in unit.trained_parts]
            del shard
            if not isinstance(index, str):
                self.b.stepping.complete(views)
            while views:  # what is in no layer is stepped by itself
                self.b.stepping.complete([views.pop(0)])
