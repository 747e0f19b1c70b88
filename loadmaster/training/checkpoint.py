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

The loop waits only for a copy of the tensors to the host (loadmaster.training.staging); the writing is done by a thread
behind it. What goes wrong there on one rank, all ranks hear of, and the loop at its next step.
"""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loadmaster import processors
from loadmaster.errors import TrainingFailed
from loadmaster.files import publish_folder, read_json, sha256_file, sha256_files, write_json
from loadmaster.models.shards import local_rows
from loadmaster.training.checkpoint_folders import prune
from loadmaster.training.liveness import WRITER
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed, local
from loadmaster.training.relayout import OldLayout
from loadmaster.training.rng import restore_rng, rng_state, seed_everything
from loadmaster.training.shard_files import ShardWriter
from loadmaster.training.staging import Staging
from loadmaster.training.world import TIMEOUT_S, World

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of a world of one, at every save

Named = list[tuple[str, nn.Parameter]]
FAILURES = (Exception, dcp.api.CheckpointException)
"""The second is no Exception: what only catches those lets a checkpoint that no rank could write pass as written."""
READ_BYTES = 2**30
"""Tensors that are read, and put where they belong, at a time."""


@dataclass(frozen=True)
class _Copied:
    """What a rank writes of a save."""

    tensors: dict[str, Any]
    optimizer: dict[str, dict[str, Any]]
    """Of its state what is no tensor by now: steps and scalars."""
    generators: tuple[dict[str, Tensor], dict[str, Any]]
    state: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, behind the loop's back."""

    def __init__(self, world: World, placed: Placed):
        self.world, self.placed = world, placed
        # Its own group: the writing thread's collectives must not get between the loop's.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S)) if world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staging = Staging(world.local_size)
        self.stalls_s: list[float] = []
        """Seconds that the loop waited for each save."""
        self.written: list[tuple[int, float]] = []
        """Bytes of this rank, and seconds, of each save that is there."""

    @property
    def failed(self) -> bool:
        """Whether what is written behind the loop has failed: the next save or wait says how."""
        return self._error is not None

    @property
    def behind(self) -> bool:
        """Whether the last save is written behind the loop, not while it waits."""
        return self._staging.copying

    def save(
        self, folder: Path, trained: Named, optimizer: TrainingOptimizer, state: dict[str, Any],
        keep: tuple[int, int] | None = None,
    ) -> None:
        """Copy everything and return; `folder` appears when it is whole. `state` must be JSON.

        keep: (newest, best) to keep of its neighbours. Raises TrainingFailed for the save before, if that failed.
        """
        began = time.perf_counter()
        self.wait()
        tensors, rest = _collect(trained, optimizer, self.placed, self._staging)
        copied = _Copied(tensors, rest, rng_state(), {**state, "world_size": self.world.size})
        self._thread = threading.Thread(target=self._write, args=(folder, copied, keep), name=WRITER)
        self._thread.start()
        if not self.behind:
            self._thread.join()
        self.stalls_s.append(time.perf_counter() - began)

    def wait(self) -> None:
        """Until the last checkpoint is there. Raises TrainingFailed when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, folder: Path, copied: _Copied, keep: tuple[int, int] | None) -> None:
        began = time.perf_counter()
        try:
            self._write_all(folder, copied)
            if keep and self.world.lead:
                prune(folder, *keep)
            size = sum(local(tensor).nbytes for tensor in copied.tensors.values())
            self.written.append((size, time.perf_counter() - began))
        except FAILURES as error:  # raised again by the loop, in wait
            self._error = _failure(folder, error)

    def _write_all(self, folder: Path, copied: _Copied) -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        with ExitStack() as published:
            if self.world.lead:
                self._together(lambda: published.enter_context(publish_folder(folder)))
            else:
                self._together(lambda: None)
            self._together(lambda: self._write_generators(partial, copied))
            self._together(lambda: self._write_tensors(partial / "tensors", copied.tensors))
            parts = self._together(lambda: self._checksums(partial))
            reports = self._gather((parts, copied.optimizer))
            if self.world.lead:
                self._together(lambda: (_write_head(partial, reports, copied.state), published.close()))
            else:
                self._together(lambda: None)

    def _write_generators(self, partial: Path, copied: _Copied) -> None:
        save_file(copied.generators[0], partial / f"rng-{self.world.rank}.safetensors")
        write_json(partial / f"rng-{self.world.rank}.json", copied.generators[1])

    def _checksums(self, partial: Path) -> dict[str, str]:
        """Of this rank's files, by name."""
        kinds = (f"rng-{self.world.rank}.*", f"tensors/shard-{self.world.rank + 1:05d}-*")
        mine = [path for kind in kinds for path in sorted(partial.glob(kind))]
        digests = sha256_files(mine, max(1, processors.usable() // self.world.local_size))
        return {path.relative_to(partial).as_posix(): digest for path, digest in zip(mine, digests, strict=True)}

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """All ranks talk in it, so all come here or none: what may fail on one alone is no part of it."""
        dcp.save(tensors, storage_writer=ShardWriter(folder), process_group=self._group, no_dist=self.world.size == 1)

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do a part of the work on every rank; what fails on one fails on all. Returns this rank's result."""
        result, error = None, None
        try:
            result = work()
        except FAILURES as raised:
            error = raised
        failed = [text for text in self._gather(None if error is None else _cause(error)) if text]
        if error is not None and not _is_expected(error):
            raise error
        if failed:
            raise OSError("; ".join(dict.fromkeys(failed)))
        return result

    def figures(self) -> dict[str, Any] | None:
        """Of all ranks' saves so far: how many, GiB of each, seconds; None before the first. All ranks call it."""
        self.wait()
        size = sum(part[-1][0] if part else 0 for part in self.world.gather(self.written))
        stalls = [max(of_ranks) for of_ranks in zip(*self.world.gather(self.stalls_s), strict=True)]
        if not stalls:
            return None
        return {
            "count": len(stalls),
            "gib": size / 2**30,
            "stall_s_mean": sum(stalls) / len(stalls),
            "stall_s_max": max(stalls),
            "write_s_mean": sum(seconds for _, seconds in self.written) / len(self.written),
            "behind": not self.world.any(not self.behind),
        }

    def forget_figures(self) -> None:
        """The rehearsal's save is none of the run's; it also takes the memory that later ones find."""
        self.stalls_s.clear()
        self.written.clear()

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

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
        opaque = f"opaque/{self.placed.shard_name}/"
        parameters = dict(trained)
        where = {f"weights/{name}": p for name, p in trained}
        for key, value in self._read(folder, stored, where):
            with torch.no_grad():
                self.placed.part(where[key]).copy_(value)
        where = {
            key: parameters[name]
            for key, entry in stored.items()
            if key.startswith("optimizer/") and (name := key.split("/", 1)[1].rsplit("/", 1)[0]) in parameters
            and tuple(entry.size) == tuple(self.placed.shape(parameters[name]))
        }
        states = ((key.removeprefix("optimizer/"), value) for key, value in self._read(folder, stored, where))
        blocks = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in stored.items()
            if key.startswith(opaque)
        }
        self._read_into(folder, blocks)
        steps = {key: torch.tensor(value) for key, value in state["optimizer"]["steps"].items()}
        rest = {**{key.removeprefix(opaque): value for key, value in blocks.items()}, **steps}

        def values() -> Iterator[tuple[str, Any]]:
            yield from states
            yield from rest.items()
            old = OldLayout(folder / "tensors") if getattr(optimizer, "own_form", False) else None
            if old and old.shards and not opaque.endswith(f"-of-{old.shards}/"):
                for name, parameter in trained:
                    _, first, last = local_rows(parameter)
                    optimizer.adopt(name, old.states(name, parameter.shape, first, last))
            yield from state["optimizer"]["scalars"].items()

        optimizer.load_state(values())
        self._restore_generators(folder, state)
        return state

    def _read(
        self, folder: Path, stored: dict[str, Any], where: dict[str, nn.Parameter]
    ) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each stored tensor, which lies in its whole as a parameter does; a few at a time.

        All ranks come by here together, with the same tensors in the same order.
        """
        batch: dict[str, Tensor] = {}
        size = 0
        for number, (key, parameter) in enumerate(where.items(), 1):
            dtype = stored[key].properties.dtype
            batch[key] = self.placed.empty(parameter, dtype)
            whole = self.placed.shape(parameter).numel() * dtype.itemsize
            size += whole // self.world.size  # not this rank's share: all ranks must come to the same batches
            if size >= READ_BYTES or number == len(where):
                self._read_into(folder, batch)
                parts = {name: self.placed.filled(where[name], tensor) for name, tensor in batch.items()}
                yield from ((name, part) for name, part in parts.items() if part.numel())
                batch, size = {}, 0

    def _read_into(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        reader = dcp.HuggingFaceStorageReader(str(folder / "tensors"))
        dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=self.world.size == 1)

    def _restore_generators(self, folder: Path, state: dict[str, Any]) -> None:
        tensors = folder / f"rng-{self.world.rank}.safetensors"
        if tensors.is_file():
            restore_rng(load_file(tensors), read_json(folder / f"rng-{self.world.rank}.json"))
        else:  # a rank that was not there: a stream of its own
            seed_everything(state["step"] * 100_003 + self.world.rank)


def _write_head(partial: Path, reports: list[tuple[dict, dict]], state: dict[str, Any]) -> None:
    """What the lead alone writes: state.json, and checksums.json of all files."""
    kinds = ("steps", "scalars")
    merged = {kind: {k: v for _, part in reports for k, v in part[kind].items()} for kind in kinds}
    write_json(partial / "state.json", {**state, "optimizer": merged})
    sums = {name: digest for files, _ in reports for name, digest in files.items()}
    sums["state.json"] = sha256_file(partial / "state.json")
    write_json(partial / "checksums.json", sums)


def _collect(
    trained: Named, optimizer: TrainingOptimizer, placed: Placed, staging: Staging
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(tensors by key, step counts and other scalars) of weights and optimizer; copies, as long as there is room."""
    parameters, parts = dict(trained), {name: placed.part(p) for name, p in trained}
    states, scalars = optimizer.state()
    own_form = getattr(optimizer, "own_form", False)
    held = {f"weights/{name}": part for name, part in parts.items() if part.numel()}
    like = {f"weights/{name}": p for name, p in trained}
    steps = {}
    for path, value in states.items():
        name = path.rsplit("/", 1)[0]
        if value.dim() == 0:
            steps[path] = value.item()
        elif value.shape == parts[name].shape and (not own_form or path.endswith("/master")):
            held[f"optimizer/{path}"], like[f"optimizer/{path}"] = value, parameters[name]
        else:
            held[f"opaque/{placed.shard_name}/{path}"] = value
    staging.begin(held)
    copies = {key: staging.take(key, value) for key, value in held.items()}
    staging.settle()
    placed_copies = {key: placed.place(like[key], copy) for key, copy in copies.items() if key in like}
    opaque = {key: copy for key, copy in copies.items() if key not in like}
    return placed.complete(placed_copies) | opaque, {"steps": steps, "scalars": scalars}


def _cause(error: BaseException) -> str:
    causes = error.failures.values() if isinstance(error, dcp.api.CheckpointException) else [error]
    return "; ".join(dict.fromkeys(str(each[0] if isinstance(each, tuple) else each) for each in causes))


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, OSError | dcp.api.CheckpointException) or "SafetensorError" in type(error).__name__


def _failure(folder: Path, error: BaseException) -> BaseException:
    if not _is_expected(error):
        return error
    try:
        free = f" ({shutil.disk_usage(folder.parent).free / 2**30:.2f} GiB free there)"
    except OSError:
        free = ""
    return TrainingFailed(
        f"the checkpoint {folder} could not be written: {_cause(error)}{free}. "
        "Earlier checkpoints are whole; free some space or set run_dir to another disk, "
        "and start again to resume"
    )
