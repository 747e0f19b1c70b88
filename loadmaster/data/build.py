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
from collections import Counter
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loadmaster.config.schema import DataConfig, Job
from loadmaster.data.cache import ConversationFile
from loadmaster.data.faults import listed
from loadmaster.data.packing import both_answers, fit_documents, fit_whole, rows_of
from loadmaster.data.processes import in_processes
from loadmaster.data.progress import progress
from loadmaster.data.reading import Reading, read_source, refuse_absent
from loadmaster.data.refusals import Checked, refuse_long, refuse_nothing_left, stop_on
from loadmaster.data.render import special_token_pattern
from loadmaster.data.rows import lay_out
from loadmaster.data.sources import Source
from loadmaster.data.tokens import Encoded, Encoder
from loadmaster.files import write_json
from loadmaster.processors import usable

CHUNK = 256  # conversations tokenised at a time
PARALLEL_ROWS = 20_000  # from here on processes pay: each takes about 5 s to start, a row 0.1 to 0.3 ms
CONVERSATIONS, INDEX = "conversations.jsonl", "conversations.safetensors"
SPLITS = ("train", "validation")


def build(folder: Path, job: Job, tokenizer: Any, train: Source, validation: Source | None) -> None:
    """Write a whole cache entry into `folder`. Raises DataError with every row that is wrong."""
    from safetensors.numpy import save_file

    with open(folder / CONVERSATIONS, "wb") as file:
        starts = [0]
        control = special_token_pattern(tokenizer)
        reading = read_source(train, job, file, starts, job.data.max_rows, control)
        held = read_source(validation, job, file, starts, None, control) if validation else None
    refuse_absent(job.data.columns or {}, [reading, *([held] if held else [])])
    if held:
        count = len(reading.row_ids)
        index = [np.arange(count), np.arange(count, len(starts) - 1)]
    else:
        fraction = job.data.validation if isinstance(job.data.validation, float) else 0.0
        index = list(_held_out(reading.row_ids, fraction, job.seed))
    all_starts = np.array(starts, dtype=np.int64)
    save_file({"starts": all_starts, **dict(zip(SPLITS, index, strict=True))}, folder / INDEX)

    files = [ConversationFile(folder / CONVERSATIONS, all_starts, part) for part in index]
    encoded = [_encode(part, tokenizer) for part in files]
    own = 1 if held else 2  # splits that are of the training source
    sources = [Checked(train.names(), reading, files[:own], encoded[:own])]
    sources += [Checked(validation.names(), held, files[own:], encoded[own:])] if held else []
    stop_on(sources, job)
    if job.data.on_long_row == "refuse":
        refuse_long(sources, job)

    figures: dict[str, dict[str, Any] | None] = {}
    for name, part, conversations in zip(SPLITS, encoded, files, strict=True):
        arrays, figures[name] = _split_rows(part, conversations, job)
        if arrays is not None:
            save_file(arrays, folder / f"{name}.safetensors")
    if figures["train"] is None:
        refuse_nothing_left(sources, job)
    summary = {
        "format": ", ".join(dict.fromkeys(shape.name for shape in reading.read_as.values())),
        "recognised_by": "; ".join(dict.fromkeys(shape.recognised_by for shape in reading.read_as.values())),
        "formats": _formats([source.reading for source in sources]),
        "rows_read": sum(source.reading.rows_read for source in sources),
        "bad_rows": sum(len(source.bad()) for source in sources),
        "sequence_length": job.sequence_length,
        "packing": job.data.packing,
        "on_long_row": job.data.on_long_row,
        "notes": _notes(sources, figures["train"], job.data)
        + _none_held_out(encoded[1].lengths, figures["validation"], job.sequence_length),
    }
    write_json(folder / "summary.json", summary | figures)


def stop_on_bad_rows(job: Job, sources: list[tuple[Source, int | None]]) -> None:
    """Raise DataError with what no tokenizer is needed to see of each source, up to its first so many rows."""
    no_token = re.compile(r"(?!)")
    with open(os.devnull, "wb") as nowhere:
        readings = [read_source(source, job, nowhere, [0], most, no_token) for source, most in sources]
    refuse_absent(job.data.columns or {}, readings)
    stop_on([Checked(source.names(), each) for (source, _), each in zip(sources, readings, strict=True)], job)


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


