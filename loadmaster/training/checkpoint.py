"""Checkpoints that are whole or not there, and that any number of processes can go on from.

    checkpoints/step-120/
        tensors/shard-00001-....safetensors   weights, moments and fp32 masters by parameter name; a file of each rank,
                                              with the place of each piece in its whole (torch.distributed.checkpoint)
        rng-0.safetensors, rng-0.json         random generators of each rank
        state.json                            step, data position, tokens seen, job hash, evaluation loss
        checksums.json                        sha256 of all others, written last

Nothing in it says how it was spread when it was written: it is read by name and slice, by one process or by eight,
whole or sharded. It is filled under a temporary name, fsynced and renamed by the lead after every rank has written.
When it is read its checksums are compared, so one that a full disk or a broken machine tore is passed over.

The loop waits only for a copy of the tensors to the host; the writing is done by a thread behind it.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loadmaster.errors import TrainingFailed
from loadmaster.files import publish_folder, read_json, sha256_file, write_json
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed
from loadmaster.training.rng import restore_rng, rng_state, seed_everything
from loadmaster.training.world import World

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of a world of one, at every save

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Found:
    folder: Path
    state: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, behind the loop's back."""

    def __init__(self, world: World, placed: Placed):
        self.world, self.placed = world, placed
        # Its own group: the writing thread's collectives must not get between the loop's.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.stall_s = 0.0
        """Seconds that the loop waited for the last save."""

    def save(
        self,
        folder: Path,
        trained: Named,
        optimizer: TrainingOptimizer,
        state: dict[str, Any],
        keep: tuple | None = None,
    ) -> None:
        """Copy everything and return; `folder` appears when it is whole. `state` must be JSON.

        keep: (newest, best) to keep of its neighbours. Raises TrainingFailed for the save before, if that failed.
        """
        began = time.perf_counter()
        self.wait()
        tensors, steps, scalars = _collect(trained, optimizer, self.placed)
        generators, generators_json = rng_state()
        record = {**state, "world_size": self.world.size}
        self.stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write,
            args=(folder, tensors, {"steps": steps, "scalars": scalars}, generators, generators_json, record, keep),
            name="checkpoint",
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is there. Raises TrainingFailed when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(
        self,
        folder: Path,
        tensors: dict,
        optimizer: dict,
        generators: dict,
        generators_json: dict,
        state: dict,
        keep: Any,
    ) -> None:
        try:
            self._write_all(folder, tensors, optimizer, generators, generators_json, state)
            if keep and self.world.lead:
                prune(folder.parent, *keep)
        except Exception as error:  # raised again by the loop, in wait
            self._error = _failure(folder, error)

    def _write_all(
        self, folder: Path, tensors: dict, optimizer: dict, generators: dict, generators_json: dict, state: dict
    ) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        with publish_folder(folder) if self.world.lead else nullcontext():
            self._barrier()  # the lead has made the folder
            mine = [f"rng-{self.world.rank}.safetensors", f"rng-{self.world.rank}.json"]
            save_file(generators, partial / mine[0])
            write_json(partial / mine[1], generators_json)
            self._write_tensors(partial / "tensors", tensors)
            start = f"shard-{self.world.rank + 1:05d}-"
            written = sorted((partial / "tensors").glob(f"{start}*"))
            names = [*mine, *(f"tensors/{path.name}" for path in written)]
            reports = self._gather(({name: sha256_file(partial / name) for name in names}, optimizer))
            if self.world.lead:
                merged = {kind: {k: v for _, part in reports for k, v in part[kind].items()} for kind in optimizer}
                write_json(partial / "state.json", {**state, "optimizer": merged})
                sums = {name: digest for files, _ in reports for name, digest in files.items()}
                sums["state.json"] = sha256_file(partial / "state.json")
                write_json(partial / "checksums.json", sums)
        self._barrier()  # it has its name

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self.world.size == 1)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _barrier(self) -> None:
        self._gather(None)

    def load(self, folder: Path, trained: Named, optimizer: TrainingOptimizer) -> dict[str, Any]:
        """Put a whole checkpoint back into weights, optimizer and generators; return its state."""
        state = read_json(folder / "state.json")
        reader = dcp.HuggingFaceStorageReader(str(folder / "tensors"))
        stored = reader.read_metadata().state_dict_metadata
        names = {name for name, _ in trained}
        if {key.removeprefix("weights/") for key in stored if key.startswith("weights/")} != names:
            raise TrainingFailed(
                f"the checkpoint {folder} holds other weights than this job trains; give another run_dir"
            )
        placed, wanted, of = self.placed, {}, {}
        for name, parameter in trained:
            if not placed.part(parameter).numel():
                continue
            wanted[f"weights/{name}"] = placed.empty(parameter, parameter.dtype)
            for key, entry in stored.items():
                if key.startswith(f"optimizer/{name}/") and tuple(entry.size) == tuple(placed.shape(parameter)):
                    wanted[key] = placed.empty(parameter, entry.properties.dtype)
                    of[key] = parameter
        opaque = f"opaque/{placed.shard_name}/"
        for key, entry in stored.items():
            if key.startswith(opaque):
                wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        others = {key.split("/")[1] for key in stored if key.startswith("opaque/")} - {placed.shard_name}
        if others and not any(key.startswith(opaque) for key in stored):
            raise TrainingFailed(
                f"the optimizer states in {folder} are in blocks of another layout ({', '.join(sorted(others)[:2])}): "
                f"this optimizer goes on only with as many shards as wrote them ({state['world_size']} processes)"
            )
        dcp.load(wanted, storage_reader=reader, process_group=self._group, no_dist=self.world.size == 1)
        with torch.no_grad():
            for name, parameter in trained:
                if f"weights/{name}" in wanted:
                    placed.part(parameter).copy_(placed.filled(parameter, wanted.pop(f"weights/{name}")))
        tensors = {
            key.removeprefix(opaque).removeprefix("optimizer/"): placed.filled(of[key], value) if key in of else value
            for key, value in wanted.items()
        }
        tensors |= {key: torch.tensor(value) for key, value in state["optimizer"]["steps"].items()}
        optimizer.load_state(tensors, state["optimizer"]["scalars"])
        self._restore_generators(folder, state)
        return state

    def _restore_generators(self, folder: Path, state: dict[str, Any]) -> None:
        tensors = folder / f"rng-{self.world.rank}.safetensors"
        if tensors.is_file():
            restore_rng(load_file(tensors), read_json(folder / f"rng-{self.world.rank}.json"))
        else:  # a rank that was not there: a stream of its own
            seed_everything(state["step"] * 100_003 + self.world.rank)


