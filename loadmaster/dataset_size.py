"""How much a job's data are, before anything is prepared: what hours and dollars are planned by.

By the first rows of each file: what is said in them, and what a chat template writes around it. Templates differ, and
the plan has no tokenizer: what they write of a turn, and of models that are not at hand in place of a system message
that a chat has not, is that of Llama 3.1, Qwen2.5 and SmolLM2, within some tokens.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loadmaster import catalog
from loadmaster.config.schema import Job, ModelConfig
from loadmaster.config.shipped import local_path, resolve_path
from loadmaster.data.beginnings import as_text, first_rows
from loadmaster.data.formats import Conversation, RowError, recognise_format, renamed, to_conversation
from loadmaster.data.sources import LOOKED_INTO, SOON_READ, open_source
from loadmaster.preflight import estimate_tokens
from loadmaster.preflight.dataset import text_tokens

ROWS_WEIGHED, LEAST_WEIGHED = 1000, 100
"""Of all files together, and of each where they are many."""
TURN_TOKENS, SYSTEM_TOKENS, TEXT_TOKENS = 5, 20, 1
"""What a template writes around a turn and in place of a system message, and what ends a text."""
WITHOUT_SYSTEM = {"gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen3", "qwen3_moe"}
"""Families of shipped shapes whose templates write nothing in place of one."""


def dataset_tokens(job: Job) -> int | None:
    """Tokens of an epoch, estimated from the first rows of the files; None for a Hub dataset, and where one is not
    here.

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
    looked_into = list(dict.fromkeys(file for file, _ in sizes))[:LOOKED_INTO]
    most = max(LEAST_WEIGHED, ROWS_WEIGHED // len(looked_into))
    system = system_tokens(job.model)
    weighed = {file: weighed_rows(job, file, most, system) for file in looked_into}
    known, sized = sum(rows for rows, _ in weighed.values()), dict(sizes)
    a_byte = known / max(1, sum(sized[file] for file in looked_into))
    mean = sum(map(math.prod, weighed.values())) / known
    tokens, left = 0.0, job.data.max_rows or math.inf
    for file, size in sizes:
        rows, each = weighed.get(file) or (size * a_byte, mean)  # files that are too many are like the first
        tokens += min(rows, left) * each
        left -= min(rows, left)
    return max(1, round(tokens))


def weighed_rows(job: Job, file: Path, most: int, system: float) -> tuple[float, float]:
    """(rows, tokens of each) of a file, by at most so many of the first of them."""
    rows, count = first_rows(file, most)
    if not rows:
        return _unread(file, file.stat().st_size)
    return count, sum(row_tokens(job, row, system) for row in rows) / len(rows)


def row_tokens(job: Job, row: dict[str, Any], system: float) -> float:
    """Of a row with its turns' headers and ends, a system message, and both answers of a pair behind their prompt, less
    what is cut off or left out as too long; by all that it holds where that cannot be said. system: tokens in place of
    a system message."""
    data = job.data
    try:
        row = renamed(row, data.columns or {})
        shape = recognise_format(row, job.objective)[0] if data.format == "auto" else data.format
        chat = to_conversation(row, shape, "", data.system, data.tools)
    except RowError:
        return text_tokens(as_text(row))
    if chat.text is not None:
        pieces = [text_tokens(chat.text) + TEXT_TOKENS]
    else:
        of_tools = text_tokens(as_text(chat.tools)) if chat.tools else 0
        pieces = [of_tools + _chat_tokens(turns, system) for turns in _chats(chat)]
    if sum(pieces) <= job.sequence_length or data.on_long_row in ("split", "refuse"):
        return sum(pieces)
    return job.sequence_length if job.objective == "sft" and data.on_long_row == "cut" else 0


def system_tokens(model: ModelConfig) -> float:
    """Of what the template writes in place of a system message: that of model.chat_template or of model.path, else the
    family's."""
    if model.chat_template or model.path:
        if (template := _template(model)) is None:
            return SYSTEM_TOKENS
        from loadmaster.config.chat_template import opening

        written = opening(template)
        return SYSTEM_TOKENS if written is None else text_tokens(written)
    shape = catalog.shapes().get(model.name.lower(), {})
    return 0 if shape.get("model_type") in WITHOUT_SYSTEM else SYSTEM_TOKENS


def _template(model: ModelConfig) -> str | None:
    """Of the model at hand; None where it has none that can be read."""
    own = local_path(model.chat_template or f"{model.path}/chat_template.jinja")
    try:
        if model.chat_template or own.is_file():
            return own.read_text(encoding="utf-8")
        found = json.loads((local_path(model.path) / "tokenizer_config.json").read_text(encoding="utf-8"))
        return found["chat_template"] if isinstance(found["chat_template"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _unread(file: Path, size: int) -> tuple[float, float]:
    """Of a file that is taken by its bytes alone: as one row."""
    return 1, estimate_tokens({str(file): size})


def _chats(chat: Conversation) -> list[list[dict[str, Any]]]:
    return [chat.messages] if chat.rejected is None else [chat.messages, [*chat.messages[:-1], chat.rejected]]


def _chat_tokens(turns: list[dict[str, Any]], system: float) -> float:
    said = sum(text_tokens(as_text(value)) for turn in turns for key, value in turn.items() if key != "role" and value)
    in_place = 0 if turns[0]["role"] == "system" else system
    return said + TURN_TOKENS * len(turns) + in_place


def _sizes(paths: list[str], key: str, skips: bool) -> list[tuple[Path, int]]:
    """(file, bytes) of each; one that is named twice is read twice."""
    source = open_source(paths, key=key)
    sizes = [(file, file.stat().st_size) for file in source.files]
    if not skips:
        source.refuse_misnamed()
    if sum(size for _, size in sizes) < SOON_READ:
        source.refuse_empty()
    return sizes