@cache
def _encoder(tokenizer: Path) -> Encoder:
    return Encoder(pickle.loads(tokenizer.read_bytes()))


def _encode_in_worker(tokenizer: Path, conversations: ConversationFile) -> Encoded:
    return _encoder(tokenizer).encode(conversations[:])


def _encode(conversations: ConversationFile, tokenizer: Any) -> Encoded:
    pieces = [conversations.piece(start, start + CHUNK) for start in range(0, len(conversations), CHUNK)]
    processes = min(usable(), 16)
    with progress("tokenising", len(conversations)) as advance:
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
    if job.objective == "sft" and job.data.on_long_row in ("cut", "split"):
        source, begins, sizes, long = fit_documents(
            encoded.lengths, encoded.trained, job.sequence_length, job.data.on_long_row
        )
    else:
        source, begins, sizes, long = fit_whole(encoded.lengths, job.sequence_length)
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


def _formats(readings: list[Reading]) -> list[dict[str, Any]]:
    """What files are read as: each shape with the fields that gave it away, its files, and the rows of these."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for reading in readings:
        for file, shape in reading.read_as.items():
            files = found.setdefault((shape.name, shape.recognised_by), {})
            files[file] = files.get(file, 0) + reading.rows_of[file]
    return [
        {"format": name, "recognised_by": fields, "files": list(files), "rows_read": sum(files.values())}
        for (name, fields), files in found.items()
    ]


def _none_held_out(lengths: np.ndarray, figures: dict[str, Any] | None, sequence_length: int) -> list[str]:
    """What is to be known where there were held-out rows, and none of them is left; figures: of that split."""
    if figures is not None or not len(lengths):
        return []
    which = "the only held-out row is" if len(lengths) == 1 else f"all {len(lengths):,} held-out rows are"
    return [
        f"{which} left out, so no held-out loss is taken: the shortest has {lengths.min():,} tokens, "
        f"sequence_length is {sequence_length:,}"
    ]


def _notes(sources: list[Checked], figures: dict[str, Any], data: DataConfig) -> list[str]:
    """What else is to be known of the rows; figures: of the training split."""
    notes = []
    reading, held = sources[0].reading, sources[1].reading if len(sources) > 1 else None
    if isinstance(data.validation, float) and not len(sources[0].files[-1]):
        notes.append(f"data.validation={data.validation:g} holds nothing out: there is no second row that differs")
    if faults := [fault for source in sources for fault in source.bad()]:
        notes.append(f"bad rows skipped: {len(faults):,}, the first {faults[0].origin}: {faults[0].reason}")
    if held:
        known = set(reading.row_ids)
        shared = sum(row_id in known for row_id in held.row_ids)
        if shared:
            notes.append(f"{shared:,} of {len(held.row_ids):,} validation rows also stand in the training data")
    repeated = len(reading.row_ids) - len(set(reading.row_ids))
    if repeated:
        names = sources[0].names
        again = listed([name for name in dict.fromkeys(names) if names.count(name) > 1])
        also = f", those of {again} among them, which data.path lists more than once" if again else ""
        notes.append(f"{repeated:,} {'rows repeat' if repeated > 1 else 'row repeats'} another row word for word{also}")
    if unread := sum(reading.unread.values(), Counter()):
        rows = [f"{name} ({count:,} {'rows' if count > 1 else 'row'})" for name, count in unread.items()]
        notes.append(f"nothing is read from {', '.join(rows)}")
    if count := reading.unfilled:
        verb = "rows hold" if count > 1 else "row holds"
        notes.append(f"{count:,} {verb} fields like {{{{name}}}}, trained on as they stand")
    if reading.control:
        (place, token), count = reading.control[0], len(reading.control)
        notes.append(
            f"{count:,} {'rows hold' if count > 1 else 'row holds'} a control token of the model in its own text, "
            f"which the model reads as one (first {place}: {token})"
        )
    if data.max_rows is None and (empty := [name for name in sources[0].names if not reading.rows_of[name]]):
        notes.append(f"no rows in {listed(empty)}")
    if lacking := [kind for kind in ("desirable", "undesirable") if figures.get(kind) == 0]:
        notes.append(
            f"no answer to train on is {lacking[0]}: kto tells the two kinds apart, so add rows with the other label"
        )
    return notes
