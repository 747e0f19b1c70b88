"""Packed rows on disk and as the training loop reads them.

Tokens of all rows lie end to end in the order of the rows, in one safetensors file that is read a
slice at a time, so a corpus of any size costs no more memory than the rows in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NO_LOSS = -100


@dataclass(frozen=True)
class PackedRow:
    """One row of at most sequence_length tokens.

    input_ids, labels, position_ids: int64 [length]. labels stand at their own token (not shifted), -100
    where there is no loss. position_ids restart at 0 with each document.
    document_ids: "file:line" of each document, in order.
    desirable: bool [documents], the label of each, where the data is unpaired preference.
    reference: float32 [documents], the log-probability of each under the model before training, where a full fine-tune
    compares with it; under kto [documents, 2], the second that of its prompt with another's answer of the row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    document_ids: list[str]
    desirable: np.ndarray | None = None
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class PackedRows(Sequence[PackedRow]):
    """All rows of a split, read lazily.

    fingerprint: hash of everything that shaped them. tokens: in all rows. trained_tokens: those with
    loss, which the first token of a document never has (nothing before it predicts it). reference: as of
    PackedRow, once the model before training was asked (training/reference.py).
    """

    def __init__(self, arrays: Mapping[str, Any], fingerprint: str):
        self._ids, self._trained = arrays["input_ids"], arrays["trained"]
        self._row_starts = np.asarray(arrays["row_starts"][:])
        self._row_documents = np.asarray(arrays["row_documents"][:])
        self._document_starts = np.asarray(arrays["document_starts"][:])
        self._origin_starts = np.asarray(arrays["origin_starts"][:])
        self._origins = np.asarray(arrays["origins"][:])
        self._desirable = np.asarray(arrays["desirable"][:]) if "desirable" in arrays else None
        self.tokens = int(self._row_starts[-1])
        self.trained_tokens = int(arrays["trained_tokens"][:][0])
        self.documents = len(self._document_starts) - 1
        self.fingerprint = fingerprint
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self._row_starts)

    @property
    def documents_in_rows(self) -> np.ndarray:
        """Documents of each row, int64 [rows]."""
        return np.diff(self._row_documents)

    @property
    def longest_document(self) -> int:
        """Its tokens."""
        return int(np.diff(self._document_starts).max())

    def __getitem__(self, index: int) -> PackedRow:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start, end = (int(n) for n in self._row_starts[index : index + 2])
        first, last = (int(n) for n in self._row_documents[index : index + 2])
        lengths = np.diff(self._document_starts[first : last + 1])
        ids = self._ids[start:end].astype(np.int64)
        labels = np.where(self._trained[start:end], ids, NO_LOSS)
        positions = np.concatenate([np.arange(length) for length in lengths.tolist()])
        origins = [self._origin(document) for document in range(first, last)]
        desirable = None if self._desirable is None else self._desirable[first:last]
        reference = None if self.reference is None else self.reference[first:last]
        return PackedRow(ids, labels, positions, origins, desirable, reference)

    def __iter__(self) -> Iterator[PackedRow]:
        return (self[index] for index in range(len(self)))

    def _origin(self, document: int) -> str:
        start, end = self._origin_starts[document : document + 2]
        return self._origins[start:end].tobytes().decode()

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> PackedRows:
        from safetensors import safe_open

        # The handle maps the file; the two long arrays stay on disk and are read in slices.
        handle = safe_open(path, framework="numpy")
        return cls({name: handle.get_slice(name) for name in handle.keys()}, fingerprint)  # noqa: SIM118


def lay_out(
    ids: np.ndarray,
    trained: np.ndarray,
    begins: np.ndarray,
    sizes: np.ndarray,
    origins: Sequence[str],
    rows: Sequence[Sequence[int]],
    desirable: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of a PackedRows: document d is [begins[d], begins[d] + sizes[d]) of ids and trained.

    rows: document indices of each row. origins: "file:line" of each document. desirable: its label, where it has one.
    """
    order = np.fromiter((document for row in rows for document in row), dtype=np.int64)
    row_documents = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    document_starts = np.concatenate([[0], np.cumsum(sizes[order])]).astype(np.int64)
    out_ids = np.empty(int(document_starts[-1]), dtype=np.int32)
    out_trained = np.empty(len(out_ids), dtype=np.bool_)
    for place, document in enumerate(order.tolist()):
        begin, size, to = int(begins[document]), int(sizes[document]), int(document_starts[place])
        out_ids[to : to + size] = ids[begin : begin + size]
        out_trained[to : to + size] = trained[begin : begin + size]
    names = [origins[document].encode() for document in order.tolist()]
    firsts_trained = int(out_trained[document_starts[:-1]].sum())
    return {
        "input_ids": out_ids,
        "trained": out_trained,
        "row_starts": document_starts[row_documents],
        "row_documents": row_documents,
        "document_starts": document_starts,
        "origins": np.frombuffer(b"".join(names), dtype=np.uint8),
        "origin_starts": np.concatenate([[0], np.cumsum([len(name) for name in names], dtype=np.int64)]),
        "trained_tokens": np.array([int(out_trained.sum()) - firsts_trained], dtype=np.int64),
        **({} if desirable is None else {"desirable": desirable[order]}),
    }


def packed_rows(
    documents: Sequence[tuple[Sequence[int], Sequence[bool]]], sequence_length: int, packing: bool = True
) -> PackedRows:
    """PackedRows in memory from (ids, trained) documents that fit; for tests and small probes."""
    from loadmaster.data.packing import rows_of

    sizes = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in documents])
    trained = np.concatenate([np.asarray(mask, dtype=np.bool_) for _, mask in documents])
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rows = rows_of(sizes, sequence_length, packing, seed=0)
    origins = [f"document:{number}" for number in range(1, len(documents) + 1)]
    return PackedRows(lay_out(ids, trained, begins, sizes, origins, rows), "in memory")
