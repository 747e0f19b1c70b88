"""Checkpoints that are whole or not there.

    checkpoints/step-120/
        weights.safetensors     what is trained, by parameter name
        optimizer.safetensors   moments and fp32 masters
        rng.safetensors         generators of torch
        state.json              step, data position, other generators, tokens seen, job hash, evaluation loss
        checksums.json          sha256 of the four, written last

A checkpoint is filled under a temporary name, fsynced and renamed. When it is read its checksums are
compared, so one that a full disk or a broken machine tore is passed over for the one before it.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loadmaster.errors import TrainingFailed
from loadmaster.files import publish_folder, read_json, sha256_file, write_json
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.rng import restore_rng, rng_state

FILES = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


@dataclass(frozen=True)
class Found:
    folder: Path
    state: dict[str, Any]


def save(
    folder: Path, trained: list[tuple[str, nn.Parameter]], optimizer: TrainingOptimizer, state: dict[str, Any]
) -> None:
    """Write a checkpoint at `folder`. `state` must be JSON; raises TrainingFailed when the disk is full."""
    tensors, scalars = optimizer.state()
    rng_tensors, rng_json = rng_state()
    try:
        with publish_folder(folder) as partial:
            save_file(_on_host(dict(trained)), partial / "weights.safetensors")
            save_file(_on_host(tensors), partial / "optimizer.safetensors")
            save_file(rng_tensors, partial / "rng.safetensors")
            write_json(partial / "state.json", {**state, "optimizer_scalars": scalars, "rng": rng_json})
            write_json(partial / "checksums.json", {name: sha256_file(partial / name) for name in FILES})
    except Exception as error:  # safetensors raises its own error type for a failed write
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            free = shutil.disk_usage(folder.parent).free / 2**30
            raise TrainingFailed(
                f"the checkpoint {folder} could not be written: {error} ({free:.2f} GiB free there). "
                "Earlier checkpoints are whole; free some space or set run_dir to another disk, "
                "and start again to resume"
            ) from error
        raise


def load(folder: Path, trained: list[tuple[str, nn.Parameter]], optimizer: TrainingOptimizer) -> dict[str, Any]:
    """Put a whole checkpoint back into weights, optimizer and generators; return its state."""
    weights = load_file(folder / "weights.safetensors")
    if set(weights) != {name for name, _ in trained}:
        raise TrainingFailed(f"the checkpoint {folder} holds other weights than this job trains; give another run_dir")
    for name, parameter in trained:
        parameter.data.copy_(weights[name])
    state = read_json(folder / "state.json")
    optimizer.load_state(load_file(folder / "optimizer.safetensors"), state["optimizer_scalars"])
    restore_rng(load_file(folder / "rng.safetensors"), state["rng"])
    return state


def newest_whole(folder: Path, job_hash: str, warn: Any) -> Found | None:
    """The newest checkpoint under `folder` whose files have their checksums; `warn` hears of the others."""
    for step, path in sorted(_steps(folder), reverse=True):
        try:
            wanted = read_json(path / "checksums.json")
            broken = [name for name in FILES if wanted.get(name) != sha256_file(path / name)]
            state = None if broken else read_json(path / "state.json")
        except (OSError, ValueError, AttributeError) as error:
            broken, state = [str(error)], None
        if state is None:
            warn(f"checkpoint step-{step} is torn ({', '.join(broken)}) and passed over")
        elif state["job_hash"] != job_hash:
            raise TrainingFailed(
                f"{path} was written by a job with other settings; give this one its own run_dir, "
                f"or restore the settings in {folder.parent / 'config.yaml'}"
            )
        else:
            return Found(path, state)
    return None


def prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest `keep_last` and the `keep_best` with the lowest evaluation loss."""
    found = sorted(_steps(folder), reverse=True)
    losses = {step: _eval_loss(path) for step, path in found}
    best = sorted((loss, -step) for step, loss in losses.items() if loss is not None)[:keep_best]
    keep = {step for step, _ in found[:keep_last]} | {-step for _, step in best}
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
    return [(int(match[1]), path) for path in paths if (match := re.fullmatch(r"step-(\d+)", path.name))]


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
