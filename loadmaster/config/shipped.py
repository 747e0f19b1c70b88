"""Where conf/, recipes/, data/ and launch/ are: at the top of a checkout, or inside an installed wheel."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from loadmaster.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
SCHEME = "shipped:"


def shipped_folder(name: str) -> Path:
    """Folder `conf`, `recipes`, `data` or `launch` that came with this loadmaster.

    A wheel carries them under loadmaster/_shipped (see setup.py); a checkout has them beside the package.
    """
    packaged = _PACKAGE / "_shipped" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def shipped_path(name: str) -> Path:
    """The shipped data file or folder `name` (`tickets/train.jsonl`)."""
    return shipped_folder("data") / name


def resolve_path(path: str) -> str:
    """`shipped:tickets/train.jsonl` as a real path, and what begins with ~; any other path or Hub id unchanged.

    The job keeps the short form, so that config.yaml and the job's hash are the same on every machine.
    """
    return str(shipped_path(path.removeprefix(SCHEME)) if path.startswith(SCHEME) else local_path(path))


def local_path(path: str) -> Path:
    """What a field that holds a path means here: a ~ in front is the home folder, where it is somebody's."""
    return Path(os.path.expanduser(path))


def display_path(path: Path) -> str:
    """`path` as a person in the current folder would type it."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


def refuse_gone_folder() -> None:
    """Raises ConfigError where paths are relative to nothing."""
    with suppress(OSError):
        if os.access(os.getcwd(), os.X_OK):
            return
    message, remedy = "is gone, or you may not look into it", "cd to one that is there"
    raise ConfigError.of("the current folder", None, message, remedy, "the shell")
