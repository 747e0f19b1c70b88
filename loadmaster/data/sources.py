"""Where rows come from: JSON, JSONL, CSV and Parquet files, folders and lists of them, and Hub datasets.

Every row carries its origin, "file:line" (for rows of Parquet, of the Hub and of a JSON array on one line their
number), so that whatever is wrong with it later can be looked up. Files are read as a stream; only a JSON array is
held in memory whole.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from loadmaster.config.schema import DATA_SUFFIXES
from loadmaster.config.shipped import SCHEME, display_path, resolve_path
from loadmaster.data.file_kinds import INSTEAD, misnamed
from loadmaster.data.readers import RawRow, read_file, without_nulls
from loadmaster.errors import DataError
from loadmaster.files import sha256_file

LOOKED_INTO = 100
"""Files of a folder that a plan looks into."""
SOON_READ = 1_000_000
"""Bytes of files that a plan looks into, as they may hold no row, or none to train on."""


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
            yield from read_file(path, display_path(path))

    def refuse_misnamed(self) -> None:
        """By the beginnings of the first files, which are soon looked at however long they are."""
        for path in self.files[:LOOKED_INTO]:
            if found := misnamed(path, _suffix(path)):
                reason, remedy = found
                raise DataError(f"{display_path(path)} {reason}\n    fix: {remedy}")

    def refuse_empty(self) -> None:
        if next(self.rows(), None) is None:
            raise DataError(f"the data has no rows: {', '.join(self.names())}")


class HubSource:
    """Rows of one split of a Hub dataset, or of one of its subsets, through `datasets`."""

    def __init__(self, path: str, split: str, key: str, subset: str | None):
        import datasets

        self.path = path
        try:
            self.dataset = datasets.load_dataset(path, subset, split=split)
        except Exception as error:  # the Hub fails in dozens of ways; all of them are the user's to read
            # the second line of a subset that is missing names those there are
            reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            splits = "data.split" if key == "data.path" else "data.validation_split"
            wanted = f"subset {subset!r}, split {split!r}" if subset else f"split {split!r}"
            raise DataError(
                f"{key} = {path!r} is neither a local file or folder nor a Hub dataset that could be loaded "
                f"({wanted}): {reason}{_nearest(path)}\n"
                f"    fix: check the name, data.subset, {splits}, the network and HF_TOKEN, or give a JSON, JSONL, CSV "
                "or Parquet file"
            ) from error

    def fingerprint(self) -> list[str]:
        return [self.dataset._fingerprint]

    def names(self) -> list[str]:
        return [self.path]

    def rows(self) -> Iterator[RawRow]:
        for number, row in enumerate(self.dataset, 1):
            yield RawRow(f"{self.path}:{number}", without_nulls(row))


class Sources:
    """Rows of several sources, one behind the other."""

    def __init__(self, parts: list[FileSource | HubSource]):
        self.parts = parts

    def fingerprint(self) -> list[str]:
        return [each for part in self.parts for each in part.fingerprint()]

    def names(self) -> list[str]:
        return [each for part in self.parts for each in part.names()]

    def rows(self) -> Iterator[RawRow]:
        for part in self.parts:
            yield from part.rows()


Source = FileSource | HubSource | Sources


def open_source(
    path: str | list[str], split: str = "train", key: str = "data.path", subset: str | None = None
) -> Source:
    """The source that `path` names, as set in the job's field `key`; DataError when there is no such thing."""
    if isinstance(path, list):
        if not path:
            raise DataError(f"{key} is an empty list: name at least one file")
        parts = [open_source(one, split, key, subset) for one in path]
        files = [part.files for part in parts if isinstance(part, FileSource)]
        return Sources(parts) if len(files) < len(parts) else FileSource([file for some in files for file in some])
    if path == "???":
        raise DataError(f"{key} is not set: give a JSON, JSONL, CSV or Parquet file, a folder, or a Hub dataset id")
    files = _local_files(path, key)
    if files is not None:
        return FileSource(files)
    if _looks_local(path):
        raise DataError(f"{key} = {path!r}: no such file or folder (from {str(Path.cwd())!r}){_nearest(path)}")
    return HubSource(path, split, key, subset)


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


def _nearest(path: str) -> str:
    """A question after the file of nearly that name, if there is one."""
    place = Path(resolve_path(path))
    names = [p.name for p in place.parent.iterdir() if p.exists()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, 1)
    return f"; did you mean {str(place.parent / near[0])!r}?" if near else ""