def _collect(trained: Named, optimizer: TrainingOptimizer, placed: Placed) -> tuple[dict, dict, dict]:
    """(tensors on the host by key, step counts, other scalars) of weights and optimizer; all ranks call it."""
    parts = {name: placed.part(p) for name, p in trained}
    tensors = {f"weights/{name}": placed.copy(p, parts[name]) for name, p in trained if parts[name].numel()}
    parameters = dict(trained)
    states, scalars = optimizer.state()
    steps, opaque = {}, {}
    for path, value in states.items():
        name, _ = path.rsplit("/", 1)
        if value.dim() == 0:
            steps[path] = value.item()
        elif value.shape == parts[name].shape:
            tensors[f"optimizer/{path}"] = placed.copy(parameters[name], value)
        else:
            opaque[f"opaque/{placed.shard_name}/{path}"] = value.detach().to("cpu", copy=True)
    return placed.complete(tensors) | opaque, steps, scalars


def _failure(folder: Path, error: Exception) -> Exception:
    cause = error.failures.values() if isinstance(error, dcp.api.CheckpointException) else [error]
    text = "; ".join(str(each[0] if isinstance(each, tuple) else each) for each in cause)
    expected = (OSError, dcp.api.CheckpointException)
    if not isinstance(error, expected) and "SafetensorError" not in type(error).__name__:
        return error
    free = shutil.disk_usage(folder.parent).free / 2**30
    return TrainingFailed(
        f"the checkpoint {folder} could not be written: {text} ({free:.2f} GiB free there). "
        "Earlier checkpoints are whole; free some space or set run_dir to another disk, "
        "and start again to resume"
    )


def newest_whole(folder: Path, job_hash: str, warn: Any, world: World | None = None) -> Found | None:
    """The newest checkpoint under `folder` whose files have their checksums; `warn` hears of the others.

    Each rank checks its share of the files; all agree.
    """
    world = world or World()
    for step, path in world.broadcast(sorted(_steps(folder), reverse=True)):
        state = None
        try:
            sums = read_json(path / "checksums.json")
            mine = sorted(sums)[world.rank :: world.size]
            broken = [name for name in mine if sums[name] != sha256_file(path / name)]
            state = read_json(path / "state.json")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            broken = [str(error)]
        broken = [name for part in world.gather(broken) for name in part]
        if broken or state is None:
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
