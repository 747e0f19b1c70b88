"""Which decoder layers a replay runs one by one, and what stands for those that are like them.

Layers of a kind are equal, so between two of them the live bytes change by the same amount each time, and the most
that is in use while one of them runs is in the first or the last ones. In a run of alike layers the first two and the
last one are replayed; of layers that take turns (Gemma 4's) the first two, the first of the other kind and the last of
each. What lies between is held as one block. Sharded, or stepped in the backward pass, the last but one of a run, or
of layers that take turns of its kind, is replayed as well: in its backward pass, and not in that of the last one, the
gradients of another layer are on their way, or wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple

from loadmaster.preflight.blocks import Blocks
from loadmaster.preflight.graph import Storage, Tensor
from loadmaster.preflight.replay import Work

HEAD_LAYERS = 2
"""Of a run, replayed before the block."""


class Alike(NamedTuple):
    """What layers have in common that are alike."""

    second: bool
    """Of the second kind (ModelShape.is_second)."""
    checkpointing: str


class Place(NamedTuple):
    """A layer that is replayed."""

    alike: Alike
    skipped: tuple[Alike, ...]
    """Layers between the one replayed before and this one."""
    following: bool | None
    """Whether the layer after it, replayed or not, is of the second kind; None for the last one."""
    measures: bool
    """Whether it says what the skipped ones of its kind keep and do."""


@cache
def places(layers: tuple[Alike, ...], neighbours: bool) -> tuple[Place, ...]:
    """neighbours: whether what a layer takes depends on those beside it."""
    chosen = sorted(_chosen(layers, neighbours))
    found, before = [], -1
    measuring = _measuring(layers, chosen)
    for at in chosen:
        following = layers[at + 1].second if at + 1 < len(layers) else None
        found.append(Place(layers[at], layers[before + 1 : at], following, at in measuring))
        before = at
    return tuple(found)


def _chosen(layers: Sequence[Alike], neighbours: bool) -> set[int]:
    chosen: set[int] = set()
    begin = 0
    for _, alike in groupby(layers, key=lambda layer: layer.checkpointing):
        runs = []
        for _, run in groupby(alike):
            runs.append(range(begin, begin := begin + len(list(run))))
        if len(runs) <= HEAD_LAYERS:  # each has its own first and last layers
            for run in runs:
                chosen.update((*run[:HEAD_LAYERS], *run[-1 - neighbours :]))
            continue
        first, second, *_ = runs
        chosen.update((first[0], second[0], runs[-2][-1], runs[-1][-1]))
        if first[0] == 0:  # that layer keeps less than others of its kind
            chosen.update((1, [*first, *runs[2]][1]))
        if neighbours:
            chosen.update((runs[-3][-1], *runs[-1][-2:]))
    return chosen


def _measuring(layers: Sequence[Alike], chosen: Sequence[int]) -> set[int]:
    """Of each kind the last of the chosen ones before any is skipped."""
    latest: dict[Alike, int] = {}
    skipped: set[Alike] = set()
    before = -1
    for at in chosen:
        skipped.update(layers[before + 1 : at])
        if layers[at] not in skipped:
            latest[layers[at]] = at
        before = at
    return {at for alike, at in latest.items() if alike in skipped}


@dataclass
class Kind:
    """Decoder layers that are alike, in one replay."""

    b: Blocks
    """Of their sizes."""
    alike: Alike
    skipped: int
    kept: int
    """Of a compiled layer, in all; 0 where it is not known, or not compiled."""
    inside: int
    """All that counts in its backward pass; 0 where it is not known, and what is replayed counts."""

    def __post_init__(self) -> None:
        self.second = self.alike.second
        self.forward, self.started, self.finished = Work(), Work(), Work()
        self.less = 0
        """Bytes that the one that has just run keeps less than was replayed."""
        self.stays = self.gradients = self.stepped = 0
        """Of one layer: bytes that stay after it has run forward, those of its gradients, elements that are stepped."""
        self.held: list[Storage] = []

    def total(self, work: Work) -> Work:
        one = self.forward.plus(self.finished).plus(self.started, -1.0)
        return work.plus(one, self.skipped)

    def enter(self, x: Tensor, entered: list[Storage]) -> Tensor:
        """After a layer. A compiled one keeps its input, and `less` than was replayed. In its backward pass it has just
        what the compiler was seen to have at once, where that is known."""
        tape, less = self.b.tape, self.less
        if not (less or self.inside):
            return x

        def begin_backward() -> None:
            if self.inside:
                tape.alloc(self.inside)
                tape.hide()
            tape.correct(less)

        return tape.on_gradient(x, begin_backward, entered)

    def leave(self, x: Tensor) -> Tensor:
        """Before a layer; in the backward pass, after it."""
        tape = self.b.tape
        return tape.on_gradient(x, tape.show) if self.inside else x

    def mark(self, x: Tensor, name: str) -> Tensor:
        """In the backward pass, what was done by then is noted."""
        return self.b.tape.on_gradient(x, lambda: setattr(self, name, copy(self.b.tape.work)))


def stand_in(b: Blocks, x: Tensor, skipped: Sequence[Kind]) -> Tensor:
    """The skipped layers before x: their kept bytes now, their gradients in the backward pass, or the states that they
    get there. Without gradients what they keep is weights that stay gathered."""
    tape = b.tape
    held = [tape.alloc(sum(kind.stays for kind in skipped))]
    if not tape.enabled:
        skipped[0].held += held
        return Tensor(x.storage, x.node)

    def run_backward() -> None:
        held.clear()
        with tape.tagged("gradients"):
            skipped[0].held.append(tape.alloc(sum(kind.gradients for kind in skipped)))
        if b.stepping is not None:
            b.stepping.make_states(sum(kind.stepped for kind in skipped))

    return tape.on_gradient(x, run_backward)
