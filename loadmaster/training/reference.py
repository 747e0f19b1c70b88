"""DPO's and KTO's reference where every weight is trained: what the model said of the answers before the first step.

Under an adapter the base is still there, and each step asks it anew (models/preference.py). A full fine-tune overwrites
its base. So the answers that a run trains on and is evaluated on are asked for once, before the first step: a forward
pass over the data, no memory, and 4 bytes an answer in the run directory's reference.safetensors. KTO asks of each
packed row a second time, with prompts under each other's answers, and keeps twice as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from loadmaster.config.schema import Job
from loadmaster.data import MicroBatch, PackedRow, PackedRows, PreparedData
from loadmaster.files import write_bytes
from loadmaster.models.preference import NEED_REFERENCE
from loadmaster.training.world import World

FILE = "reference.safetensors"
SAVE_EVERY_S = 60.0
MICRO_BATCHES = 8
"""Of each rank, between two looks at whether to stop."""


def asked_once(job: Job, method: str) -> bool:
    return method == "full" and job.objective in NEED_REFERENCE


class Reference:
    """Summed log-probabilities of answers, float32 [documents] of each split, of kto [documents, 2] (each prompt with
    its own and with another's answer); NaN where they are not known yet.

    They lie in the rows, too, as PackedRows.reference. All ranks make one and call it together.
    """

    def __init__(self, run_dir: Path, identity: str, prepared: PreparedData, world: World, objective: str):
        """identity: hash of base, data and precision; what the file holds of another is not taken."""
        self.path, self.identity, self.world = run_dir / FILE, identity, world
        splits = {"train": prepared.train, "validation": prepared.validation}
        self.splits: dict[str, PackedRows] = {name: rows for name, rows in splits.items() if rows is not None}
        known = world.broadcast(_read(self.path, identity) if world.lead else None)
        for name, rows in self.splits.items():
            shape = (rows.documents, 2) if objective == "kto" else (rows.documents,)
            found = known.get(name)
            unknown = np.full(shape, np.nan, dtype=np.float32)
            rows.reference = found if found is not None and found.shape == shape else unknown

    def ask(
        self,
        loss: nn.Module,
        micro_batches: Callable[[list[PackedRow]], list[MicroBatch]],
        micro_batch_size: int,
        told: Callable[[str, int, int], None],
        stopping: Callable[[], bool],
        trained_on: Sequence[int] = (),
    ) -> bool:
        """Ask for what is not known yet of the training rows `trained_on`, and of all that are held out.

        loss: the PreferenceLoss over the model before training, or what wraps it. micro_batches: rows to those of this
        rank. told: of a split, how many rows are done, and of how many. False once it was asked to stop; what is done
        by then is on disk.
        """
        loss.eval()
        for split, rows in self.splits.items():
            picked = sorted(trained_on) if split == "train" else range(len(rows))
            ends = np.cumsum(rows.documents_in_rows)
            lacking = np.isnan(rows.reference.reshape(rows.documents, -1)).any(axis=1)
            unknown = np.logical_or.reduceat(lacking, ends - rows.documents_in_rows)
            left = [row for row in picked if unknown[row]]
            at_a_time = micro_batch_size * self.world.size * MICRO_BATCHES
            if not self._ask(loss, rows, left, micro_batches, at_a_time, partial(told, split), stopping):
                return False
        return True

    def _ask(
        self, loss: nn.Module, rows: PackedRows, left: list[int],
        micro_batches: Callable[[list[PackedRow]], list[MicroBatch]], rows_at_a_time: int,
        told: Callable[[int, int], None], stopping: Callable[[], bool],
    ) -> bool:
        saved = time.monotonic()
        for start in range(0, len(left), rows_at_a_time):
            if stopping():
                self._save()
                return False
            some = [rows[row] for row in left[start : start + rows_at_a_time]]
            with torch.no_grad():
                mine = torch.cat([loss(batch, answers_only=True) for batch in micro_batches(some)])
            found = np.concatenate(self.world.gather(mine.float().cpu().numpy()))
            ends = np.cumsum([len(row.document_ids) for row in some])
            for row, answers in zip(some, np.split(found, ends[:-1]), strict=True):
                row.reference[:] = answers  # a view of the split's
            told(min(start + rows_at_a_time, len(left)), len(left))
            if time.monotonic() - saved > SAVE_EVERY_S:
                self._save()
                saved = time.monotonic()
        if left:
            self._save()
        return True

    def _save(self) -> None:
        if self.world.lead:
            arrays = {name: rows.reference for name, rows in self.splits.items()}
            write_bytes(self.path, save(arrays, {"identity": self.identity}))


def _read(path: Path, identity: str) -> dict[str, np.ndarray]:
    """What a file of that identity holds; a damaged one holds nothing."""
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return {}
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}
