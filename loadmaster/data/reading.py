"""The first pass: the rows of one source, read as conversations, and what is wrong with those that are none."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, BinaryIO

from loadmaster.config.schema import Job
from loadmaster.config.shipped import resolve_path
from loadmaster.data.faults import Fault, SourceFaults
from loadmaster.data.formats import (
    Conversation,
    RowError,
    fits_objective,
    recognise_format,
    refuse_unread,
    renamed,
    to_conversation,
    unread_fields,
)
from loadmaster.data.preference import LABEL_FIELDS, unfit
from loadmaster.data.progress import progress
from loadmaster.data.sources import RawRow, Source, open_source
from loadmaster.errors import DataError

FIRST_ROWS = 100
"""Among which one is looked for that can be read."""
UNFILLED = re.compile(rb"\{\{ ?\w+ ?\}\}")


@dataclass(frozen=True)
class Shape:
    """What the rows of a file are read as; by which fields of which of them, where data.format does not say it."""

    name: str
    recognised_by: str = ""
    recognised_in: str = ""


@dataclass
class Reading:
    """The first pass over one source."""

    shapes: dict[str, Shape] = field(default_factory=dict)  # file -> of its rows
    rows_read: int = 0
    bad: list[Fault] = field(default_factory=list)
    first_bad: dict[str, Any] = field(default_factory=dict)  # file -> the value of the first of them
    fields: set[str] = field(default_factory=set)  # that any row has, by its own names
    rows_of: Counter[str] = field(default_factory=Counter)  # file -> rows read
    row_ids: list[str] = field(default_factory=list)
    unread: dict[str, Counter[str]] = field(default_factory=dict)
    """File -> fields whose words are not taken up, with the number of its rows that have such words."""
    unfilled: int = 0  # rows with a {{field}} that nobody filled in
    control: list[tuple[str, str]] = field(default_factory=list)
    """(place, token) of rows whose own text holds one of the tokenizer's control tokens."""

    @property
    def read_as(self) -> dict[str, Shape]:
        """The shape of each file of which a row could be read."""
        return {file: self.shapes[file] for file in self.unread}


def read_source(
    source: Source, job: Job, file: BinaryIO, starts: list[int], max_rows: int | None, control: re.Pattern[str]
) -> Reading:
    """Append the conversations of `source` to `file`, and their byte offsets to `starts`."""
    reading = Reading()
    columns = job.data.columns or {}
    with progress("reading rows", None) as advance:
        for raw in source.rows():
            if max_rows is not None and reading.rows_read >= max_rows:
                break
            file_name = _file_of(raw)
            reading.rows_read += 1
            reading.rows_of[file_name] += 1
            advance(1)
            if columns and isinstance(raw.value, dict):
                reading.fields |= raw.value.keys()
                raw = replace(raw, value=renamed(raw.value, columns))
            try:
                line = _conversation(raw, file_name, reading, job).to_json().encode() + b"\n"
            except RowError as error:
                reading.first_bad.setdefault(file_name, raw.value)
                reading.bad.append(Fault(raw.origin, f"{error}{_own_names(str(error), columns)}", remedy=error.remedy))
                continue
            starts.append(starts[-1] + file.write(line))
            reading.unfilled += UNFILLED.search(line) is not None
            if found := control.search(line.decode()):
                reading.control.append((raw.origin, found.group()))
    if not reading.rows_read:
        raise DataError(f"the data has no rows: {', '.join(source.names())}")
    if job.data.format != "auto" and SourceFaults(source.names(), reading.rows_read, reading.bad).alike:
        remedy = _other_format(next(iter(reading.first_bad.values())), job)
        reading.bad = [replace(fault, remedy=remedy or fault.remedy) for fault in reading.bad]
    return reading


def first_conversation(job: Job) -> Conversation | None:
    """The first training row that can be read, from files that are here; None where there is none."""
    if not all(os.path.exists(resolve_path(path)) for path in job.data.paths):
        return None
    reading = Reading()
    with suppress(DataError, OSError):
        for raw in islice(open_source(job.data.paths).rows(), FIRST_ROWS):
            if job.data.columns and isinstance(raw.value, dict):
                raw = replace(raw, value=renamed(raw.value, job.data.columns))
            with suppress(RowError):
                return _conversation(raw, _file_of(raw), reading, job)
    return None


