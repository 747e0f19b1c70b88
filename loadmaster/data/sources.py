"""Where rows come from: JSON, JSONL, CSV and Parquet files, folders and lists of them, and Hub datasets.

Every row carries its origin, "file:line" (for Parquet and Hub rows, the number of the row), so that
whatever is wrong with it later can be looked up. Files are read as a stream; only a JSON array is
held in memory whole.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster.config.schema import DATA_SUFFIXES
from loadmaster.config.shipped import SCHEME, display_path, resolve_path
from loadmaster.data.file_kinds import AGAIN, INSTEAD, ROW_FIELDS, misnamed
from loadmaster.errors import DataError
from loadmaster.files import sha256_file

NO_UTF8 = "is not UTF-8 text"
AS_UTF8 = "save the file as UTF-8 (of files from Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
UNREADABLE = (ValueError, RecursionError)
"""What json raises for broken text, and for brackets by the thousand in one another."""
LONGEST_CELL = 2**31 - 1
"""Characters; the csv module refuses cells of more than 131,072 otherwise."""
ESCAPED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as surrogateescape decodes them."""
TURN_FIELDS = {"role", "from", "function"}
"""Fields of a row, and of a turn of a chat or a tool: what has them is no object that only holds rows."""


@dataclass(frozen=True)
class RawRow:
    """A row as read: its value, or the reason why it could not be read and what would help."""

    origin: str
    value: Any = None
    error: str | None = None
    remedy: str | None = None


class FileSource:
    """Rows of local files, in the order given."""

    def __init__(self, files: list[Path]):
        self.files = files

    def fingerprint(self) -> list[str]:
        """Hashes of the contents, the same wherever the files lie."""
        return [sha256_file(path) for path in self.files]

    def names(self) -> list[str]:
        """What the origins of rows begin with."""
        return [display_path(path) for path in self.files]

    def rows(self) -> Iterator[RawRow]:
        for path in self.files:
            yield from _read_file(path, display_path(path))

    def refuse_empty(self) -> None:
        if next(self.rows(), None) is None:
            raise DataError(f"the data has no rows: {', '.join(self.names())}")


class HubSource:
    """Rows of one split of a Hub dataset, through `datasets`."""

    def __init__(self, path: str, split: str, key: str):
        import datasets

        self.path = path
        try:
            self.dataset = datasets.load_dataset(path, split=split)
        except Exception as error:  # the Hub fails in dozens of ways; all of them are the user's to read
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"{key} = {path!r} is neither a local file or folder nor a Hub dataset that could be loaded "
                f"(split {split!r}): {reason[0]}{_nearest(path)}\n"
                "    fix: check the name, data.split, the network and HF_TOKEN, or give a JSON, JSONL, CSV or Parquet "
                "file"
            ) from error

    def fingerprint(self) -> list[str]:
        return [self.dataset._fingerprint]

    def names(self) -> list[str]:
        return [self.path]

    def rows(self) -> Iterator[RawRow]:
        for number, row in enumerate(self.dataset, 1):
            yield RawRow(f"{self.path}:{number}", without_nulls(row))


Source = FileSource | HubSource


def open_source(path: str | list[str], split: str = "train", key: str = "data.path") -> Source:
    """The source that `path` names, as set in the job's field `key`; DataError when there is no such thing."""
    if isinstance(path, list):
        if not path:
            raise DataError(f"{key} is an empty list: name at least one file")
        return FileSource([file for one in path for file in _local_files(one, key) or _missing(one, key)])
    if path == "???":
        raise DataError(f"{key} is not set: give a JSON, JSONL, CSV or Parquet file, a folder, or a Hub dataset id")
    files = _local_files(path, key)
    if files is not None:
        return FileSource(files)
    return _missing(path, key) if _looks_local(path) else HubSource(path, split, key)


def left_out(path: str | list[str]) -> list[Path]:
    """CSV files of folders that are not read: beside files of rows, a sheet is most often about them, or the same."""
    folders = [Path(resolve_path(one)) for one in ([path] if isinstance(path, str) else path)]
    found = [_files_of_rows(folder) for folder in folders if folder.is_dir()]
    return [file for files in found for file in files if not _is_read(file, files)]


def _local_files(path: str, key: str) -> list[Path] | None:
    """Files that a local path stands for; None when nothing of that name is here."""
    place = Path(resolve_path(path))
    if os.path.isdir(place):  # Path's own raises for a name that is too long to be one
        files = _files_of_rows(place)
        if not files:
            raise DataError(f"{key} = {path!r} is a folder with no {', '.join(DATA_SUFFIXES)} file in it")
        return [file for file in files if _is_read(file, files)]
    if not os.path.isfile(place):
        return None
    if _suffix(place) not in DATA_SUFFIXES:
        remedy = INSTEAD.get(_suffix(place), "write it as .jsonl, one JSON object a line")
        raise DataError(f"{key} = {path!r}: only files with {', '.join(DATA_SUFFIXES)} are read\n    fix: {remedy}")
    return [place]


