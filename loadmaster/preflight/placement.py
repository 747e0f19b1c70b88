"""Where the layers of a model lie that is run and not trained: on the GPUs in order, then in host memory, then on disk.

The plan asks with bytes that it counts (verification.py), a verification with those of the model that it is about to
load (loadmaster.models.spread); both get their answer here.

    first GPU     embeddings, final norm and head, what a row takes while it is scored, and the first layers
    other GPUs    layers, and what a row takes inside a layer
    host, disk    the last layers; each is brought to the first GPU when it runs, which keeps room for one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loadmaster.words import counted


@dataclass(frozen=True)
class Room:
    """Bytes that a model may take."""

    gpus: tuple[float, ...]
    """On each GPU; where there is none, of host memory."""
    host: float | None = 0.0
    """In host memory, beside GPUs; None: as much as is needed, for nothing is known of it."""
    disk: bool = True
    """Layers may be left on disk."""
    working: float = 0.0
    """Needed on the first GPU, besides weights."""
    passing: float = 0.0
    """Needed on each other one."""


@dataclass(frozen=True)
class Placement:
    """Of a model's layers, in order."""

    gpus: tuple[int, ...]
    """Layers that stay on each GPU."""
    host: int = 0
    disk: int = 0

    @property
    def is_whole(self) -> bool:
        """Everything is on the first GPU and stays there."""
        return not (self.host or self.disk or any(self.gpus[1:]))

    def places(self) -> list[int | str]:
        """Of each layer: the GPU's number, "host" or "disk"."""
        on_gpus = [gpu for gpu, count in enumerate(self.gpus) for _ in range(count)]
        return [*on_gpus, *["host"] * self.host, *["disk"] * self.disk]

    def words(self, has_gpus: bool = True) -> str:
        """40 of 80 layers on 2 GPUs, 30 in host memory, 10 on disk."""
        layers, on_gpus = len(self.places()), sum(self.gpus)
        used = max(1, sum(1 for count in self.gpus if count))
        where = f"on {counted(used, 'GPU')}" if has_gpus else "in host memory"
        said = [f"{on_gpus} of {layers} layers {where}"]
        said += [f"{self.host} in host memory"] * bool(self.host) + [f"{self.disk} on disk"] * bool(self.disk)
        return ", ".join(said)


def place(layers: Sequence[float], rest: float, room: Room) -> Placement | None:
    """Where a model goes whose layers have these bytes, and embeddings, norm and head `rest`; None: nowhere.

    On as few GPUs as hold it. Only what no GPU holds goes to host memory, and only what that does not hold, to disk.
    """
    for moved in (0.0, max(layers, default=0.0)):
        rooms = [room.gpus[0] - rest - room.working - moved, *(free - room.passing for free in room.gpus[1:])]
        if rooms[0] < 0:
            return None
        left, counts = list(layers), []
        for free in rooms:
            counts.append(_that_fit(left, free))
            del left[: counts[-1]]
        if not left:
            return Placement(tuple(counts))
    host = len(left) if room.host is None else _that_fit(left, room.host)
    if host < len(left) and not room.disk:
        return None
    return Placement(tuple(counts), host, len(left) - host)


def _that_fit(sizes: Sequence[float], free: float) -> int:
    """How many of the first of these fit together."""
    count, taken = 0, 0.0
    for size in sizes:
        taken += size
        if taken > free:
            break
        count += 1
    return count
