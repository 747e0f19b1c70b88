"""`prepare`: the data of a job as packed rows, from the cache when nothing that shapes them has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.config.shipped import display_path, local_path
from loadmaster.data.build import CONVERSATIONS, INDEX, SPLITS, build, stop_on_bad_rows
from loadmaster.data.cache import ConversationFile, cache_folder, is_whole, seal
from loadmaster.data.faults import listed
from loadmaster.data.formats import Conversation
from loadmaster.data.preference import unfit
from loadmaster.data.render import template_hash
from loadmaster.data.rows import PackedRows
from loadmaster.data.sources import Source, left_out, open_source
from loadmaster.errors import DataError
from loadmaster.files import cached_in, exclusive, publish_folder, read_json, sha256_json

# Raised whenever the same input would give other tokens, rows or files than before.
LAYOUT_VERSION = 4
LARGE_BYTES = 100_000_000
"""Of files whose reading is announced: it takes longer than a moment."""
NOT_READ = "not read, as other files of rows are in the folder; a list, data.path=[FILE,...], names all that are read"


@dataclass(frozen=True)
class PreparedData:
    """Everything that training, evaluation and export read of the data.

    train, validation: packed rows; validation is None when none is held out.
    train_conversations, validation_conversations: the same data as chats, read from disk as needed.
    summary: counts and figures for the log and the report (see docs/data.md).
    """

    train: PackedRows
    validation: PackedRows | None
    validation_conversations: Sequence[Conversation]
    train_conversations: Sequence[Conversation]
    summary: dict[str, Any]


def prepare(job: Job, tokenizer: Any) -> PreparedData:
    """Read, check, tokenise and pack the job's data, or open what an earlier run left in the cache.

    Processes of one machine may call it together: one builds, the others wait and open.
    Raises DataError with file and line of every row that is wrong.
    """
    started = time.perf_counter()
    data, held = job.data, job.data.validation
    train = open_source(data.path, data.split, "data.path", data.subset)
    own = data.subset if held == data.path else None
    validation = open_source(held, data.validation_split, "data.validation", own) if isinstance(held, str) else None
    fingerprint = sha256_json(_shaped_by(job, tokenizer, train, validation))
    # Rows carry the names of their files: the same data under another name is another entry of the cache.
    names = [*train.names(), *(validation.names() if validation else ())]
    folder = cache_folder() / sha256_json([fingerprint, names])[:32]
    cached = is_whole(folder)
    if not cached:
        with exclusive(folder, "tokenised data"):
            cached = is_whole(folder)  # another process may have built it meanwhile
            if not cached:
                with cached_in(folder.parent, "tokenised data"), publish_folder(folder) as partial:
                    build(partial, job, tokenizer, train, validation)
                    if sha256_json(_shaped_by(job, tokenizer, train, validation)) != fingerprint:
                        raise DataError(
                            f"{listed(names)} changed while the rows were read\n"
                            "    fix: start again once nothing writes there any more"
                        )
                    seal(partial)
    prepared = _open(folder, fingerprint)
    for part in prepared.summary.get("formats", [prepared.summary]):  # entries of the cache from before have none
        if found := unfit(part["format"], job.objective):  # what kto left in the cache, dpo and orpo find
            reason, remedy = found
            raise DataError(f"each row of {listed(part.get('files', names))} {reason}\n    fix: {remedy}")
    if sheets := [display_path(sheet) for sheet in left_out(job.data.path) + (left_out(held) if validation else [])]:
        prepared.summary["notes"].append(f"{listed(sheets)}: {NOT_READ}")
    prepared.summary.update(cache="hit" if cached else "built", seconds=time.perf_counter() - started)
    return prepared


def refuse_bad_rows(job: Job, echo: Callable[[str], None] = print) -> None:
    """Read data that lie here before anything is rented for them; what lies elsewhere is left alone.

    echo: told of it where it takes a while. Raises DataError with file and line of every row that cannot be read as
    what the job trains on.
    """
    data = job.data
    wanted = [(data.paths, "data.path", data.max_rows)]
    wanted += [([data.validation], "data.validation", None)] if isinstance(data.validation, str) else []
    here = [each for each in wanted if all(os.path.isfile(local_path(path)) for path in each[0])]
    size = sum(local_path(path).stat().st_size for paths, *_ in here for path in paths)
    if size >= LARGE_BYTES:
        echo(f"reading {size / 1e9:.1f} GB of data before a machine starts for them")
    stop_on_bad_rows(job, [(open_source(paths, data.split, key), most) for paths, key, most in here])


def _open(folder: Path, fingerprint: str) -> PreparedData:
    from safetensors.numpy import load_file

    index = load_file(folder / INDEX)
    rows = {
        split: PackedRows.open(folder / f"{split}.safetensors", f"{fingerprint}:{split}")
        for split in SPLITS
        if (folder / f"{split}.safetensors").exists()
    }
    chats = {split: ConversationFile(folder / CONVERSATIONS, index["starts"], index[split]) for split in SPLITS}
    summary = read_json(folder / "summary.json")
    return PreparedData(rows["train"], rows.get("validation"), chats["validation"], chats["train"], summary)


def _shaped_by(job: Job, tokenizer: Any, train: Source, validation: Source | None) -> dict[str, Any]:
    """Everything that the tokens and rows depend on."""
    data = job.data
    # Without columns and several files, what was prepared before stays as it is.
    renamed = {"columns": data.columns} if data.columns else {}
    several = any(len(set(source.names())) > 1 for source in (train, validation) if source)
    by_file = {"format_of": "each file"} if several and data.format == "auto" else {}
    return renamed | by_file | {
        "layout": LAYOUT_VERSION,
        "train": train.fingerprint(),
        "validation": validation.fingerprint() if validation else data.validation,
        "format": data.format,
        "pairs": job.objective != "sft",
        "system": data.system,
        "tools": data.tools,
        "max_rows": data.max_rows,
        "on_bad_row": data.on_bad_row,
        "on_long_row": data.on_long_row,
        "packing": data.packing,
        "sequence_length": job.sequence_length,
        "seed": job.seed,
        "template": template_hash(tokenizer) if tokenizer.chat_template else None,
        "tokenizer": tokenizer_hash(tokenizer),
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of the vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_json([written, special])
