"""Files of rows: JSON, JSONL, CSV and Parquet, a row at a time, each with where it stands or why it cannot be read."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr

from loadmaster.data.file_kinds import AGAIN, ROW_FIELDS, misnamed
from loadmaster.errors import DataError
from loadmaster.preflight.hardware import host_memory_gib
from loadmaster.words import counted

NO_UTF8 = "is not UTF-8 text"
AS_UTF8 = "save the file as UTF-8 (of files from Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
UNREADABLE = (ValueError, RecursionError)
"""What json raises for broken text, and for brackets by the thousand in one another."""
LONGEST_ROW = 2**28
"""Bytes of a line or a row, and characters of a cell: what is longer (a quote or a list that nobody closes, a file with
a hole in it) is said before it fills the memory."""
TOO_LONG, SPLIT = f"has more than {LONGEST_ROW >> 20} MiB", "end each row with a line break, and split the longest"
PARQUET_ROWS = 16
"""That are made at a time: what all rows repeat takes no room in the file, and here as often as there are rows."""
PARQUET_BYTES = 2**20
"""That are read at a time of a column, of which else all of a group of rows is held, as long as the file may be."""
MORE_ROWS = 64
"""That are made at a time, which takes half the time, where so many of whatever a group of rows can repeat are no more
bytes than PARQUET_ROWS of the longest row."""
CATEGORY_ROWS = 1024
"""That are read at a time where a column is of categories, which are all made again for each time."""
ESCAPED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as surrogateescape decodes them."""
MARK_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""What Excel writes before the header, and reads: by which mark columns are apart."""
TURN_FIELDS = {"role", "from", "function"}
"""Fields of a row, and of a turn of a chat or a tool: what has them is no object that only holds rows."""


@dataclass(frozen=True)
class RawRow:
    """A row as read: its value, or the reason why it could not be read and what would help."""

    origin: str
    value: Any = None
    error: str | None = None
    remedy: str | None = None


def read_file(path: Path, name: str) -> Iterator[RawRow]:
    """The rows of a file, by its suffix; `name` is what their origins begin with."""
    suffix = path.suffix.lower()
    if found := misnamed(path, suffix):
        reason, remedy = found
        yield RawRow(f"{name}:1", error=reason, remedy=remedy)
    elif suffix == ".parquet":
        yield from _read_parquet(path, name)
    elif suffix == ".csv":
        yield from _read_csv(path, name)
    elif suffix == ".json" and _starts_with_bracket(path):
        yield from _read_array(path, name)
    elif suffix == ".json" and (whole := _one_object(path)) is not None:
        yield from _read_object(path, name, *whole)
    else:  # many files named .json hold one object a line
        yield from _read_lines(path, name)


def _starts_with_bracket(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        while block := file.read(4096):
            if block.strip():
                return block.lstrip().startswith("[")
    return False


def _one_object(path: Path) -> tuple[dict[str, Any], bool] | None:
    """The JSON object that is the whole file, and whether it stands on one line; None for anything else."""
    with open(path, "rb") as file:
        lines = ((line or b"{").strip().removeprefix(codecs.BOM_UTF8) for line in _lines(file))  # a long one may be all
        first = next((line for line in lines if line), b"")
        if not first.startswith(b"{"):
            return None
        try:
            value = _decoded(first)
            return (value, True) if isinstance(value, dict) and not any(lines) else None
        except UNREADABLE:
            _refuse_unheld(path)
            file.seek(0)
            try:
                value = _decoded(file.read().removeprefix(codecs.BOM_UTF8))
                return (value, False) if isinstance(value, dict) else None
            except UNREADABLE:
                return None


def _decoded(text: bytes) -> Any:
    """The JSON value; as UTF-8, for json would take bytes for UTF-16 too."""
    return json.loads(text.decode(), object_pairs_hook=_named_once)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its fields, of which json would drop all but the last of one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return fields


def _read_object(path: Path, name: str, value: dict[str, Any], is_one_line: bool) -> Iterator[RawRow]:
    """The rows under an object's only key, or what to do about an object that is more than that, and no row."""
    holders = [key for key, rows in value.items() if _holds_rows(rows)] if not set(value) & ROW_FIELDS else []
    if len(holders) == 1 == len(value):
        text = path.read_text(encoding="utf-8-sig")
        _, end_of_key = json.JSONDecoder().raw_decode(text, _skip_space(text, text.index("{") + 1))
        yield from _elements(text, text.index("[", end_of_key) + 1, name)
    elif holders:
        key = holders[0]
        reason = f"the file is one JSON object, with rows under {', '.join(holders)}"
        taken = f"json.dump(json.load(open({name!r}, encoding='utf-8'))[{key!r}], open('rows.json', 'w'))"
        yield RawRow(f"{name}:1", error=reason, remedy=f'take them out: python -c "import json; {taken}"')
    elif is_one_line:
        yield from _read_lines(path, name)
    else:
        reason = "the file is one JSON object over several lines, not a list of rows"
        remedy = "put rows into a list, [{...}, {...}], or write one a line, as .jsonl"
        yield RawRow(f"{name}:1", error=reason, remedy=remedy)


