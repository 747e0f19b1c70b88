"""The processes that train together, and what they tell each other.

A world is as large as torchrun's variables say (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT); without them it is this one process, which needs no process group and communicates nothing.
"""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loadmaster.errors import LoadmasterError
from loadmaster.training.interface import no_such_interface, settle_interface, stay_on_this_host
from loadmaster.training.loopback import ear, is_loopback
from loadmaster.training.ranks import await_address, is_member

CPU = torch.device("cpu")
TIMEOUT_S = 12 * 3600.0
"""Longest wait of one collective: for data that one rank prepares. What is stuck, the watchdog ends much sooner."""
JOIN_S = 600.0
"""Longest wait for all processes to come, and of one collective where no watchdog watches."""
QUIET_S = 2.0
"""Longest wait at the end for the communication's threads to be done."""
_meetings = itertools.count(1)
"""Of this process; each job of a sweep has one, and a place of its own: torchrun keeps what was said at the last."""


@dataclass(frozen=True)
class World:
    """This process among the others. `device` is where its tensors live."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = CPU

    @property
    def lead(self) -> bool:
        return self.rank == 0

    @property
    def node(self) -> int:
        return self.rank // self.local_size

    @property
    def nodes(self) -> int:
        return -(-self.size // self.local_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, as a new tensor on every rank."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank: what all ranks must agree on before they branch."""
        if self.size == 1:
            return bool(flag)
        seen = torch.tensor([float(flag)])  # gloo's side of the group, so that no kernel is waited for
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen.item())

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; any picklable object."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order of rank, on every rank; any picklable object."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.any(False)


def join(device_type: str, timeout_s: float = JOIN_S) -> World:
    """Enter the world that the environment describes; `device_type` is cpu or cuda.

    Collectives of CPU tensors go over gloo, those of CUDA tensors over NCCL. timeout_s: longest wait of one, until
    `wait_at_most` says otherwise.
    """
    if not is_member():
        return World(device=torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu"))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    device = torch.device("cpu")
    if device_type == "cuda":
        refuse_hidden_gpus(max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 0))), torch.cuda.device_count())
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # A minute after NCCL has lost a peer it would abort the process, when the watchdog is about to say who is gone.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    world = World(rank, size, local_rank, local_size, device)
    store = None
    if not dist.is_initialized():
        place = f"loadmaster/group/{next(_meetings)}"
        store = dist.PrefixStore(place, meet(rank, size, place))
    atexit.register(quiet)
    try:
        if store is not None:
            refuse_mixed(store, rank, size, device_type)
            if world.nodes > 1:
                settle_interface(store, rank, size, os.environ["MASTER_ADDR"])
            elif is_loopback(os.environ["MASTER_ADDR"]):
                stay_on_this_host()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                store=store,
                timeout=first_limit(timeout_s, TIMEOUT_S),
                rank=rank,
                world_size=size,
                device_id=device if device_type == "cuda" else None,
            )
        refuse_uneven(world.gather(local_size))
    except RuntimeError as error:
        said = no_such_interface(error) or f"rank {rank} lost the others as they joined: {str(error).splitlines()[0]}"
        raise LoadmasterError(said) from None
    except LoadmasterError:
        leave(world)  # its threads must not outlive Python
        raise
    return world


def wait_at_most(seconds: float, group: dist.ProcessGroup | None = None) -> None:
    """Longest wait of one collective from here on."""
    if dist.is_initialized() and not _limits_stay():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def first_limit(seconds: float, later: float) -> timedelta:
    """Of a new group: `seconds`, where wait_at_most can say `later` afterwards."""
    return timedelta(seconds=later if _limits_stay() else seconds)


def _limits_stay() -> bool:
    """Whether groups keep the limit that they are made with: TORCH_DISTRIBUTED_DEBUG=DETAIL wraps them."""
    return dist.get_debug_level() == dist.DebugLevel.DETAIL


def refuse_hidden_gpus(processes: int, seen: int) -> None:
    """A process takes the GPU of its number on its machine, so each must see those of all.

    Raises LoadmasterError on all of a machine's, where LOCAL_WORLD_SIZE says how many, before one waits for another.
    """
    if processes > seen:
        raise LoadmasterError(
            f"{processes} processes were started on this machine and each sees {seen} GPU{'s' * (seen != 1)}: let each "
            "see all of them (srun without --gpus-per-task and --gpu-bind, CUDA_VISIBLE_DEVICES the same for all), "
            "or start as many processes as there are GPUs"
        )


