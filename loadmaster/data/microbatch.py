"""Rows -> the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loadmaster.data.rows import NO_LOSS, PackedRow


@dataclass(frozen=True)
class MicroBatch:
    """input_ids, labels, position_ids: LongTensor [batch, length].

    Labels are not shifted, -100 where there is no loss. A position of 0 begins a document; padding is a
    document of its own at the end of the row, so no token attends to it. desirable: bool [documents], the label of each
    document in the flattened batch, padding (false) among them; on the host. None where documents have no labels.
    reference: the same of PackedRow.reference, float32, 0 for padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    desirable: Tensor | None = None
    reference: Tensor | None = None


def collate(rows: Sequence[PackedRow], pad_token_id: int, to_length: int | None = None) -> MicroBatch:
    """Rows padded to `to_length`, or to the longest of them."""
    longest = max(len(row) for row in rows)
    length = longest if to_length is None else to_length
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit a batch of length {length}")
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    labels = torch.full((len(rows), length), NO_LOSS, dtype=torch.long)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    for place, row in enumerate(rows):
        size = len(row)
        input_ids[place, :size] = torch.from_numpy(row.input_ids)
        labels[place, :size] = torch.from_numpy(row.labels)
        position_ids[place, :size] = torch.from_numpy(row.position_ids)
        position_ids[place, size:] = torch.arange(length - size)
    padded = [len(row) < length for row in rows]
    desirable = _of_documents([row.desirable for row in rows], padded)
    reference = _of_documents([row.reference for row in rows], padded)
    return MicroBatch(input_ids, labels, position_ids, desirable, reference)


def _of_documents(values: Sequence[np.ndarray | None], padded: Sequence[bool]) -> Tensor | None:
    """One value for each document of the batch, 0 for padding; None where rows have none."""
    if values[0] is None:
        return None
    ends = ([(0, pad), (0, 0)][: each.ndim] for each, pad in zip(values, padded, strict=True))
    return torch.from_numpy(np.concatenate([np.pad(each, end) for each, end in zip(values, ends, strict=True)]))
