"""What stops the run, once one or both passes have read the rows, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from loadmaster.config.schema import Job
from loadmaster.data.cache import ConversationFile
from loadmaster.data.faults import Fault, SourceFaults, fault_report, listed
from loadmaster.data.formats import RowError, recognise_format
from loadmaster.data.preference import unfit
from loadmaster.data.reading import Reading
from loadmaster.data.tokens import REFUSED, Encoded
from loadmaster.errors import DataError


@dataclass(frozen=True)
class Checked:
    """Both passes over one source, or the first alone; of the second its conversations by split, and their tokens."""

    names: list[str]
    reading: Reading
    files: Sequence[ConversationFile] = ()
    encoded: Sequence[Encoded] = ()

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
        if first.rendering:
            return files
        remedy = first.remedy or f"mend {names}, or leave {'it' if len(files.names) == 1 else 'them'} out"
        with suppress(RowError):
            own, _ = recognise_format(self.reading.first_bad.get(files.names[0]), job.objective)
            found = unfit(own, job.objective)
            if found and first.remedy == found[1]:
                remedy = f"leave {names} out of this job, of objective={job.objective}; {first.remedy}"
            elif not found and not first.remedy and job.data.format not in ("auto", own):
                remedy = f"data.format=auto, which reads each file by its own fields: {names} as {own}"
        return replace(files, faults=[replace(fault, remedy=remedy) for fault in files.faults])


def stop_on(checked: list[Checked], job: Job) -> None:
    """Raise DataError with all rows that stop the run."""
    is_skipped = job.data.on_bad_row == "skip"
    sources = [source for each in checked for source in each.faults(job)]
    if not any(source.faults for source in sources):
        return
    skipped = sum(len(each.bad()) for each in checked) if is_skipped else 0
    besides = f"\n    (bad rows skipped besides: {skipped:,})" if skipped else ""
    reasons = [fault.reason for source in sources for fault in source.faults]
    hint = _hint(sources, any(each.wrong() for each in checked))
    if job.model.chat_template and any(reason.startswith(REFUSED) for reason in reasons):
        hint += f"; or mend model.chat_template={job.model.chat_template}"
    raise DataError(fault_report(sources, hint) + besides)


def _hint(sources: list[SourceFaults], has_wrong: bool) -> str:
    """What to do about the rows that stop the run; to leave them out is no help where none would remain."""
    hints = [source.faults[0].remedy for source in sources if source.alike and source.faults[0].remedy]
    if has_wrong:
        hints.append("do as the lines say; data.on_bad_row=skip leaves out bad rows, never a wrong rendering")
    elif any(source.faults and not source.alike and len(source.faults) < source.rows_read for source in sources):
        hints.append("mend these rows, or leave them out with data.on_bad_row=skip")
    return "; ".join(dict.fromkeys(hints)) or "mend these rows: without them none is left"


def refuse_long(sources: list[Checked], job: Job) -> None:
    """Raise DataError with all rows that are longer than sequence_length."""
    faults = []
    for source in sources:
        for conversations, part in zip(source.files, source.encoded, strict=True):
            for place in np.flatnonzero(part.lengths > job.sequence_length).tolist():
                origin = conversations[int(part.kept[place])].origin
                reason = f"has {part.lengths[place]:,} tokens, sequence_length is {job.sequence_length:,}"
                faults.append(Fault(origin, reason))
    if faults:
        other = "cut, split or drop" if job.objective == "sft" else "drop"
        hint = f"raise sequence_length, shorten these rows, or set data.on_long_row to {other}"
        names, rows_read = [name for source in sources for name in source.names], _rows_read(sources)
        raise DataError(fault_report([SourceFaults(names, rows_read, faults)], hint))


def refuse_nothing_left(sources: list[Checked], job: Job) -> NoReturn:
    """Raise DataError: no row of the first source, which is to be trained on, is good and short enough."""
    train = sources[0]
    bad = SourceFaults(train.names, train.reading.rows_read, train.bad())
    why = f": {bad.faults[0].reason} ({bad.faults[0].origin})" if bad.faults else ""
    remedy = bad.faults[0].remedy if bad.alike else None
    usual = "check data.path and data.format, or raise sequence_length if every row was too long"
    if len(lengths := train.encoded[0].lengths):
        judged = "its answers" if job.objective != "sft" else "something that is trained"
        each = "all of it" if job.data.on_long_row == "drop" else judged
        why += f"; the shortest of the rest has {lengths.min():,} tokens, and none has {each} within "
        why += f"sequence_length={job.sequence_length}"
        usual = f"sequence_length={lengths.min()}, or as much more as the rows need (loadmaster data counts them)"
    count = sum(len(source.bad()) for source in sources)
    said = f"no row is left to train on: {_rows_read(sources):,} read, {count:,} of them bad{why}"
    raise DataError(f"{said}\n    fix: {remedy or usual}")


def _rows_read(sources: list[Checked]) -> int:
    return sum(source.reading.rows_read for source in sources)
