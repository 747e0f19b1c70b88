"""What is wrong with the rows of each source, and what would help, once one or both passes have read them."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.data.checks import Fault, SourceFaults, fault_report, listed
from loadmaster.data.formats import RowError, recognise_format
from loadmaster.data.preference import LABEL_FIELDS, unfit
from loadmaster.data.tokens import Encoded
from loadmaster.errors import DataError


@dataclass
class Reading:
    """The first pass over one source."""

    format: str = ""
    recognised_by: str = ""
    recognised_in: str = ""  # the origin of that row
    rows_read: int = 0
    bad: list[Fault] = field(default_factory=list)
    first_bad: dict[str, Any] = field(default_factory=dict)  # file -> the value of the first of them
    fields: set[str] = field(default_factory=set)  # that any row has, by its own names
    rows_of: Counter[str] = field(default_factory=Counter)  # file -> rows read
    row_ids: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # fields of the first row that are not taken up
    unfilled: int = 0  # rows with a {{field}} that nobody filled in
    control: list[tuple[str, str]] = field(default_factory=list)
    """(place, token) of rows whose own text holds one of the tokenizer's control tokens."""


@dataclass(frozen=True)
class Checked:
    """Both passes over one source."""

    names: list[str]
    reading: Reading
    encoded: list[Encoded]

    def bad(self) -> list[Fault]:
        return self.reading.bad + [fault for part in self.encoded for fault in part.refused]

    def wrong(self) -> list[Fault]:
        return [fault for part in self.encoded for fault in part.wrong]

    def faults(self, job: Job) -> list[SourceFaults]:
        """What stops the run, with what all rows of a file have in common apart from the rest."""
        faults = self.wrong() + ([] if job.data.on_bad_row == "skip" else self.bad())
        sources = SourceFaults(self.names, self.reading.rows_read, faults).apart(self.reading.rows_of)
        return [self._mended(each, job) if each.alike and each.names != self.names else each for each in sources]

    def _mended(self, files: SourceFaults, job: Job) -> SourceFaults:
        """With what would help with files of which no row can be used, where other files can be."""
        first, names = files.faults[0], listed(files.names)
        if first.remedy or first.rendering:
            return files
        it, its = ("it", "its") if len(files.names) == 1 else ("them", "their")
        remedy = f"mend {names}, or leave {it} out"
        with suppress(RowError):
            if recognise_format(self.reading.first_bad.get(files.names[0]), job.objective)[0] != self.reading.format:
                remedy = f"a job reads one format, which is {self.reading.format} here: write {names} so, "
                remedy += f"or train on {it} in a job of {its} own"
        return replace(files, faults=[replace(fault, remedy=remedy) for fault in files.faults])


def stop_on(checked: list[Checked], job: Job) -> None:
    """Raise DataError with all rows that stop the run."""
    is_skipped = job.data.on_bad_row == "skip"
    sources = [source for each in checked for source in each.faults(job)]
    if not any(source.faults for source in sources):
        return
    skipped = sum(len(each.bad()) for each in checked) if is_skipped else 0
    besides = f"\n    (bad rows skipped besides: {skipped:,})" if skipped else ""
    raise DataError(fault_report(sources, _hint(sources, any(each.wrong() for each in checked))) + besides)


def _hint(sources: list[SourceFaults], has_wrong: bool) -> str:
    """What to do about the rows that stop the run; to leave them out is no help where none would remain."""
    hints = [source.faults[0].remedy for source in sources if source.alike and source.faults[0].remedy]
    if has_wrong:
        hints.append("do as the lines say; data.on_bad_row=skip leaves out bad rows, never a wrong rendering")
    elif any(source.faults and not source.alike and len(source.faults) < source.rows_read for source in sources):
        hints.append("mend these rows, or leave them out with data.on_bad_row=skip")
    return "; ".join(dict.fromkeys(hints)) or "mend these rows: without them none is left"


def other_shape(row: Any, reading: Reading, objective: str) -> str:
    """What to add to the fault of a row that is of another shape than the row that all are read as; else nothing."""
    with suppress(RowError):
        shape, fields = recognise_format(row, objective)
        if reading.recognised_by and shape != reading.format and not unfit(shape, objective):
            first = f"that of {reading.recognised_in} is {reading.format} ({reading.recognised_by})"
            return f"; its shape is {shape} ({fields}), {first}, and all rows are to be of one"
    return ""


def other_format(row: Any, job: Job) -> str | None:
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
