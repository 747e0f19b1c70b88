"""The checkpoints that a run has on disk: which is the newest whole one, and which may go."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadmaster import processors
from loadmaster.errors import TrainingFailed
from loadmaster.files import read_json, sha256_files
from loadmaster.training.world import World


@dataclass(frozen=True)
class Found:
    folder: Path
    state: dict[str, Any]


def newest_whole(folder: Path, job_hash: str, warn: Any, world: World | None = None) -> Found | None:
    """The newest checkpoint under `folder` whose files have their checksums; `warn` hears of the others."""
    return _first_whole(sorted(_steps(folder), reverse=True), job_hash, warn, world or World())


def best_whole(folder: Path, job_hash: str, warn: Any, world: World) -> Found | None:
    """That with the lowest evaluation loss; of equal ones the newest. None where none has such a loss."""
    losses = {path: _eval_loss(path) for _, path in _steps(folder)}
    known = [(loss, -_step(path), path) for path, loss in losses.items() if loss is not None]
    return _first_whole([(-step, path) for _, step, path in sorted(known)], job_hash, warn, world)


def _first_whole(in_order: list[tuple[int, Path]], job_hash: str, warn: Any, world: World) -> Found | None:
    """Each rank checks its share of the files; all agree, on the order that the lead sees."""
    for step, path in world.broadcast(in_order):
        state = None
        try:
            sums = read_json(path / "checksums.json")
            mine = sorted(sums)[world.rank :: world.size]
            threads = max(1, processors.usable() // world.local_size)
            digests = sha256_files([path / name for name in mine], threads)
            broken = [name for name, digest in zip(mine, digests, strict=True) if sums[name] != digest]
            state = read_json(path / "state.json")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            broken = [str(error)]
        broken = [name for part in world.gather(broken) for name in part]
        if broken or state is None:
            warn(f"checkpoint step-{step} is torn ({', '.join(broken)}) and passed over")
        elif state["job_hash"] != job_hash:
            job = path.parent.parent / "config.yaml"
            raise TrainingFailed(
                f"{path} was written by a job with other settings or other data, or by a version that reads the data "
                f"otherwise; give this one its own run_dir, or restore the settings in {job}"
            )
        else:
            return Found(path, state)
    return None


def clear(folder: Path) -> None:
    """Delete what a process that was killed left under `folder` half-written or half-deleted: it takes the disk that
    the next checkpoint needs."""
    for left in (*folder.glob(".step-*.partial"), *folder.glob(".step-*.deleted")):
        shutil.rmtree(left, ignore_errors=True)


def prune(newest: Path, keep_last: int, keep_best: int) -> None:
    """Delete all checkpoints but the `keep_last` up to `newest` and, of these steps, the `keep_best` with the lowest
    evaluation loss. One of a later step is torn, or the run would not have come here again.
    """
    found = sorted(_steps(newest.parent), reverse=True)
    written = [(step, path) for step, path in found if step <= _step(newest)]
    losses = {step: _eval_loss(path) for step, path in written}
    best = sorted((loss, -step) for step, loss in losses.items() if loss is not None)[:keep_best]
    keep = {step for step, _ in written[:keep_last]} | {-step for _, step in best}
    for step, path in found:
        if step not in keep:
            doomed = path.with_name(f".{path.name}.deleted")  # never a half-deleted folder under a valid name
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _eval_loss(path: Path) -> float | None:
    """Held-out loss of a checkpoint; None where there is none, or the checkpoint is torn."""
    try:
        return read_json(path / "state.json").get("eval_loss")
    except (OSError, ValueError, AttributeError):
        return None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else []
    return [(_step(path), path) for path in paths if re.fullmatch(r"step-\d+", path.name)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
