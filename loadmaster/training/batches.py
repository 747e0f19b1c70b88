"""A step's packed rows, dealt out to ranks and micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from loadmaster.data import MicroBatch, PackedRow, PackedRows, collate


def trained_tokens(row: PackedRow) -> int:
    """Tokens of the row that get a loss: trained, and not the first of their document."""
    return int(((row.labels[1:] != -100) & (row.position_ids[1:] != 0)).sum())


def losses(row: PackedRow, objective: str) -> int:
    """How many losses of `objective` the row has, of which a step takes the mean: trained tokens, pairs or answers."""
    if objective == "sft":
        return trained_tokens(row)
    return len(row.document_ids) // 2 if row.desirable is None else len(row.document_ids)


def longest_stretch(rows: PackedRows, to_length: int | None) -> int:
    """Most tokens that one after another are a document, or what a row is padded with."""
    lengths = rows.lengths
    return max(rows.longest_document, (to_length or int(lengths.max())) - int(lengths.min()))


def untrained(row: PackedRow) -> PackedRow:
    """The row without any trained token: what a rank runs that has no row of its own."""
    return dataclasses.replace(row, labels=np.full_like(row.labels, -100))


def micro_batches(
    rows: Sequence[PackedRow], size: int, rank: int, world_size: int, pad_token_id: int, to_length: int | None
) -> list[MicroBatch]:
    """This rank's micro-batches of one optimizer step, `size` rows each, as many as every other rank has.

    The last step of an epoch can have fewer rows than ranks can share evenly; what is missing is filled
    with untrained copies, so that collectives match and no row counts twice.
    to_length: pad rows to so many tokens and fill the last micro-batch (fixed shapes), or pad to the longest row.
    """
    per_rank = -(-len(rows) // world_size)
    idle = untrained(rows[0])
    mine = list(rows[rank * per_rank : (rank + 1) * per_rank])
    count = per_rank if to_length is None else -(-per_rank // size) * size
    mine += [idle] * (count - len(mine))
    return [collate(mine[i : i + size], pad_token_id, to_length) for i in range(0, count, size)]


def worst_rows(rows: PackedRows, count: int) -> list[PackedRow]:
    """The longest rows, every token of them trained: no later micro-batch needs more memory.

    Of equally long ones those of most documents: attention's backward kernel has 128 positions more for each.
    """
    longest = np.lexsort((-rows.documents_in_rows, -rows.lengths))[:count].tolist()
    return [_all_trained(rows[i]) for i in longest]


def _all_trained(row: PackedRow) -> PackedRow:
    reference = None if row.reference is None else np.zeros_like(row.reference)  # not asked for yet
    return dataclasses.replace(row, labels=row.input_ids, reference=reference)
