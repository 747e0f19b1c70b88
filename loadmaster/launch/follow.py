"""What a machine's log says: pure reading of the lines that launch/pod_bootstrap.py writes.

Marked lines carry JSON; the others are the job's own. The same line may come twice, after a broken connection,
and is taken once. The run directory's small files come as numbered parts with the hash of the whole, so a lost
line is noticed: then nothing is unpacked, and the files are still on the volume.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadmaster.launch.order import is_small_file
from loadmaster.launch.provider import LogLine

MARK = "::loadmaster "
MOST_BYTES = 16 << 20
"""LARGEST_TOTAL_BYTES of launch/pod_bootstrap.py."""


@dataclass
class Reader:
    """State of one log. take() the lines in order; `ended` is the last event, once there."""

    parts: dict[int, str] = field(default_factory=dict)
    armed: bool = False
    ended: dict[str, Any] | None = None
    newest: str | None = None
    """Time of the newest line: where to go on after a broken connection."""
    _seen: set[tuple[str, str]] = field(default_factory=set)

    def take(self, line: LogLine) -> dict[str, Any] | str | None:
        """An event, a line of the job, or None for what was seen before or is only kept."""
        self.newest = max(self.newest or "", line.at)
        if (line.id, line.text) in self._seen:
            return None
        self._seen.add((line.id, line.text))
        if not line.text.startswith(MARK):
            return line.text
        try:
            event = json.loads(line.text.removeprefix(MARK))
            kind = event["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return line.text
        if kind == "file":
            self.parts[event["part"]] = event["data"]
            return None
        if kind == "armed":
            self.armed = True
        if kind == "end":
            self.ended = event
        return event

    def files(self) -> bytes | None:
        """The tar.gz that came; None when a part is missing or damaged."""
        if self.ended is None or any(part not in self.parts for part in range(self.ended["parts"])):
            return None
        try:
            data = base64.b64decode("".join(self.parts[part] for part in range(self.ended["parts"])), validate=True)
        except ValueError:
            return None
        return data if hashlib.sha256(data).hexdigest() == self.ended["sha256"] else None


def unpack(data: bytes, folder: Path) -> list[str]:
    """Unpack into `folder` what was asked for, as much as a machine may hand back; names of these files.

    What else a machine sends (links, the launch's own records, files that lead out of the folder) is left out.
    """
    names, left = [], MOST_BYTES
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in archive:
            left -= entry.size
            if left < 0:
                break
            if entry.isfile() and is_small_file(entry.name):
                archive.extract(entry, folder, filter="data")
                names.append(entry.name)
    return names
