"""The cache of tokenised data: one folder for each hash of everything that shaped the tokens.

An entry is published whole or not at all, carries the checksum of each of its files, and is built
again when one of them does not match. Processes that want the same entry wait for the one building it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from loadmaster.data.formats import Conversation
from loadmaster.files import cache_root, read_json, sha256_file, write_json

SEAL = "entry.json"


def cache_folder() -> Path:
    """Where tokenised data is kept."""
    return cache_root() / "data"


def seal(folder: Path) -> None:
    """Record the checksums of a finished entry."""
    write_json(folder / SEAL, {path.name: sha256_file(path) for path in sorted(folder.iterdir())})


def is_whole(folder: Path) -> bool:
    """Whether an entry is there and every file is as it was sealed."""
    try:
        checksums = read_json(folder / SEAL)
        return all(sha256_file(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


class ConversationFile(Sequence[Conversation]):
    """Conversations of a JSONL file, read one at a time; `index` picks which, in which order.

    starts: byte offsets of the lines and the end of the file, int64 [lines + 1].
    """

    def __init__(self, path: Path, starts: np.ndarray, index: np.ndarray):
        self.path, self.starts, self.index = path, starts, index

    def piece(self, start: int, end: int) -> ConversationFile:
        """Those from `start` to `end`, with the offsets of their lines and not of all: it is sent to a process."""
        index = self.index[start:end]
        first, last = index.min(), index.max()
        return ConversationFile(self.path, self.starts[first : last + 2], index - first)

    def __len__(self) -> int:
        return len(self.index)

    @overload
    def __getitem__(self, item: int) -> Conversation: ...
    @overload
    def __getitem__(self, item: slice) -> list[Conversation]: ...
    def __getitem__(self, item: Any) -> Any:
        picked = self.index[item]
        lines = np.atleast_1d(picked).tolist()
        found = []
        with open(self.path, "rb") as file:
            for line in lines:
                file.seek(int(self.starts[line]))
                found.append(Conversation.from_json(file.read(int(self.starts[line + 1] - self.starts[line]))))
        return found if isinstance(item, slice) else found[0]

    def __iter__(self) -> Iterator[Conversation]:
        for start in range(0, len(self), 256):
            yield from self[start : start + 256]
