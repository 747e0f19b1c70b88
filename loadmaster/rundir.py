"""The run directory: whose it is, which stages are done, and where each output lies.

A run belongs to one job on one set of data, its identity. Starting the same command again finds the
newest run of that identity and goes on there; stages.json remembers for each finished stage the hash of
what it was made from, so a stage runs again only when something it depends on has changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadmaster.config.shipped import local_path
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.files import (
    FINDER_FILE,
    PARTIAL_SUFFIX,
    as_object,
    is_full_disk,
    is_whole_safetensors,
    read_json,
    regular,
    sha256_file,
    sha256_json,
    write_json,
)

RECORD = "stages.json"
LAUNCH_RECORD = "launch.json"
"""In the folder of a launch: what came home of a run that lies elsewhere."""


class RunDir:
    """Paths and records of one run."""

    def __init__(self, path: Path, identity: str):
        self.path = path
        self.identity = identity
        self.made: list[Path] = []
        """Folders that were made for this run by this process, innermost first."""

    @classmethod
    def choose(
        cls, run_dir: str, recipe: str, identity: str, root: Path = Path("runs"),
        differing: Callable[[Path], list[str] | None] = lambda path: [],
    ) -> RunDir:
        """The run directory of a job: as given, else the newest of this identity, else a new one.

        One in which nothing was trained is any job's: settings change until a plan is as it should be. What a launch
        brought home says whose it is as a run does, and is none to go on in: its weights are where it ran.
        Raises ConfigError when the given directory is none, or belongs to another job; differing(path) says in what.
        """
        if run_dir != "auto":
            path = local_path(run_dir)
            owner = _identity(path)
            with _refusing(path, run_dir):
                filled = path.exists() and not all(_is_nothing(entry.name) for entry in path.iterdir())
            run = cls(path, identity)
            if run.is_damaged:
                if not any((path / "checkpoints").glob("step-*")) or differing(path) != []:
                    message = f"holds a run whose {RECORD} is damaged, so that nobody knows which job it belongs to"
                    raise _refused(run_dir, message, "give a new folder, or an empty one")
                return run  # a checkpoint of another job, or of other data, is refused by what it says itself
            if owner is None and filled:
                message = "is a folder with other things in it, which a run would overwrite"
                raise _refused(run_dir, message, "give a new folder, or an empty one")
            if owner not in (None, identity) and (cls(path, owner).begun or (path / "metrics.jsonl").exists()):
                found = differing(path)
                what = "other settings or other data" + (f" ({'; '.join(found)})" if found else "")
                remedy = f"give another run_dir, or the settings in {path / 'config.yaml'}"
                if found == []:
                    what = "these settings, whose files have changed since: the data, or model.chat_template"
                    remedy = "give another run_dir, or the files as they were"
                message = f"holds a run of a job with {what}; going on there would mix "
                raise _refused(run_dir, f"{message}the two", remedy)
            return run
        parent = root / recipe
        with _refusing(parent):
            known = sorted(parent.iterdir(), reverse=True) if os.path.isdir(parent) else []
        for path in known:
            if _identity(path) == identity and not (path / LAUNCH_RECORD).exists():
                return cls(path, identity)
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        path = parent / stamp
        number = 2
        while path.exists():
            path, number = parent / f"{stamp}-{number}", number + 1
        return cls(path, identity)

    @property
    def trained(self) -> Path | None:
        """Folder of the trained weights, adapter/ or model/, or None before training has ended."""
        return next((p for p in (self.path / "adapter", self.path / "model") if p.is_dir()), None)

    def holds_trained(self) -> bool:
        """Whether the trained weights are there, and none of their files was lost or cut short."""
        folder = self.trained
        if folder is None:
            return False
        is_adapter = folder.name == "adapter"
        config = object_in(folder / ("adapter_config.json" if is_adapter else "config.json"))
        index = folder / "model.safetensors.index.json"
        listed = set(as_object(object_in(index).get("weight_map")).values())
        files = {file.name for file in folder.glob("*.safetensors")} | listed
        whole = files and all(is_whole_safetensors(folder / name) for name in files)
        is_known = config.get("peft_type" if is_adapter else "model_type")
        return bool(is_known and whole and (listed or not index.exists()))

    @property
    def is_damaged(self) -> bool:
        """Whether a record is there that does not say whose run it is."""
        return (self.path / RECORD).is_file() and _identity(self.path) is None

    @property
    def begun(self) -> bool:
        """Whether anything was trained by the plan that is here."""
        return self.trained is not None or (self.path / "checkpoints").is_dir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises LoadmasterError when another one works in it, ConfigError where no files can be written there.
        """
        with _refusing(self.path):
            self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            (self.path / ".lock").touch()
        with open(self.path / ".lock", "a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LoadmasterError(
                    f"another process works in {self.path}; wait for it, or give this run its own run_dir"
                ) from None
            except OSError:  # a network's file system without locks
                pass
            yield

    def _refuse_links(self) -> None:
        """A log, a lock or figures written through a link would be another file's end; other files take its place."""
        for path in (self.path / ".lock", self.path / "metrics.jsonl", *sorted(self.path.glob("logs/*"))):
            is_link = path.is_symlink()
            if is_link or (path.exists() and not path.is_file() and not path.is_dir()):
                what = f"a symbolic link: a run would write into {os.readlink(path)}" if is_link else "no regular file"
                message = f"{path} is {what}"
                raise _refused(str(self.path), message, f"rm {path}, if it is not yours; or run_dir=FOLDER: a new one")

    def discard(self) -> bool:
        """Leave no folder of a run that came to nothing; False where this process did not make it."""
        if self.path not in self.made:
            return False
        shutil.rmtree(self.path)
        for folder in self.made[1:]:
            with suppress(OSError):  # another run began there meanwhile
                folder.rmdir()
        return True

    def is_done(self, stage: str, inputs: str) -> bool:
        return _stages(self.path).get(stage, {}).get("inputs") == inputs

    def mark_done(self, stage: str, inputs: str, seconds: float) -> None:
        stages = _stages(self.path)
        unfinished = self._unfinished()
        seconds = round(seconds + unfinished.pop(stage, 0.0), 3)
        stages[stage] = {"inputs": inputs, "seconds": seconds, "finished": datetime.now(UTC).isoformat()}
        self._write(stages, unfinished)

    def mark_unfinished(self, stage: str, seconds: float) -> None:
        """What a stage took that was stopped, or failed; it counts as that stage's when it is done, too."""
        unfinished = self._unfinished()
        unfinished[stage] = round(unfinished.get(stage, 0.0) + seconds, 3)
        self._write(_stages(self.path), unfinished)

    def _unfinished(self) -> dict[str, float]:
        found = as_object(_record(self.path).get("unfinished_seconds")) if _identity(self.path) == self.identity else {}
        return {stage: seconds for stage, seconds in found.items() if isinstance(seconds, int | float)}

    def forget(self, stage: str) -> None:
        """A stage is not done any more, whatever comes of doing it again."""
        stages = _stages(self.path)
        stages.pop(stage, None)
        self._write(stages)

    def claim(self) -> None:
        """Write the identity, so that the next start of the same job finds this run."""
        owner = _identity(self.path)
        if owner not in (None, self.identity):  # nothing was trained; the plan stage writes over the rest
            (self.path / "result.json").unlink(missing_ok=True)
        self._write(_stages(self.path) if owner == self.identity else {})

    def _write(self, stages: dict[str, Any], unfinished: dict[str, float] | None = None) -> None:
        record = {"identity": self.identity, "started_in": str(Path.cwd()), "stages": stages}
        if unfinished := self._unfinished() if unfinished is None else unfinished:
            record["unfinished_seconds"] = unfinished
        write_json(self.path / RECORD, record)

    def seconds_by_stage(self) -> dict[str, float]:
        """Of stages that are done, and what those took so far that are not."""
        return self._unfinished() | {stage: record.get("seconds", 0.0) for stage, record in _stages(self.path).items()}

    def mend_result(self) -> str | None:
        """Begin result.json anew where it cannot be read; a sentence that says what is lost by that."""
        path = self.path / "result.json"
        if not path.exists() or object_in(path):
            return None
        write_json(path, {"wall_seconds": self.seconds_by_stage()})
        return f"{path} could not be read and begins anew, without the figures of stages that are not done again"

    def result(self) -> dict[str, Any]:
        return object_in(self.path / "result.json")

    def update_result(self, **figures: Any) -> dict[str, Any]:
        result = {**self.result(), **figures}
        write_json(self.path / "result.json", result)
        return result