def _file_of(raw: RawRow) -> str:
    return raw.origin.rpartition(":")[0]


def _conversation(raw: RawRow, file: str, reading: Reading, job: Job) -> Conversation:
    if raw.error is not None:
        raise RowError(raw.error, raw.remedy)
    if file not in reading.shapes:
        reading.shapes[file] = _shape_of(raw, job)
    shape = reading.shapes[file]
    fits_objective(raw.value, shape.name, shape.recognised_by, job.objective)
    _goes_with_others(shape, reading)
    if job.data.columns and file not in reading.unread and isinstance(raw.value, dict):
        known = f"{shape.recognised_by} in {raw.origin}" if shape.recognised_by else ""
        refuse_unread(raw.value, shape.name, job.data.columns, known)
    try:
        conversation = to_conversation(raw.value, shape.name, raw.origin, job.data.system, job.data.tools)
    except RowError as error:
        own = _other_shape(raw.value, shape, job.objective)
        first = f"that of {shape.recognised_in} is {shape.name} ({shape.recognised_by})"
        told = own and shape.recognised_by
        said = f"; its shape is {own}, {first}, and all rows of a file are to be of one" if told else ""
        raise RowError(f"{error}{said}", None if own else error.remedy) from None
    reading.unread.setdefault(file, Counter()).update(unread_fields(raw.value, conversation))
    reading.row_ids.append(conversation.row_id)
    return conversation


def _shape_of(raw: RawRow, job: Job) -> Shape:
    """What a file is read as, by the first of its rows that can be; raises RowError for one that is of no shape."""
    if job.data.format != "auto":
        return Shape(job.data.format)
    return Shape(*recognise_format(raw.value, job.objective), raw.origin)


def _own_names(reason: str, columns: Mapping[str, str]) -> str:
    """What the fields in a fault are called in the rows themselves, where data.columns renames them; else nothing."""
    words = re.findall(r"\w+", reason)
    named = [f"{ours} is {theirs}" for ours, theirs in columns.items() if ours in words and ours != theirs]
    return f"; by data.columns {', '.join(named)}" if named else ""


def _goes_with_others(shape: Shape, reading: Reading) -> None:
    """Raise RowError for pairs beside single answers, of which kto compares one kind or the other."""
    first = next(iter(reading.read_as.values()), shape)
    if shape.name != first.name and "unpaired" in (shape.name, first.name):
        reason = f"is {shape.name}, and {first.recognised_in} is {first.name}: a job trains on one of the two"
        raise RowError(reason, "write a pair as two rows with a label each, or train on the two in jobs of their own")


def _other_shape(row: Any, read_as: Shape, objective: str) -> str:
    """The shape of a row that is of another one than it is read as, with what gave it away; else nothing."""
    with suppress(RowError):
        shape, fields = recognise_format(row, objective)
        if shape != read_as.name and not unfit(shape, objective):
            return f"{shape} ({fields})"
    return ""


def _other_format(row: Any, job: Job) -> str | None:
    """The remedy where a row is not of the format that was given, and of another one."""
    try:
        other, fields = recognise_format(row, job.objective)
        if other == "unpaired" and job.objective == "sft":  # a chat with a label is one without it, if that is said
            chat, _ = recognise_format({name: row[name] for name in row if name not in LABEL_FIELDS})
            is_chat = chat in ("messages", "sharegpt", "alpaca") and chat != job.data.format
            return f"data.format={chat} trains on these chats whatever their labels say" if is_chat else None
    except RowError as error:
        return error.remedy
    if other == job.data.format or unfit(other, job.objective):
        return None
    return f"data.format={other}, by the fields {fields}; or data.format=auto"


def refuse_absent(columns: Mapping[str, str], readings: Sequence[Reading]) -> None:
    """Raise DataError for a column that no row of any source has: one that may be empty may be absent from some."""
    fields = set[str]().union(*(reading.fields for reading in readings))
    absent = [theirs for ours, theirs in columns.items() if not {ours, theirs} & fields]
    if fields and absent:
        said = f"data.columns names {', '.join(absent)}, and no row has that"
        raise DataError(f"{said}\n    fix: name one of the rows' fields: {', '.join(sorted(fields))}")
