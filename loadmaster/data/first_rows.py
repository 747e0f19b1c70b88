"""What a plan says of the data: whether rows of this kind are what the job trains on. No numpy here."""

from __future__ import annotations

import os
from collections.abc import Iterator

from loadmaster.config.schema import Job
from loadmaster.config.shipped import resolve_path
from loadmaster.data.formats import RowError, fits_objective, recognise_format, renamed
from loadmaster.data.readers import RawRow
from loadmaster.data.sources import LOOKED_INTO, SOON_READ, FileSource, open_source
from loadmaster.errors import DataError


def refuse_unfit(job: Job) -> None:
    """By the first row of each file that is here, as far as that is soon read; other faults are training's to list.

    Raises DataError where the objective does not train on such rows, and none may be left out.
    """
    for key, raw in _first_rows(job) if job.data.on_bad_row != "skip" else ():
        row, shape, fields = renamed(raw.value, job.data.columns or {}), job.data.format, ""
        try:
            if shape == "auto":
                shape, fields = recognise_format(row, job.objective)
        except RowError:
            continue
        try:
            fits_objective(row, shape, fields, job.objective)
        except RowError as error:
            raise DataError(f"{key}: {raw.origin} {error}\n    fix: {error.remedy}") from None


def _first_rows(job: Job) -> Iterator[tuple[str, RawRow]]:
    """(field, first row) of each file. A row of JSON lines is soon read however long the file is."""
    held = job.data.validation
    named = [("data.path", path) for path in job.data.paths]
    for key, path in [*named, ("data.validation", held)] if isinstance(held, str) else named:
        source = open_source(path, key=key) if os.path.exists(resolve_path(path)) else None
        for file in source.files[:LOOKED_INTO] if isinstance(source, FileSource) else ():
            if file.suffix.lower() == ".jsonl" or file.stat().st_size < SOON_READ:
                raw = next(FileSource([file]).rows(), None)
                if raw is not None and isinstance(raw.value, dict):
                    yield key, raw
