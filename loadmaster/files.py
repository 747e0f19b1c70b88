"""Files that are either whole or absent: atomic writes, published folders, checksums.

A run is killed at any moment, so nothing that a later stage reads may be half written. A file is
written beside its place, fsynced and renamed; a folder is filled under a temporary name and renamed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loadmaster import processors
from loadmaster.errors import LoadmasterError, NotAFile

DISK_REMEDY = "set run_dir to a folder that can be written, on a disk with room"

PARTIAL_SUFFIX = ".partial"
FINDER_FILE = ".DS_Store"
"""What macOS's Finder leaves in a folder that somebody looks into, and is nobody's content."""


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # not through a link that lies there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of a full disk, for one
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def storable(value: Any) -> Any:
    """Figures as JSON can hold them: NaN and infinity (of a diverged model, or a broken export) become null."""
    if isinstance(value, dict):
        return {key: storable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [storable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def regular(path: Path) -> Path:
    """`path`. Raises NotAFile where something else lies there: who opens a pipe waits for what may never be written."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise NotAFile(path)
    return path


def read_text(path: Path, errors: str = "strict") -> str:
    return regular(path).read_text(encoding="utf-8", errors=errors)


def read_json(path: Path) -> Any:
    """Raises OSError, and ValueError for what is no JSON."""
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def as_object(value: Any) -> dict[str, Any]:
    """What JSON held, where that is an object; else an empty one."""
    return value if isinstance(value, dict) else {}


LONGEST_HEADER = 100_000_000
"""Bytes; safetensors reads no longer one."""


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file of tensors is there and as long as its header says."""
    try:
        return torn_safetensors(path) is None
    except OSError:
        return False


def torn_safetensors(path: Path) -> str | None:
    """What is wrong with a file (8 bytes length, JSON header, tensors) that is not as long as its header says.

    Read without the library, which would map it. Raises OSError.
    """
    try:
        with open(regular(path), "rb") as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
            if 8 <= size < 8 + length:
                return "is cut off in its header; fetch it again"
            tensors = json.loads(file.read(length) if length <= LONGEST_HEADER else "")
        tensors.pop("__metadata__", None)
        wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "is no safetensors file"
    if size != wanted:
        return f"has {size:,} bytes and should have {wanted:,}; the copy was cut off, fetch it again"
    return None


def sha256_file(path: Path, ended: threading.Event | None = None) -> str:
    """ended: set by another thread, there is nobody left to tell."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(2**18))
    with open(regular(path), "rb", buffering=0) as file:
        while (size := file.readinto(piece)) and not (ended and ended.is_set()):
            digest.update(piece[:size])
    return digest.hexdigest()


def sha256_files(paths: list[Path], threads: int | None = None) -> list[str]:
    """Of several files at once, in their order: one takes about a second for each GB.

    threads: None: one for each processor that this process may keep busy.
    """
    ended = threading.Event()
    with ThreadPoolExecutor(threads or processors.usable()) as pool:
        try:
            return list(pool.map(lambda path: sha256_file(path, ended), paths))
        finally:  # a request to stop, or a file that is gone: the pool waits for its threads
            ended.set()


def sha256_of_model(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model's or an adapter's folder, by its name."""
    paths = model_files(folder)
    return dict(zip([path.name for path in paths], sha256_files(paths), strict=True))


def model_files(folder: Path) -> list[Path]:
    """Files that make a model or an adapter what it is, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))


