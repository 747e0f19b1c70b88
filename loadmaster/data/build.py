"""From sources to a cache entry: read, split, encode, fit, pack, write.

Two passes. The first reads the rows and writes good ones as conversations, one JSON line each; the
second renders and tokenises them in chunks, on all cores where there are enough rows to pay for the
processes. What is wrong in either pass is collected and reported together.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loadmaster.config.schema import DataConfig, Job
from loadmaster.data.cache import ConversationFile
from loadmaster.data.checks import Fault, SourceFaults, fault_report, listed
from loadmaster.data.faults import Checked, Reading, other_format, other_shape, stop_on
from loadmaster.data.formats import RowError, recognise_format, refuse_unread, to_conversation, unread_fields
from loadmaster.data.packing import both_answers, fit_documents, fit_judged, rows_of
from loadmaster.data.preference import is_preference, is_unpaired, unfit
from loadmaster.data.processes import in_processes
from loadmaster.data.render import special_token_pattern
from loadmaster.data.rows import lay_out
from loadmaster.data.shapes import renamed
from loadmaster.data.sources import RawRow, Source
from loadmaster.data.tokens import Encoded, Encoder
from loadmaster.errors import DataError
from loadmaster.files import write_json
from loadmaster.processors import usable

CHUNK = 256  # conversations tokenised at a time
PARALLEL_ROWS = 20_000  # from here on processes pay: each takes about 5 s to start, a row 0.1 to 0.3 ms
UNFILLED = re.compile(rb"\{\{ ?\w+ ?\}\}")
CONVERSATIONS, SPLITS = "conversations.jsonl", ("train", "validation")


def build(folder: Path, job: Job, tokenizer: Any, train: Source, validation: Source | None) -> None:
    """Write a whole cache entry into `folder`. Raises DataError with every row that is wrong."""
    from safetensors.numpy import save_file

    with open(folder / CONVERSATIONS, "wb") as file:
        starts = [0]
        control = special_token_pattern(tokenizer)
        reading = _read(train, job, file, starts, job.data.max_rows, control)
        held = _read(validation, job, file, starts, None, control) if validation else None
    _refuse_absent(job.data.columns or {}, [reading, *([held] if held else [])])
    count = len(reading.row_ids)
    if held:
        index = [np.arange(count), np.arange(count, len(starts) - 1)]
    else:
        fraction = job.data.validation if isinstance(job.data.validation, float) else 0.0
        index = list(_held_out(reading.row_ids, fraction, job.seed))
    all_starts = np.array(starts, dtype=np.int64)
    save_file({"starts": all_starts, "train": index[0], "validation": index[1]}, folder / "conversations.safetensors")

    files = [ConversationFile(folder / CONVERSATIONS, all_starts, part) for part in index]
    encoded = [_encode(part, tokenizer) for part in files]
    rows_read = reading.rows_read + (held.rows_read if held else 0)
    sources = [Checked(train.names(), reading, encoded[:1] if held else encoded)]
    sources += [Checked(validation.names(), held, encoded[1:])] if held else []
    faults = [fault for source in sources for fault in source.bad()]
    stop_on(sources, job)
    if job.data.on_long_row == "refuse":
        names = [name for source in sources for name in source.names]
        _refuse_long(encoded, files, job, rows_read, names)

    summary: dict[str, Any] = {
        "format": reading.format,
        "recognised_by": reading.recognised_by,
        "rows_read": rows_read,
        "bad_rows": len(faults),
        "sequence_length": job.sequence_length,
        "packing": job.data.packing,
        "on_long_row": job.data.on_long_row,
        "notes": _notes(reading, held, index, faults, job.data),
    }
    for name, part, conversations in zip(SPLITS, encoded, files, strict=True):
        arrays, figures = _split_rows(part, conversations, job)
        summary[name] = figures
        if arrays is not None:
            save_file(arrays, folder / f"{name}.safetensors")
    if job.data.max_rows is None and (empty := [name for name in train.names() if not reading.rows_of[name]]):
        summary["notes"].append(f"no rows in {listed(empty)}")
    if summary["train"] is None:
        all_bad = SourceFaults(train.names(), reading.rows_read, sources[0].bad())
        why = f": {all_bad.faults[0].reason} ({all_bad.faults[0].origin})" if all_bad.faults else ""
        remedy = all_bad.faults[0].remedy if all_bad.alike else None
        usual = "check data.path and data.format, or raise sequence_length if every row was too long"
        if len(encoded[0].lengths):
            shortest = int(encoded[0].lengths.min())
            each = "its answers" if job.objective != "sft" else "something that is trained"
            why = f"{why or ''}; the shortest of the rest has {shortest:,} tokens, and none has {each} within "
            why += f"sequence_length={job.sequence_length}"
            usual = f"sequence_length={shortest}, or as much more as the rows need (loadmaster data counts them)"
        said = f"no row is left to train on: {rows_read:,} read, {len(faults):,} of them bad{why}"
        raise DataError(f"{said}\n    fix: {remedy or usual}")
    if lacking := [kind for kind in ("desirable", "undesirable") if summary["train"].get(kind) == 0]:
        summary["notes"].append(
            f"no answer to train on is {lacking[0]}: kto tells the two kinds apart, so add rows with the other label"
        )
    write_json(folder / "summary.json", summary)


def stop_on_bad_rows(job: Job, sources: list[tuple[Source, int | None]]) -> None:
    """Raise DataError with what no tokenizer is needed to see of each source, up to its first so many rows."""
    no_token = re.compile(r"(?!)")
    with open(os.devnull, "wb") as nowhere:
        readings = [_read(source, job, nowhere, [0], most, no_token) for source, most in sources]
    _refuse_absent(job.data.columns or {}, readings)
    checked = [Checked(source.names(), reading, []) for (source, _), reading in zip(sources, readings, strict=True)]
    stop_on(checked, job)


# --- first pass -------------------------------------------------------------------------------------


def _read(
    source: Source, job: Job, file: Any, starts: list[int], max_rows: int | None, control: re.Pattern[str]
) -> Reading:
    """Append the conversations of `source` to `file`, and their byte offsets to `starts`."""
    reading = Reading(format="" if job.data.format == "auto" else job.data.format)
    columns = job.data.columns or {}
    with _progress("reading rows", None) as advance:
        for raw in source.rows():
            if max_rows is not None and reading.rows_read >= max_rows:
                break
            file_name = raw.origin.rpartition(":")[0]
            reading.rows_read += 1
            reading.rows_of[file_name] += 1
            advance(1)
            if columns and isinstance(raw.value, dict):
                reading.fields |= raw.value.keys()
                raw = replace(raw, value=renamed(raw.value, columns))
            try:
                line = _conversation_line(raw, reading, job)
            except RowError as error:
                reading.first_bad.setdefault(file_name, raw.value)
                reading.bad.append(Fault(raw.origin, str(error), remedy=error.remedy))
                continue
            starts.append(starts[-1] + file.write(line))
            reading.unfilled += UNFILLED.search(line) is not None
            if found := control.search(line.decode()):
                reading.control.append((raw.origin, found.group()))
    if not reading.rows_read:
        raise DataError(f"the data has no rows: {', '.join(source.names())}")
    if job.data.format != "auto" and SourceFaults(source.names(), reading.rows_read, reading.bad).alike:
        remedy = other_format(next(iter(reading.first_bad.values())), job)
        reading.bad = [replace(fault, remedy=remedy or fault.remedy) for fault in reading.bad]
    return reading


def _refuse_absent(columns: Mapping[str, str], readings: Sequence[Reading]) -> None:
    """Raise DataError for a column that no row of any source has: one that may be empty may be absent from some."""
    fields = set[str]().union(*(reading.fields for reading in readings))
    absent = [theirs for ours, theirs in columns.items() if not {ours, theirs} & fields]
    if fields and absent:
        said = f"data.columns names {', '.join(absent)}, and no row has that"
        raise DataError(f"{said}\n    fix: name one of the rows' fields: {', '.join(sorted(fields))}")


def _conversation_line(raw: RawRow, reading: Reading, job: Job) -> bytes:
    if raw.error is not None:
        raise RowError(raw.error, raw.remedy)
    if not reading.format:
        reading.format, reading.recognised_by = recognise_format(raw.value, job.objective)
        reading.recognised_in = raw.origin
    _fits_objective(raw.value, reading, job.objective)
    if job.data.columns and not reading.row_ids and isinstance(raw.value, dict):
        refuse_unread(raw.value, reading.format, job.data.columns, reading.recognised_by)
    try:
        conversation = to_conversation(raw.value, reading.format, raw.origin, job.data.system, job.data.tools)
    except RowError as error:
        raise RowError(f"{error}{other_shape(raw.value, reading, job.objective)}", error.remedy) from None
    if not reading.row_ids:
        reading.unread = unread_fields(raw.value, conversation)
    reading.row_ids.append(conversation.row_id)
    return conversation.to_json().encode() + b"\n"


def _fits_objective(row: Any, reading: Reading, objective: str) -> None:
    """Raise RowError for a row that `objective` does not train on."""
    shape = reading.format
    if objective == "sft" and isinstance(row, dict):
        if is_preference(row):
            shape = "preference"
        elif shape == "prompt_completion" and reading.recognised_by and is_unpaired(row):
            shape = "unpaired"  # told apart by its label alone, which the first row had not
    if found := unfit(shape, objective):
        raise RowError(*found)


def _held_out(row_ids: list[str], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation). Rows with the same content are held out together or not at all."""
    everything = np.arange(len(row_ids))
    counts: dict[str, int] = {}
    for row_id in row_ids:
        counts[row_id] = counts.get(row_id, 0) + 1
    if not fraction or len(counts) < 2:
        return everything, everything[:0]
    shuffled = sorted(counts, key=lambda row_id: hashlib.sha256(f"{seed}:{row_id}".encode()).digest())
    wanted, taken, held = max(1, round(fraction * len(row_ids))), 0, set()
    for row_id in shuffled[:-1]:
        if taken >= wanted:
            break
        if taken + counts[row_id] > wanted:
            continue  # a row repeated more often than is wanted stays in training
        held.add(row_id)
        taken += counts[row_id]
    if not held:
        held.add(min(shuffled, key=counts.__getitem__))
    is_held = np.array([row_id in held for row_id in row_ids])
    return everything[~is_held], everything[is_held]


