"""How much a job's data are, before anything is prepared: what hours and dollars are planned by.

Where keys and quotes of a file are few, as in a CSV file of short rows, most of what is trained on is the chat
template's: the first rows of each file say how many times the tokens of its bytes that makes. Templates differ, and
the plan has no tokenizer: what they write of a turn, and in place of a system message that a chat has not, is that of
Llama 3.1, Qwen2.5 and SmolLM2, within some tokens.
"""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.config.shipped import resolve_path
from loadmaster.data.formats import Conversation, RowError, recognise_format, renamed, to_conversation
from loadmaster.data.sources import LOOKED_INTO, SOON_READ, FileSource, open_source
from loadmaster.preflight import estimate_tokens
from loadmaster.preflight.dataset import BYTES_PER_TOKEN

ROWS_READ = 1000
"""By which a plan tells how much the first data.max_rows are."""
ROWS_WEIGHED = 100
"""Of each file, by which a plan tells what templates add."""
READ_BY_LINE = (".jsonl", ".ndjson", ".csv")
TURN_TOKENS, SYSTEM_TOKENS = 5, 20


def dataset_tokens(job: Job) -> int | None:
    """Tokens of an epoch, estimated from the size of the files and from their first rows; None for a Hub dataset, and
    where one is not here.

    Raises DataError for a folder without files of rows, and for files that hold none or are not what their names say,
    held-out ones included.
    """
    paths, held, skips = job.data.paths, job.data.validation, job.data.on_bad_row == "skip"
    if isinstance(held, str) and os.path.exists(resolve_path(held)):
        _sizes([held], "data.validation", skips)
    here = [path for path in paths if os.path.exists(resolve_path(path))]
    sizes = _sizes(here, "data.path", skips) if here else []
    if len(here) < len(paths):
        return None
    files = [file for file, _ in sizes]
    times = {file: times_of_templates(job, file) for file in list(dict.fromkeys(files))[:LOOKED_INTO]}
    tokens = round(sum(estimate_tokens({str(file): size}) * times.get(file, 1.0) for file, size in sizes))
    most = job.data.max_rows
    return tokens if most is None else min(tokens, estimate_tokens({"rows.jsonl": _bytes_of_rows(job, most)}))


def times_of_templates(job: Job, file: Path) -> float:
    """How many times a file's bytes its rows come to, by the first of them; 1 where reading those takes long."""
    if file.suffix.lower() not in READ_BY_LINE and file.stat().st_size >= SOON_READ:
        return 1.0
    kept, rendered = 0, 0.0
    for row in islice(FileSource([file]).rows(), ROWS_WEIGHED):
        size = _kept_bytes(row.value, file) if isinstance(row.value, dict) else 0
        kept += size
        rendered += max(size, rendered_bytes(job, row.value))
        if kept > SOON_READ:
            break
    return rendered / kept if kept else 1.0


def rendered_bytes(job: Job, row: Any) -> float:
    """Of a row with its turns' headers and ends, a system message, and both answers of a pair behind their prompt; 0
    where that cannot be said."""
    data = job.data
    if not isinstance(row, dict):
        return 0.0
    try:
        row = renamed(row, data.columns or {})
        shape = recognise_format(row, job.objective)[0] if data.format == "auto" else data.format
        chat = to_conversation(row, shape, "", data.system, data.tools)
    except RowError:
        return 0.0
    if chat.text is not None:
        return _bytes(chat.text)
    of_tools = _bytes(chat.tools) if chat.tools else 0
    return sum(of_tools + _chat_bytes(turns) for turns in _chats(chat))


def _chats(chat: Conversation) -> list[list[dict[str, Any]]]:
    return [chat.messages] if chat.rejected is None else [chat.messages, [*chat.messages[:-1], chat.rejected]]


def _chat_bytes(turns: list[dict[str, Any]]) -> float:
    said = sum(_bytes(value) for turn in turns for key, value in turn.items() if key != "role" and value)
    system = 0 if turns[0]["role"] == "system" else SYSTEM_TOKENS
    return said + BYTES_PER_TOKEN * (TURN_TOKENS * len(turns) + system)


def _kept_bytes(row: dict[str, Any], file: Path) -> int:
    return sum(_bytes(cell) + 1 for cell in row.values()) if file.suffix.lower() == ".csv" else _bytes(row) + 1


def _bytes(value: Any) -> int:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return len(text.encode(errors="replace"))


def _bytes_of_rows(job: Job, most: int) -> int:
    """Of the first `most` rows, by as many of them as are soon read."""
    first = [row.value for row in islice(open_source(job.data.paths).rows(), min(most, ROWS_READ))]
    size = round(sum(max(_bytes(row), rendered_bytes(job, row)) for row in first))
    return size if len(first) < ROWS_READ else size * most // ROWS_READ


def _sizes(paths: list[str], key: str, skips: bool) -> list[tuple[Path, int]]:
    """(file, bytes) of each; one that is named twice is read twice."""
    source = open_source(paths, key=key)
    sizes = [(file, file.stat().st_size) for file in source.files]
    if not skips:
        source.refuse_misnamed()
    if sum(size for _, size in sizes) < SOON_READ:
        source.refuse_empty()
    return sizes
