"""Documents into rows of `sequence_length` tokens: best-fit decreasing.

The longest document goes first, into the fullest row that still holds it, or a new one. With the
lengths that instruction data has, rows come out 97 to 99.9 per cent full. The free space of rows is a
whole number up to sequence_length, so one integer with a bit for each free space that some row has
finds the best fit in one shift, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int, seed: int = 0) -> list[list[int]]:
    """Rows of document indices, each row's lengths summing to at most `capacity`.

    lengths [documents], each from 1 to capacity. Deterministic; documents of equal length are dealt in
    a seeded order, so that rows do not mirror the order of the file.
    """
    if len(lengths) and (lengths.max() > capacity or lengths.min() < 1):
        raise ValueError(f"document lengths {lengths.min()}..{lengths.max()} do not fit rows of {capacity} tokens")
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set when some row has s tokens free
    for document in order.tolist():
        length = int(lengths[document])
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            holders = rows_by_space[space]
            row = holders.pop()
            if not holders:
                spaces &= ~(1 << space)
            rows[row].append(document)
        else:
            space, row = capacity, len(rows)
            rows.append([document])
        left = space - length
        if left:
            rows_by_space.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows


@dataclass(frozen=True)
class LongRows:
    """What became of conversations longer than sequence_length."""

    long: int = 0
    pieces: int = 0
    cut_tokens: int = 0
    dropped: int = 0


def fit_documents(
    lengths: np.ndarray, trained: np.ndarray, sequence_length: int, on_long_row: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, LongRows]:
    """Documents of at most `sequence_length` tokens, as (source index, start, length) arrays, and counts.

    lengths [conversations] of the conversations that lie end to end in `trained` [tokens]. `cut` keeps the
    beginning, `split` all pieces; a piece in which nothing is trained is dropped and counted.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sources, begins, sizes = [], [], []
    pieces = cut_tokens = dropped = 0
    long = np.flatnonzero(lengths > sequence_length)
    for source in long.tolist():
        first, end = int(starts[source]), int(starts[source + 1])
        last = end if on_long_row == "split" else first + sequence_length
        cut_tokens += end - last
        for begin in range(first, last, sequence_length):
            size = min(sequence_length, last - begin)
            # The first token of a piece has no token before it that could predict it.
            if trained[begin + 1 : begin + size].any():
                pieces += 1
                sources.append(source)
                begins.append(begin)
                sizes.append(size)
            else:
                dropped += 1
    short = np.flatnonzero(lengths <= sequence_length)
    source = np.concatenate([short, np.array(sources, dtype=np.int64)])
    begin = np.concatenate([starts[short], np.array(begins, dtype=np.int64)])
    size = np.concatenate([lengths[short], np.array(sizes, dtype=np.int64)])
    order = np.argsort(begin, kind="stable")
    counts = LongRows(len(long), pieces, cut_tokens, dropped)
    return source[order], begin[order], size[order], counts


def fit_whole(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, LongRows]:
    """`fit_documents` for `drop` and for preference rows: what does not fit is left out whole, of a pair both answers.

    An answer that was cut would be judged by what is left of it.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kept = np.flatnonzero(lengths <= sequence_length)
    long = len(lengths) - len(kept)
    return kept, starts[kept], lengths[kept], LongRows(long=long, dropped=long)


def both_answers(
    source: np.ndarray, begins: np.ndarray, sizes: np.ndarray, splits: np.ndarray, rows: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[int]]]:
    """Pairs as two documents each, the chosen one first: (source, begins, sizes) of documents, and rows of them.

    splits [conversations]: tokens of the chosen document, where the rejected one begins.
    """
    first = splits[source]
    document_begins = np.stack([begins, begins + first], axis=1).reshape(-1)
    document_sizes = np.stack([first, sizes - first], axis=1).reshape(-1)
    in_rows = [[document for pair in row for document in (2 * pair, 2 * pair + 1)] for row in rows]
    return np.repeat(source, 2), document_begins, document_sizes, in_rows


def rows_of(sizes: np.ndarray, sequence_length: int, packing: bool, seed: int) -> list[Sequence[int]]:
    """Document indices of each row: packed, or one document a row."""
    return best_fit_decreasing(sizes, sequence_length, seed) if packing else [[index] for index in range(len(sizes))]