# --- second pass ------------------------------------------------------------------------------------

@cache
def _encoder(tokenizer: Path) -> Encoder:
    return Encoder(pickle.loads(tokenizer.read_bytes()))


def _encode_in_worker(tokenizer: Path, conversations: ConversationFile) -> Encoded:
    return _encoder(tokenizer).encode(conversations[:])


def _encode(conversations: ConversationFile, tokenizer: Any) -> Encoded:
    pieces = [conversations.piece(start, start + CHUNK) for start in range(0, len(conversations), CHUNK)]
    processes = min(usable(), 16)
    with _progress("tokenising", len(conversations)) as advance:
        parts = []
        if len(conversations) < PARALLEL_ROWS or processes == 1:
            encoder = Encoder(tokenizer)
            for piece in pieces:
                parts.append(encoder.encode(piece[:]))
                advance(len(piece))
        else:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "tokenizer"  # not sent to each: one would begin once another has read all of it
                file.write_bytes(pickle.dumps(tokenizer))
                with in_processes(processes, partial(_encode_in_worker, file), pieces) as results:
                    for piece, part in zip(pieces, results, strict=True):
                        parts.append(part)
                        advance(len(piece))
    return Encoded.joined(parts, [len(piece) for piece in pieces])


def _split_rows(
    encoded: Encoded, conversations: ConversationFile, job: Job
) -> tuple[dict[str, np.ndarray] | None, dict[str, Any] | None]:
    """(arrays of the packed rows, their figures); (None, None) when nothing is left."""
    if job.objective == "sft":
        source, begins, sizes, long = fit_documents(
            encoded.lengths, encoded.trained, job.sequence_length, job.data.on_long_row
        )
    else:
        source, begins, sizes, long = fit_judged(encoded.lengths, job.sequence_length)
    if not len(sizes):
        return None, None
    rows = rows_of(sizes, job.sequence_length, job.data.packing, job.seed)
    origins, labels = zip(*((each.origin, each.label) for each in conversations), strict=True)
    unpaired = labels[0] is not None
    if job.objective != "sft" and not unpaired:
        source, begins, sizes, rows = both_answers(source, begins, sizes, encoded.splits, rows)
    kept = encoded.kept[source].tolist()
    desirable = np.array([labels[index] for index in kept], dtype=np.bool_) if unpaired else None
    arrays = lay_out(encoded.ids, encoded.trained, begins, sizes, [origins[index] for index in kept], rows, desirable)
    tokens = int(sizes.sum())
    figures = {
        "conversations": len(encoded.lengths),
        "documents": len(sizes),
        "rows": len(rows),
        "tokens": tokens,
        "trained_tokens": int(arrays["trained_tokens"][0]),
        "fill": tokens / (len(rows) * job.sequence_length),
        "median_length": int(np.median(encoded.lengths)),
        "longest": int(encoded.lengths.max()),
        "largest_id": int(arrays["input_ids"].max()),
        "nine_in_ten": int(np.quantile(encoded.lengths, 0.9, method="higher")),
        "long_rows": asdict(long),
    }
    if desirable is not None:
        figures |= {"desirable": int(desirable.sum()), "undesirable": int((~desirable).sum())}
    return arrays, figures