def _holds_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are rows, and not the turns of one chat or its tools."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    return is_list and not any(set(item) & TURN_FIELDS for item in value)


def _read_lines(path: Path, name: str) -> Iterator[RawRow]:
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), 1):
            origin = f"{name}:{number}"
            if line is None:
                yield RawRow(origin, error=TOO_LONG, remedy=SPLIT)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield RawRow(origin, _decoded(line.strip()))
            except UnicodeDecodeError:
                yield RawRow(origin, error=NO_UTF8, remedy=AS_UTF8)
            except UNREADABLE as error:
                yield RawRow(origin, error=_broken(error))


def _lines(file: IO[AnyStr]) -> Iterator[AnyStr | None]:
    """The lines of a file; None for one that is longer than LONGEST_ROW, of which no more than that is held."""
    while line := file.readline(LONGEST_ROW + 1):
        if len(line) <= LONGEST_ROW:
            yield line
            continue
        yield None
        while line and line[-1:] not in ("\n", b"\n"):
            line = file.readline(2**20)


def _refuse_unheld(path: Path) -> None:
    """Raise DataError for one JSON value, read whole and as text beside its bytes, that this machine cannot hold."""
    gib, room = path.stat().st_size / 2**30, host_memory_gib()
    if 2 * gib > room:
        raise DataError(
            f"{path} is one JSON value of {gib:.1f} GiB, which is read whole, and this machine has {room:.1f} GiB of "
            "memory\n    fix: write one object a line, as .jsonl, which is read line by line"
        )


def _read_array(path: Path, name: str) -> Iterator[RawRow]:
    _refuse_unheld(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield RawRow(f"{name}:1", error=f"{NO_UTF8}: {error.reason} at byte {error.start}", remedy=AS_UTF8)
        return
    end = yield from _elements(text, _skip_space(text, 0) + 1, name)
    if end is not None and (rest := text[end:].strip()):
        line = 1 + text.count("\n", 0, text.index(rest, end))
        reason = f"broken JSON: {rest[:20]!r} stands behind the list's end; the rest of the file cannot be read"
        yield RawRow(f"{name}:{line}", error=reason, remedy="put all rows into one list, [{...}, {...}]")


def _elements(text: str, position: int, name: str) -> Generator[RawRow, None, int | None]:
    """Elements of the JSON array whose bracket ends at `position`, each with the line that it starts on, or in a text
    of one line with its number; returns where the array ends, None where it is broken.
    """
    decode = json.JSONDecoder(object_pairs_hook=_named_once).raw_decode
    is_one_line = "\n" not in text.strip()
    line, searched, number = 1, 0, 0
    while True:
        position = _skip_space(text, position)
        line, searched, number = line + text.count("\n", searched, position), position, number + 1
        origin = f"{name}:{number if is_one_line else line}"
        if text[position : position + 1] == "]":
            return position + 1
        try:
            value, position = decode(text, position)
        except UNREADABLE as error:
            yield RawRow(origin, error=f"{_broken(error)}; the rest of the file cannot be read")
            return None
        yield RawRow(origin, value)
        position = _skip_space(text, position)
        follows = text[position : position + 1]
        if follows == ",":
            position += 1
        elif follows != "]":
            line += text.count("\n", searched, position)
            place = number + 1 if is_one_line else line
            found = "the file ends" if not follows else f"{follows!r} stands"
            reason = f"broken JSON: {found} where a comma or ] must; the rest of the file cannot be read"
            yield RawRow(f"{name}:{place}", error=reason)
            return None


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "broken JSON: brackets stand too deep in one another"
    if not isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error}"
    found = error.doc[error.pos : error.pos + 20]
    reason = error.msg.removesuffix(" at")
    return f"broken JSON: {reason} at {f'{found!r} (column {error.colno})' if found else 'the end'}"


