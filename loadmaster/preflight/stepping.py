"""What the optimizer takes and gives back inside a backward pass (loadmaster.training.in_backward), on a replay tape.

A group is what is stepped together: a decoder layer, or a parameter outside of them. It waits until the next group's
gradients are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from loadmaster.preflight.graph import Leaf, Storage
from loadmaster.preflight.replay import Tape
from loadmaster.preflight.setup import Setup

PIECE = 2**24
"""Elements that the engine rounds at once, and has in fp32 at once where there are no masters."""


def adafactor_bytes(elements: Iterable[float], rounds: bool) -> float:
    """What Adafactor takes in fp32 to step parameters of so many elements, one after another.

    A gradient's square, and that with epsilon added, beside the update before; or gradient and weight in fp32, where
    each is stepped by itself and rounded. Source: transformers.optimization.Adafactor, traced.
    """
    if rounds:
        return 16 * max(elements, default=0)
    return max((8 * now + 4 * before for before, now in pairwise((0, *elements))), default=0)


def rounding_bytes(elements: Iterable[float], piece: int) -> float:
    """The same of optimizers that step `piece` elements of a parameter at a time in fp32: weight and gradient, or the
    weight and what is drawn to round it."""
    return 8 * min(piece, max(elements, default=0))


Gradient = tuple[Storage, int]
"""The memory in which it lies, under fully_shard that of its whole unit, and its own bytes."""


class Stepping:
    def __init__(self, tape: Tape, setup: Setup):
        self.tape, self.width = tape, setup.width
        self.made, self.states = 0.0, list[Storage]()
        """Bytes of states that an element gets when it is stepped, in the first step alone; and those."""
        self.widens = setup.master_weights and setup.width == 2
        self.adafactor, self.rounds = setup.optimizer == "adafactor", setup.rounds
        self.waiting: list[Gradient] = []

    def group(self, leaves: list[Leaf]) -> None:
        """Parameters whose gradients are stepped when the last of them is there, or rather one group later."""
        if leaves:
            missing = [len(leaves)]

            def arrived() -> None:
                missing[0] -= 1
                if not missing[0]:
                    gradients = [(leaf.gradient, leaf.gradient.bytes) for leaf in leaves]
                    for leaf in leaves:
                        leaf.gradient = None
                    self.complete(gradients)

            for leaf in leaves:
                leaf.arrived = arrived

    def complete(self, gradients: list[Gradient]) -> None:
        """`gradients`, which nobody else holds, wait; those that waited are stepped and go."""
        before, self.waiting = self.waiting, list(gradients)
        gradients.clear()
        hidden = self.tape.show()
        with self.tape.tagged("gradients"):
            self._step(before)
        if hidden:
            self.tape.hide()

    def finish(self) -> None:
        """After the backward pass."""
        self.complete([])

    def _step(self, gradients: list[Gradient]) -> None:
        elements = [size // self.width for _, size in gradients]
        wide = []
        while self.widens and gradients:  # a master copy's gradient is in fp32, too
            wide.append(self.tape.alloc(2 * gradients[0][1]))
            del gradients[0]
        if self.rounds and not self.adafactor:
            for each in elements:
                self.make_states(each)
                self.tape.alloc(rounding_bytes([each], PIECE))
            return
        self.make_states(sum(elements))
        if self.adafactor:
            self.tape.alloc(adafactor_bytes(elements, self.rounds))

    def make_states(self, elements: float) -> None:
        if self.made:
            with self.tape.tagged("optimizer"):
                self.states.append(self.tape.alloc(self.made * elements))