# --- what is said about it --------------------------------------------------------------------------


def _refuse_long(
    encoded: list[Encoded], files: list[ConversationFile], job: Job, rows_read: int, names: list[str]
) -> None:
    faults = []
    for part, conversations in zip(encoded, files, strict=True):
        for place in np.flatnonzero(part.lengths > job.sequence_length).tolist():
            origin = conversations[int(part.kept[place])].origin
            reason = f"has {part.lengths[place]:,} tokens, sequence_length is {job.sequence_length:,}"
            faults.append(Fault(origin, reason))
    if faults:
        other = "cut or split" if job.objective == "sft" else "cut, which leaves them out"
        hint = f"raise sequence_length, shorten these rows, or set data.on_long_row to {other}"
        raise DataError(fault_report([SourceFaults(names, rows_read, faults)], hint))


def _notes(
    reading: Reading, held: Reading | None, index: list[np.ndarray], faults: list[Fault], data: DataConfig
) -> list[str]:
    notes = []
    if isinstance(data.validation, float) and not len(index[1]):
        notes.append(f"data.validation={data.validation:g} holds nothing out: there is no second row that differs")
    if faults:
        notes.append(f"bad rows skipped: {len(faults):,}, the first {faults[0].origin}: {faults[0].reason}")
    if held:
        known = set(reading.row_ids)
        shared = sum(row_id in known for row_id in held.row_ids)
        if shared:
            notes.append(f"{shared:,} of {len(held.row_ids):,} validation rows also stand in the training data")
    repeated = len(reading.row_ids) - len(set(reading.row_ids))
    if repeated:
        notes.append(f"{repeated:,} {'rows repeat' if repeated > 1 else 'row repeats'} another row word for word")
    if reading.unread:
        notes.append(f"nothing is read from {', '.join(reading.unread)}")
    if count := reading.unfilled:
        verb = "rows hold" if count > 1 else "row holds"
        notes.append(f"{count:,} {verb} fields like {{{{name}}}}, trained on as they stand")
    if reading.control:
        (place, token), count = reading.control[0], len(reading.control)
        notes.append(
            f"{count:,} {'rows hold' if count > 1 else 'row holds'} a control token of the model in its own text, "
            f"which the model reads as one (first {place}: {token})"
        )
    return notes


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Any]:
    """A bar on a terminal's stderr, nothing elsewhere; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
