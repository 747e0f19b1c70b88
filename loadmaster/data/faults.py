"""Rows that must not be trained on, and how they are told of: together, and what all rows of a file have once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from loadmaster.data.checks import TRAINED_CLOSE, TRAINED_OPEN
from loadmaster.words import counted

LISTED = 20  # faults by name, and rows by name of one fault
EXAMPLES = 3  # rows by name of a fault that all rows have


@dataclass(frozen=True)
class Fault:
    """A row that must not be trained on: where it stands, why, for a wrong mask its rendering, and what would help."""

    origin: str
    reason: str
    rendering: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class SourceFaults:
    """The faults of one source, the files that it reads, and how many rows these gave."""

    names: list[str]
    rows_read: int
    faults: list[Fault]

    @property
    def alike(self) -> bool:
        """Whether all rows have the same fault, which is then the file's or the job's and no row's."""
        return len(self.faults) == self.rows_read and len({fault.reason for fault in self.faults}) == 1

    def apart(self, rows_of: Mapping[str, int]) -> list[SourceFaults]:
        """The files whose rows all have one fault, by that fault, and the rest. rows_of: how many rows a file gave."""
        if self.alike:
            return [self]
        of_file: dict[str, list[Fault]] = {}
        for fault in self.faults:
            of_file.setdefault(_place(fault)[0], []).append(fault)
        files = [SourceFaults([name], rows_of[name], faults) for name, faults in of_file.items()]
        whole: dict[str, SourceFaults] = {}
        for file in files:
            if file.alike and (file.rows_read > 1 or file.faults[0].remedy):
                reason = file.faults[0].reason
                whole[reason] = whole[reason].with_those_of(file) if reason in whole else file
        told = {name for group in whole.values() for name in group.names}
        rest = [fault for fault in self.faults if _place(fault)[0] not in told]
        names = [name for name in self.names if name not in told]
        return [*whole.values(), SourceFaults(names, self.rows_read - sum(rows_of[name] for name in told), rest)]

    def with_those_of(self, other: SourceFaults) -> SourceFaults:
        return SourceFaults(self.names + other.names, self.rows_read + other.rows_read, self.faults + other.faults)


def fault_report(sources: Sequence[SourceFaults], hint: str) -> str:
    """All faults together, rows with the same fault in one line; the first rendering is shown in full."""
    faults = [fault for source in sources for fault in source.faults]
    lines = [f"{len(faults):,} of {counted(sum(source.rows_read for source in sources), 'row')} cannot be trained on:"]
    lines += [f"  {source.faults[0].reason} ({_all_of(source)})" for source in sources if source.alike]
    places: dict[str, list[str]] = {}
    for fault in sorted((f for source in sources if not source.alike for f in source.faults), key=_place):
        said = f"{fault.reason}; {fault.remedy}" if fault.remedy else fault.reason
        places.setdefault(said, []).append(fault.origin)
    for said, origins in islice(places.items(), LISTED):
        more = f" and {len(origins) - LISTED:,} more" if len(origins) > LISTED else ""
        lines.append(f"  {said} ({', '.join(origins[:LISTED])}{more})")
    if len(places) > LISTED:
        rest = sum(len(origins) for origins in islice(places.values(), LISTED, None))
        lines.append(f"  ... and {counted(rest, 'row')} more")
    shown = next((fault for fault in faults if fault.rendering is not None), None)
    if shown:
        rendering = shown.rendering if len(shown.rendering) <= 4000 else shown.rendering[:4000] + " ... (cut here)"
        indented = "\n".join(f"  | {line}" for line in rendering.splitlines())
        lines += [f"rendering of {shown.origin}, trained part between {TRAINED_OPEN} and {TRAINED_CLOSE}:", indented]
    return "\n".join([*lines, f"    fix: {hint}"])


def _all_of(source: SourceFaults) -> str:
    """Where a fault of all rows of a source stands: the files, and a few rows."""
    origins = list(dict.fromkeys(fault.origin for fault in sorted(source.faults, key=_place)))[:EXAMPLES]
    if source.rows_read == 1:
        return origins[0]
    return f"all {source.rows_read:,} rows of {listed(source.names)}, such as {', '.join(origins)}"


def listed(names: list[str]) -> str:
    """The first few files by name."""
    more = f" and {counted(len(names) - EXAMPLES, 'more file')}" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def _place(fault: Fault) -> tuple[str, int]:
    name, _, line = fault.origin.rpartition(":")
    return name, int(line)
