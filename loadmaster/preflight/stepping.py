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


def adafactor_bytes(elements: Iterable[float], width: int) -> float:
    """What Adafactor takes in fp32 to step parameters of so many elements, one after another.

    A gradient's square, and that with epsilon added, beside the update before; gradient and weight too, where they are
    in bf16 (width 2). Source: transformers.optimization.Adafactor, traced.
    """
    return max(((16 if width == 2 else 8) * now + 4 * before for before, now in pairwise((0, *elements))), default=0)


class Stepping:
    def __init__(self, tape: Tape, setup: Setup):
        self.tape, self.width = tape, setup.width
        self.widens = setup.master_weights and setup.width == 2
        self.adafactor = setup.optimizer == "adafactor"
        self.waiting: list[Storage] = []

    def group(self, leaves: list[Leaf]) -> None:
        """Parameters whose gradients are stepped when the last of them is there, or rather one group later."""
        if leaves:
            missing = [len(leaves)]

            def arrived() -> None:
                missing[0] -= 1
                if not missing[0]:
                    gradients = [leaf.gradient for leaf in leaves]
                    for leaf in leaves:
                        leaf.gradient = None
                    self.complete(gradients)

            for leaf in leaves:
                leaf.arrived = arrived

    def complete(self, gradients: list[Storage]) -> None:
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

    def _step(self, gradients: list[Storage]) -> None:
        if self.adafactor and gradients:
            self.tape.alloc(adafactor_bytes([g.bytes // self.width for g in gradients], self.width))
        wide = []
        while self.widens and gradients:  # a master copy's gradient is in fp32, too
            wide.append(self.tape.alloc(2 * gradients[0].bytes))
            del gradients[0]