def _files_of_rows(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if _suffix(p) in DATA_SUFFIXES and not _hidden(p, folder))
    if gone := next((file for file in found if not file.exists()), None):
        raise DataError(f"{display_path(gone.parent)}/{gone.name} is a link to {os.readlink(gone)}, which is not there")
    return [file for file in found if file.is_file()]


def _is_read(file: Path, beside: list[Path]) -> bool:
    return _suffix(file) != ".csv" or all(_suffix(other) == ".csv" for other in beside)


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _looks_local(path: str) -> bool:
    return path.lower().endswith(DATA_SUFFIXES) or path.startswith((".", "/", "~", SCHEME)) or path.count("/") > 1


def _missing(path: str, key: str) -> Any:
    raise DataError(f"{key} = {path!r}: no such file or folder (from {str(Path.cwd())!r}){_nearest(path)}")


def _nearest(path: str) -> str:
    """A question after the file of nearly that name, if there is one."""
    place = Path(resolve_path(path))
    names = [p.name for p in place.parent.iterdir() if p.exists()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, 1)
    return f"; did you mean {str(place.parent / near[0])!r}?" if near else ""


# --- files ------------------------------------------------------------------------------------------


def _read_file(path: Path, name: str) -> Iterator[RawRow]:
    suffix = _suffix(path)
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
        lines = (line.strip().removeprefix(codecs.BOM_UTF8) for line in file)
        first = next((line for line in lines if line), b"")
        if not first.startswith(b"{"):
            return None
        try:
            value = json.loads(first.decode())  # as UTF-8: json would take bytes for UTF-16 too
            return (value, True) if isinstance(value, dict) and not any(lines) else None
        except UNREADABLE:
            file.seek(0)
            try:
                value = json.loads(file.read().removeprefix(codecs.BOM_UTF8).decode())
                return (value, False) if isinstance(value, dict) else None
            except UNREADABLE:
                return None


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
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            origin = f"{name}:{number}"
            try:
                yield RawRow(origin, json.loads(line.strip()))
            except UnicodeDecodeError:
                yield RawRow(origin, error=NO_UTF8, remedy=AS_UTF8)
            except UNREADABLE as error:
                yield RawRow(origin, error=_broken(error))


def _read_array(path: Path, name: str) -> Iterator[RawRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield RawRow(f"{name}:1", error=f"{NO_UTF8}: {error.reason} at byte {error.start}", remedy=AS_UTF8)
        return
    yield from _elements(text, _skip_space(text, 0) + 1, name)


def _elements(text: str, position: int, name: str) -> Iterator[RawRow]:
    """Elements of the JSON array whose bracket ends at `position`, each with the line that it starts on."""
    decode = json.JSONDecoder().raw_decode
    line, counted = 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        origin = f"{name}:{line}"
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decode(text, position)
        except UNREADABLE as error:
            yield RawRow(origin, error=f"{_broken(error)}; the rest of the file cannot be read")
            return
        yield RawRow(origin, value)
        position = _skip_space(text, position)
        follows = text[position : position + 1]
        if follows == ",":
            position += 1
        elif follows != "]":
            line += text.count("\n", counted, position)
            found = "the file ends" if not follows else f"{follows!r} stands"
            reason = f"broken JSON: {found} where a comma or ] must; the rest of the file cannot be read"
            yield RawRow(f"{name}:{line}", error=reason)
            return


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
    """Rows of a CSV file by the names in its header, each with the line that it starts on; all cells are text."""
    csv.field_size_limit(LONGEST_CELL)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        cells, header = csv.reader(file, strict=True), None
        while True:
            origin = f"{name}:{cells.line_num + 1}"
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
                yield RawRow(origin, error=f"has too {few} cells: {len(row)}, for {len(header)} columns")


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
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        return f"the columns are apart by {other!r}", "write the file with commas"
    if nameless := [str(place) for place, cell in enumerate(header, 1) if not cell.strip()]:
        return f"column {', '.join(nameless)} has no name in the header", f"{named} (pandas: to_csv(..., index=False))"
    if twice := sorted({cell for cell in header if header.count(cell) > 1}):
        return f"the header names {', '.join(twice)} twice", named
    return None


def _read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{name}:{number}", without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"is not readable Parquet: {str(error).splitlines()[0].rstrip('.')}"
        yield RawRow(f"{name}:{number + 1}", error=reason, remedy=AGAIN)


def without_nulls(value: Any) -> Any:
    """Drop null fields of nested objects: columnar files fill in the keys that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
