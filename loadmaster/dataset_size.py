"""How much a job's data are, before anything is prepared: what hours and dollars are planned by."""

from __future__ import annotations

import json
import os
from itertools import islice

from loadmaster.config.schema import Job
from loadmaster.config.shipped import resolve_path
from loadmaster.data.sources import SOON_READ, open_source
from loadmaster.preflight import estimate_tokens

ROWS_READ = 1000
"""By which a plan tells how much the first data.max_rows are."""


def dataset_tokens(job: Job) -> int | None:
    """Tokens of an epoch, estimated from the size of the files, and of their first rows where data.max_rows leaves
    others out; None for a Hub dataset, and where one is not here.

    Raises DataError for a folder without files of rows, and for files that hold none or are not what their names say,
    held-out ones included.
    """
    paths, held, skips = job.data.paths, job.data.validation, job.data.on_bad_row == "skip"
    if isinstance(held, str) and os.path.exists(resolve_path(held)):
        _sizes([held], "data.validation", skips)
    here = [path for path in paths if os.path.exists(resolve_path(path))]
    sizes = _sizes(here, "data.path", skips) if here else {}
    if len(here) < len(paths):
        return None
    tokens, most = estimate_tokens(sizes), job.data.max_rows
    return tokens if most is None else min(tokens, estimate_tokens({"rows.jsonl": _bytes_of_rows(paths, most)}))


def _bytes_of_rows(paths: list[str], most: int) -> int:
    """Of the first `most` rows as JSON, by as many of them as are soon read."""
    first = list(islice(open_source(paths).rows(), min(most, ROWS_READ)))
    size = sum(len(json.dumps(row.value, ensure_ascii=False, default=str).encode()) for row in first)
    return size if len(first) < ROWS_READ else size * most // ROWS_READ


def _sizes(paths: list[str], key: str, skips: bool) -> dict[str, int]:
    source = open_source(paths, key=key)
    sizes = {str(file): file.stat().st_size for file in source.files}
    if not skips:
        source.refuse_misnamed()
    if sum(sizes.values()) < SOON_READ:
        source.refuse_empty()
    return sizes