def _read_csv(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a CSV file by the names in its header, each with the line that it starts on; all cells are text.

    Columns are apart by commas, or by what stands in a header without one: semicolons (spreadsheets where the comma is
    the decimal mark write these) or tabs. A line before the header may say it: sep=;
    """
    csv.field_size_limit(LONGEST_ROW)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(LONGEST_ROW)
        said = MARK_LINE.fullmatch(first)
        mark = said[1] if said else next((mark for mark in ",;\t" if mark in first), ",")
        if not said:
            file.seek(0)
        cells, header = csv.reader(_lines_of_csv(file), strict=True, delimiter=mark), None
        while True:
            origin = f"{name}:{cells.line_num + (2 if said else 1)}"
            try:
                row = next(cells, None)
            except csv.Error as error:
                yield RawRow(origin, error=f"broken CSV: {error}")
                if header is None:
                    return
                continue
            if row is None:
                return
            if any(ESCAPED.search(cell) for cell in row):
                yield RawRow(origin, error=NO_UTF8, remedy=AS_UTF8)
                if header is None:
                    return
            elif header is None:
                header = row
                if fault := _header_fault(header):
                    yield RawRow(origin, None, *fault)
                    return
            elif len(row) == len(header):
                yield RawRow(origin, {column: _cell(text) for column, text in zip(header, row, strict=True)})
            elif row:  # an empty line is no row
                few = "few" if len(row) < len(header) else "many"
                yield RawRow(origin, error=f"has too {few} cells: {len(row)}, for {counted(len(header), 'column')}")


def _lines_of_csv(file: IO[str]) -> Iterator[str]:
    for line in _lines(file):
        if line is None:
            raise csv.Error(f"a line {TOO_LONG}")
        yield line


def _cell(text: str) -> Any:
    """What a cell holds: text, but for a JSON list of turns, which is that list."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    try:
        value = json.loads(text)
    except UNREADABLE:
        return text
    are_turns = bool(value) and all(isinstance(turn, dict) and set(turn) & {"role", "from"} for turn in value)
    return value if are_turns else text


def _header_fault(header: list[str]) -> tuple[str, str] | None:
    """Why the first row of a CSV file cannot name its columns, and the remedy."""
    named = "name every column once in the first line, such as prompt,completion"
    if not any(cell.strip() for cell in header):
        return "the header is empty", named
    if len(header) == 1 and "|" in header[0]:
        return "the columns are separated by '|'", "write the file with commas, semicolons or tabs"
    if nameless := [str(place) for place, cell in enumerate(header, 1) if not cell.strip()]:
        return f"column {', '.join(nameless)} has no name in the header", f"{named} (pandas: to_csv(..., index=False))"
    if twice := _twice(header):
        return f"the header names {', '.join(twice)} twice", named
    return None


def _twice(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BYTES, pre_buffer=False) as file:
            if twice := _twice(file.schema_arrow.names):
                yield RawRow(f"{name}:1", error=f"names the column {', '.join(twice)} twice", remedy="name each once")
                return
            at_once = _rows_at_once(file.metadata)
            of_categories = any(isinstance(kind, pyarrow.DictionaryType) for kind in file.schema_arrow.types)
            for batch in file.iter_batches(batch_size=CATEGORY_ROWS if of_categories else at_once):
                for row in _rows_of(batch, at_once):
                    number += 1
                    if row is None:
                        yield RawRow(f"{name}:{number}", error=TOO_LONG, remedy="split it into several rows")
                    else:
                        yield RawRow(f"{name}:{number}", without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"is not readable Parquet: {str(error).splitlines()[0].rstrip('.')}"
        yield RawRow(f"{name}:{number + 1}", error=reason, remedy=AGAIN)


def _rows_at_once(metadata: Any) -> int:
    """By what the file says of its groups of rows: a row of one is no longer than all of it, uncompressed."""
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    longest = max((group.total_byte_size for group in groups), default=0)
    return MORE_ROWS if MORE_ROWS * longest <= PARQUET_ROWS * LONGEST_ROW else PARQUET_ROWS


def _rows_of(batch: Any, at_once: int) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one that is longer than LONGEST_ROW."""
    for part in (_plain(batch.slice(start, at_once)) for start in range(0, batch.num_rows, at_once)):
        if part.nbytes <= LONGEST_ROW:
            yield from part.to_pylist()
            continue
        for row in (part.slice(start, 1) for start in range(part.num_rows)):
            yield row.to_pylist()[0] if row.nbytes <= LONGEST_ROW else None


def _plain(batch: Any) -> Any:
    """With what its categories stand for, of which each row would else be as long as all."""
    import pyarrow

    columns = [c.dictionary_decode() if isinstance(c, pyarrow.DictionaryArray) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def without_nulls(value: Any) -> Any:
    """Drop null fields of nested objects: columnar files fill in the keys that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