def is_at_work(path: Path) -> bool:
    """Whether a process holds this run now."""
    try:
        with open(regular(path / ".lock"), encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # never locked, or a network's file system without locks
        pass
    return False


def started_in(path: Path) -> Path:
    """Where the command of a run was started, which the relative paths of its job count from; else this folder."""
    folder = Path(str(_record(path).get("started_in", ".")))
    return folder if os.path.isdir(folder) and os.access(folder, os.X_OK) else Path.cwd()


def newest_in(folder: Path, launched: bool = True, holds: Sequence[str] = ()) -> Path | None:
    """The newest run where `folder` is one of runs, as runs/ and runs/smoke/ are; launched: what came home of a run
    elsewhere is one, too. holds: names of which it has one in it."""
    records = [*folder.glob(f"*/{RECORD}"), *folder.glob(f"*/*/{RECORD}")]
    if not launched:
        records = [path for path in records if not path.with_name(LAUNCH_RECORD).exists()]
    if holds:
        records = [path for path in records if any(path.with_name(name).exists() for name in holds)]
    return max(records, key=lambda path: (path.stat().st_mtime, path)).parent if records else None


def newest_meant(given: Path, *holds: str) -> Path | None:
    """Where what was given as a run is none: the newest in that folder, or of the recipe of that name."""
    folder = given if os.path.isdir(given) else Path("runs") / os.path.relpath(given).removeprefix("recipe=")
    return newest_in(folder, holds=holds) if os.path.isdir(folder) else None


def file_fingerprint(path: Path) -> str:
    """Hash of the contents of a file, or of all files of a folder with their names."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != FINDER_FILE)
    return sha256_json([[os.fspath(p.relative_to(path)), sha256_file(p)] for p in files])


def _refused(given: str, message: str, remedy: str) -> ConfigError:
    return ConfigError.of("run_dir", given, message, remedy)


@contextmanager
def _refusing(path: Path, given: str | None = None) -> Iterator[None]:
    """A folder in which no run can be is refused as the setting that names it; a disk without room is none."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise
        file = next((p for p in (path, *path.parents) if os.path.lexists(p) and not os.path.isdir(p)), None)
        why = (error.strerror or str(error)).lower()
        if error.errno in (errno.EEXIST, errno.ENOTDIR) and file is not None:
            why = f"{'it' if file == path else file} is not a folder"
        message = f"no run can be kept in {path}: {why}"
        raise _refused(given or str(path), message, "run_dir=FOLDER: a new one, where you may write") from error


def object_in(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return as_object(value)


def _record(path: Path) -> dict[str, Any]:
    return object_in(path / RECORD)


def _stages(path: Path) -> dict[str, dict[str, Any]]:
    return {stage: as_object(record) for stage, record in as_object(_record(path).get("stages")).items()}


def _is_nothing(name: str) -> bool:
    """Left of a process that was killed before it could say whose folder this is, or by who looked into it."""
    return name in (".lock", FINDER_FILE) or name.endswith(PARTIAL_SUFFIX)


def _identity(path: Path) -> str | None:
    return _record(path).get("identity")