def refuse_mixed(store: dist.Store, rank: int, size: int, device_type: str) -> None:
    """Some with a GPU and some without one would not meet: NCCL waits for those that never call it.

    Raises the same LoadmasterError on all of them.
    """
    told, read = ([f"loadmaster/{what}/{other}" for other in range(size)] for what in ("device", "device-read"))
    store.set(told[rank], f"{device_type} {os.environ.get('NODE_ADDR') or socket.gethostname()}")
    found = [each.decode().split(" ", 1) for each in store.multi_get(told)]
    without = [other for other, (kind, _) in enumerate(found) if kind == "cpu"]
    if not without or len(without) == size:
        return
    store.set(read[rank], "")
    if rank == 0:
        store.wait(read)  # it may keep the store, which the others still read
    raise LoadmasterError(
        f"rank {without[0]} ({found[without[0]][1]}) has no GPU that PyTorch can use, as {len(without)} of {size} "
        "processes, and the others have one: look at nvidia-smi there, at CUDA_VISIBLE_DEVICES, at whether the "
        "container was given its GPUs (--gpus all), and at torch.version.cuda; hardware=cpu trains without"
    )


def refuse_uneven(counts: Sequence[int]) -> None:
    """Ranks are told apart by nodes of one size: of others, some would wait for what the rest never comes to.

    counts: processes on the node of each rank. Raises the same LoadmasterError on all of them.
    """
    if len(set(counts)) > 1:
        said = ", ".join(f"{count} on the node of rank {counts.index(count)}" for count in dict.fromkeys(counts))
        raise LoadmasterError(
            f"the nodes have different numbers of processes ({said}); start as many on each: --nproc-per-node=N, or "
            "the same number of GPUs"
        )


def meet(rank: int, size: int, place: str, patience_s: float = JOIN_S) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT once all have come there: torchrun's agent keeps it, else rank 0 does.

    place: what the names begin with by which they know each other.

    Raises LoadmasterError that names the ranks that did not come.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", size)) >= size  # else others know this host by another name
    await_address(host)
    patience = timedelta(seconds=patience_s)
    keys = [f"{place}/here/{other}" for other in range(size)]
    try:
        store = dist.TCPStore(
            host, port, is_master=keeps, wait_for_workers=False, timeout=patience, multi_tenant=True,
            master_listen_fd=ear(host, port) if keeps and alone else None,
        )
        store.set(keys[rank], "")
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise LoadmasterError(f"port {port} of {host} is in use; set another MASTER_PORT on every rank") from None
        raise LoadmasterError(f"rank {rank} found nobody at {host}:{port} within {patience_s:.0f} s") from None
    try:
        store.wait(keys, patience)
    except dist.DistError:
        raise LoadmasterError(
            f"not all of {size} processes came to {host}:{port} within {patience_s:.0f} s; missing: "
            f"{_missing(store, keys)}"
        ) from None
    return store


def _missing(store: dist.Store, keys: list[str]) -> str:
    try:
        return "rank " + ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
    except dist.DistError:
        return "the one that keeps the meeting place, on node 0"


def leave(world: World) -> None:
    """Close the process group; without it NCCL warns and its threads can hold the process."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def quiet() -> None:
    """Return once no other thread of this process runs, or after QUIET_S: that is always where there is no /proc.

    Gloo's threads let go of a collective's tensors after who waited for it goes on, and need Python to do so. Once
    Python ends that aborts the process ("terminate called without an active exception"), and FSDP and DeepSpeed keep
    such threads alive past the end of their group (pytorch/pytorch#190489).
    """
    me, deadline = threading.get_native_id(), time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        time.sleep(0.005)  # whoever waits for Python gets it now
        with suppress(FileNotFoundError):
            if not any(_runs(task) for task in Path("/proc/self/task").iterdir() if task.name != str(me)):
                return


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except (FileNotFoundError, ProcessLookupError):  # it ended
        return False
