"""Which rows each optimizer step trains on, with a position that is exact.

The order of an epoch is the permutation that (seed, epoch) gives, and the position is a count of rows,
so a resumed run continues with the very next row, also under another number of ranks, another
micro-batch or another global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from loadmaster.errors import DataError


class BatchSampler:
    """Iterates over global batches: lists of row indices, one for each optimizer step that is left.

    The last batch of an epoch may be smaller; no row is dropped and none is seen twice in an epoch.
    epochs may be fractional (the last epoch then ends early) or math.inf.
    fingerprint: of the rows, so that a position in other data is refused.
    """

    def __init__(self, number_of_rows: int, global_size: int, seed: int, epochs: float = 1.0, fingerprint: str = ""):
        if number_of_rows < 1 or global_size < 1 or epochs <= 0:
            raise ValueError(f"nothing to sample: {number_of_rows} rows, batches of {global_size}, {epochs} epochs")
        self.number_of_rows, self.global_size, self.seed = number_of_rows, global_size, seed
        self.epochs, self.fingerprint = epochs, fingerprint
        self.epoch = 0
        self.offset = 0  # rows of this epoch already handed out

    def _rows_in(self, epoch: int) -> int:
        """Rows that epoch `epoch` takes: all, none, or part of them in a last fractional epoch."""
        share = min(max(self.epochs - epoch, 0.0), 1.0)
        return min(self.number_of_rows, math.ceil(round(share * self.number_of_rows, 6)))

    def order(self, epoch: int) -> np.ndarray:
        """Row indices of an epoch in the order in which they are trained on, int64 [rows]."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.number_of_rows)[: self._rows_in(epoch)]

    def total_steps(self) -> int:
        """Optimizer steps from the very beginning to the end of the last epoch."""
        if math.isinf(self.epochs):
            raise ValueError("endless epochs have no number of steps")
        whole = int(self.epochs)
        per_epoch, last = (math.ceil(self._rows_in(epoch) / self.global_size) for epoch in (0, whole))
        return whole * per_epoch + last

    def __iter__(self) -> Iterator[list[int]]:
        while rows := self._rows_in(self.epoch):
            order = self.order(self.epoch)
            while self.offset < rows:
                batch = order[self.offset : self.offset + self.global_size].tolist()
                # The position moves first: a state taken while the step runs is the one after it.
                self.offset += len(batch)
                yield batch
            self.epoch, self.offset = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch handed out."""
        return {
            "epoch": self.epoch,
            "offset_in_epoch": self.offset,
            "seed": self.seed,
            "number_of_rows": self.number_of_rows,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position. Raises DataError when it is a position in other data or another order."""
        for name in ("number_of_rows", "seed", "fingerprint"):
            if state.get(name, getattr(self, name)) != getattr(self, name):
                raise DataError(
                    f"the checkpoint's position is in other data: {name} was {state[name]!r} and is "
                    f"{getattr(self, name)!r} now\n"
                    "    fix: resume with the same data, packing, sequence_length and seed, or start a new run_dir"
                )
        self.epoch, self.offset = int(state["epoch"]), int(state["offset_in_epoch"])
