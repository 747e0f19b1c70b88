"""The first rows of a file, and how many rows like them it holds: what a plan goes by.

In bounded time and memory, however large the file is: of JSON no more than its first megabyte is read, of Parquet the
footer and the first rows of the first group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from loadmaster.data.file_kinds import ROW_FIELDS
from loadmaster.data.readers import UNREADABLE
from loadmaster.data.sources import SOON_READ, FileSource

JSON = (".json", ".jsonl", ".ndjson")
LIST = re.compile(r'\s*(?:\{\s*"([^"\\]*)"\s*:\s*)?\[')
"""How a list of rows begins, which an object may hold under its only key."""
BETWEEN = re.compile(r"[\s,]*")


def first_rows(file: Path, most: int) -> tuple[list[dict[str, Any]], float]:
    """(rows, how many of their size the file has), of at most `most` rows; none and 0 where no row is soon read."""
    suffix = file.suffix.lower()
    rows, taken = [], 0
    for row, size in islice(_sized_json(file) if suffix in JSON else _sized(file), most):
        if isinstance(row, dict):
            rows.append(row)
            taken += size
        if taken > SOON_READ:
            break
    if not rows:
        return [], 0.0
    return rows, _rows_of_parquet(file, len(rows)) if suffix == ".parquet" else len(rows) * file.stat().st_size / taken


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _sized(file: Path) -> Iterator[tuple[Any, int]]:
    """Rows of CSV and Parquet, and about how many bytes a line of CSV with them has."""
    for raw in FileSource([file]).rows():
        cells = raw.value.values() if isinstance(raw.value, dict) else ()
        yield raw.value, sum(len(as_text(cell).encode(errors="replace")) + 1 for cell in cells)


def _sized_json(file: Path) -> Iterator[tuple[Any, int]]:
    """Rows of a list or of lines, as far as the beginning holds them whole, and their bytes with the space around."""
    with open(file, "rb") as opened:
        text = opened.read(SOON_READ).decode("utf-8-sig", errors="replace")
    found = LIST.match(text) if file.suffix.lower() == ".json" else None
    if found is None or found[1] in ROW_FIELDS or (found[1] is not None and _by_line(text)):
        for line in text.split("\n"):
            if line.strip():
                try:
                    yield json.loads(line), len(line.encode()) + 1
                except UNREADABLE:  # a broken line, or one that is cut
                    yield None, 0
        return
    decode, end = json.JSONDecoder().raw_decode, found.end()
    while True:
        start = end
        try:
            row, end = decode(text, BETWEEN.match(text, start).end())
        except UNREADABLE:  # the list's end, a broken row, or one that is cut
            return
        yield row, len(text[start:end].encode())


def _by_line(text: str) -> bool:
    """Whether its first line is a whole row, and more come: not one object that holds them."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except UNREADABLE:
        return False


def _rows_of_parquet(file: Path, read: int) -> float:
    """As many as its groups have bytes for, by the groups of the first rows, of which so many were read."""
    from pyarrow.parquet import read_metadata

    metadata, rows, size = read_metadata(file), 0, 0
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    for group in groups:
        rows, size = rows + group.num_rows, size + group.total_byte_size
        if rows >= read:
            break
    return rows * sum(group.total_byte_size for group in groups) / size if size > 0 else metadata.num_rows
