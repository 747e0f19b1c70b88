"""What sharded weights add to a replay: units gathered for use, and gradients on their way to their shards.

fully_shard gathers one unit (a decoder layer) for its use and prefetches the next, each into a buffer that is
then copied out into parameters; the root (embedding, head, last norm) stays gathered from the first use to the
end. In the backward pass a unit's gradients exist whole until they are reduced, in fp32, while the next unit
runs. Source: torch's fully_shard and traces of it (memory.md, section 2.5); modelled, not measured.
"""

from __future__ import annotations

from loadmaster.preflight.blocks import Blocks
from loadmaster.preflight.replay import Storage, Tensor
from loadmaster.preflight.weights import REDUCE_BYTES, base_bytes


class Units:
    """Does nothing where weights are not sharded."""

    def __init__(self, b: Blocks):
        self.tape, shape, setup = b.tape, b.shape, b.setup
        self.sharded = setup.shards > 1
        self.held: list[Storage] = []
        self.in_flight: list[Storage] = []
        if not self.sharded:
            return
        per_weight = base_bytes(shape, setup.method, setup.precision) / shape.parameters
        layer = shape.layer_parameters(experts=shape.expert_layers > 0)
        root = shape.embedding_parameters + shape.head_parameters + shape.hidden_size
        self.gathered = 2.5 * per_weight * layer  # this unit twice while it is copied out, half of the next on average
        self.unsharded = 0 if setup.adapters else b.w * layer
        self.reduced = 0 if setup.adapters else REDUCE_BYTES * layer
        self.root_reduced = 0 if setup.adapters else (b.w + REDUCE_BYTES) * root
        self.root = [self._alloc(b.w * root)]

    def _alloc(self, size: float) -> Storage:
        with self.tape.tagged("communication"):
            return self.tape.alloc(size)

    def begin(self, x: Tensor) -> Tensor:
        """Before a layer runs forward; in the backward pass, after it has run."""
        if not self.sharded:
            return x
        self.held.append(self._alloc(self.gathered))

        def backward(g: Storage, _: list) -> list:
            self.held.clear()
            self.in_flight[:] = [self._alloc(self.reduced)]
            return [g]

        return self.tape.link(Tensor(x.storage, x.node), [x], [], backward)

    def end(self, x: Tensor) -> Tensor:
        """After a layer has run forward; in the backward pass, before it runs."""
        if not self.sharded:
            return x
        self.held.clear()

        def backward(g: Storage, _: list) -> list:
            self.held[:] = [self._alloc(self.gathered), self._alloc(self.unsharded)]
            return [g]

        return self.tape.link(Tensor(x.storage, x.node), [x], [], backward)

    def reduce_root(self) -> None:
        """The last of the backward pass: gradients of embedding and head."""
        if self.sharded:
            self._alloc(self.root_reduced)