def sha256_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_full_disk(error: BaseException) -> bool:
    """Whether an error is that of a disk, or of a quota, without room; native code raises it as errors of its own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def disk_error(error: BaseException) -> LoadmasterError | None:
    """What an error of a run's files means to who started it: a full or read-only disk, a folder that is a file.

    Of a connection, or a library's OSError that the system did not raise, only what it says itself. None for an error
    of something else.
    """
    if is_full_disk(error):
        of_output = isinstance(error, OSError) and error.filename is None  # write_bytes() gives names
        remedy = f"make room where the output goes to, or {DISK_REMEDY}" if of_output else DISK_REMEDY
        return LoadmasterError(f"{error}; {remedy}")
    if not isinstance(error, OSError):
        return None
    of_files = error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
    return LoadmasterError(f"{error}; {DISK_REMEDY}" if of_files else str(error) or type(error).__name__)


def cache_root() -> Path:
    """Folder of everything that can be made again: $LOADMASTER_CACHE, else ~/.cache/loadmaster."""
    return Path(os.environ.get("LOADMASTER_CACHE") or "~/.cache/loadmaster").expanduser().absolute()


def own_folder(folder: Path) -> bool:
    """Make a folder of files that are run as code, where there is none; whether nobody else can have put any there.

    Not behind a link; of root or of this user. What a private file of his has on that disk for an owner and a mode is
    the measure: a network volume may show one of each for all.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o750)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            private = os.fstat(file.fileno())
    except PermissionError:
        return False
    opened = found.st_mode & ~private.st_mode & stat.S_IWOTH
    return found.st_uid in (0, private.st_uid) and not opened


@contextmanager
def cached_in(folder: Path, what: str) -> Iterator[None]:
    """Say of a cache that it has no room, or is not to be written: Raises LoadmasterError with the variable to set."""
    try:
        yield
    except Exception as error:  # native code has errors of its own for a full disk
        name = getattr(error, "filename", None)
        there = isinstance(name, str) and (Path(name).is_relative_to(folder) or Path(name) in folder.parents)
        if not (is_full_disk(error) or there):
            raise
        why = "its disk is full" if is_full_disk(error) else (getattr(error, "strerror", None) or str(error)).lower()
        fix = "set LOADMASTER_CACHE to a folder that can be written, on a disk with room"
        raise LoadmasterError(f"{what} cannot be kept in {folder}: {why}\n    fix: {fix}") from error


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of a folder of the cache: other processes wait, say so, and then find what one has made."""
    with cached_in(folder.parent, what):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f"{folder.name}.lock"), "a", encoding="utf-8")  # noqa: SIM115  closed below
    with lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that makes {what} in {folder}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # what several make at once, none has whole
            why = f"files there cannot be locked ({os.strerror(error.errno).lower()})"
            fix = "set LOADMASTER_CACHE to a folder on a disk of this machine, or have its network's mounted with locks"
            raise LoadmasterError(f"{what} cannot be kept in {folder.parent}: {why}\n    fix: {fix}") from error
        yield


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `target` when the block ends without an error.

    Who may read its files is as the umask says, whatever wrote them. On an error the partial folder is removed and an
    earlier `target` stays as it was. The earlier target gives way only once the new one is complete and on disk: the
    two change places in one step where the system and the disk can do that (Linux, local disks), so there is a whole
    `target` at any moment; elsewhere a kill between two renames leaves the earlier one beside it, and the next call
    puts it back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{PARTIAL_SUFFIX}")
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        os.rename(previous, target)  # a kill between the two renames below
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        by_umask = partial.stat().st_mode & 0o066
        for path in sorted(partial.rglob("*")):
            if path.is_file() and not path.is_symlink():
                mode = path.stat().st_mode
                if mode | by_umask != mode:  # safetensors' own is 0600, which others cannot read
                    path.chmod(mode | by_umask)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _fsync_folder(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    if not target.exists():
        os.rename(partial, target)
    elif not _exchanged(partial, target):
        os.rename(target, previous)
        os.rename(partial, target)
    _fsync_folder(target.parent)
    for left in (partial, previous):
        shutil.rmtree(left, ignore_errors=True)


def made_once(target: Path, what: str, write: Callable[[Path], None]) -> Path:
    """`target`, a folder of the cache, which `write` fills if it is not there; other processes wait meanwhile."""
    if not target.is_dir():
        with exclusive(target, what):
            if not target.is_dir():  # another process may have made it meanwhile
                with cached_in(target.parent, what), publish_folder(target) as new:
                    write(new)
    return target


def _exchanged(a: Path, b: Path) -> bool:
    """Let two folders change names in one step (renameat2 with RENAME_EXCHANGE); False where that is not to be had."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return call(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
