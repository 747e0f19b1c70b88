"""A checkpoint is read into memory's cache of files while Python still imports what will load it.

What loads it takes pages of its files as tensors ask for them, so a disk or a network volume is asked for little at a
time, and not before libraries are imported and data are prepared. Here several threads read large pieces, in the order
of the files: Python's lock is let go of meanwhile. Nothing waits for it, and what it does not reach is read as before.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from loadmaster import processors
from loadmaster.errors import LoadmasterError
from loadmaster.host_memory import free_host_bytes
from loadmaster.model_files import shards

PIECE_BYTES = 16 * 2**20
THREADS = 4
"""At most; one processor is left to what imports meanwhile."""


def read_ahead(folder: Path) -> list[threading.Thread]:
    """Begin to read the weights in `folder`; the threads that do, none where memory would not hold them."""
    try:
        sizes = {file: file.stat().st_size for file in shards(folder)}
    except (OSError, ValueError, LoadmasterError):  # what loads it says so
        return []
    if sum(sizes.values()) > free_host_bytes() / 2:
        return []
    pieces: SimpleQueue[tuple[Path, int]] = SimpleQueue()
    for file, size in sizes.items():
        for offset in range(0, size, PIECE_BYTES):
            pieces.put((file, offset))
    readers = [
        threading.Thread(target=_read_all, args=(pieces,), name="read ahead", daemon=True)
        for _ in range(min(THREADS, max(1, processors.usable() - 1)))
    ]
    for reader in readers:
        reader.start()
    return readers


def _read_all(pieces: SimpleQueue[tuple[Path, int]]) -> None:
    buffer = bytearray(PIECE_BYTES)
    with suppress(Empty, OSError):
        while True:
            _read_piece(*pieces.get_nowait(), buffer)


def _read_piece(path: Path, offset: int, buffer: bytearray) -> int:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.readinto(buffer)
