"""Rank and size of this process, as other launchers than torchrun say them, in torchrun's words.

    torchrun        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: nothing to translate
    Open MPI        OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
    MPICH, Intel    PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    srun, a task    SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE
    a process each

Standard library only: launch/torchrun.py uses it too.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from loadmaster.errors import LoadmasterError

PORT = 29500
NCCL_DEFAULT = "^docker,lo"
"""What NCCL does by itself: any interface but these. Where it is set, that which leads to the others is taken."""
TORCHRUN = "start it with torchrun, which sets all of its variables; or, for one process, unset RANK and WORLD_SIZE"
NAME_S = 60.0
"""Longest wait for a name to have an address: a cluster's may come after its hosts do (Kubernetes)."""
LOCAL = ("LOCAL_WORLD_SIZE", "LOCAL_RANK")
NAMES = {
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Only srun sets SLURM_STEP_NUM_TASKS; in a batch script without srun, SLURM_PROCID is 0 and nobody else comes.
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def is_member(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or what speaks its variables, started this process as one of several."""
    return "RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1


def torchrun_variables(env: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment so that it says what torchrun would; empty where there is nothing to add.

    Pure. Raises LoadmasterError for several hosts whose meeting place nobody names, and for variables of torchrun that
    no launcher leaves so.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        _refuse_half_a_launch(env)
        return {}
    for launcher, (rank, size, local_rank, local_size) in NAMES.items():
        if rank not in env or size not in env:
            continue
        unset = f"unset {rank} and {size}, which an earlier {launcher} may have left"
        numbers = [size, rank, *[name for name in (local_rank, local_size) if env.get(name)]]
        _refuse_no_number(env, [name for name in numbers if not name.endswith("TASKS_PER_NODE")], unset)
        if int(env[size]) < 2:
            continue
        per_node = _per_node(env.get(local_size) or env[size], unset)
        found = {
            "RANK": env[rank],
            "WORLD_SIZE": env[size],
            "LOCAL_RANK": env.get(local_rank) or str(int(env[rank]) % max(1, per_node)),
            "LOCAL_WORLD_SIZE": str(per_node),
        }
        found |= _meeting_place(env, launcher, alone=per_node >= int(env[size]))
        _refuse_no_number(found, ["MASTER_PORT"], "a number for MASTER_PORT, or unset it")
        said = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
        _refuse_impossible(found, unset, said)
        return found
    return {}


def _refuse_half_a_launch(env: Mapping[str, str]) -> None:
    _refuse_no_number(env, ["RANK", "WORLD_SIZE"], TORCHRUN)
    if (size := int(env["WORLD_SIZE"])) < 2:
        return
    if not env.get("MASTER_ADDR"):
        raise LoadmasterError(f"MASTER_ADDR is not set beside WORLD_SIZE={size}\n    fix: {TORCHRUN}")
    _refuse_no_number(env, ["MASTER_PORT", *[name for name in LOCAL if name in env]], TORCHRUN)
    _refuse_impossible(env, TORCHRUN, {})


def _refuse_impossible(env: Mapping[str, str], fix: str, names: Mapping[str, str]) -> None:
    """env: torchrun's variables, numbers all. names: what the launcher calls them, where not so."""
    size = int(env["WORLD_SIZE"])
    per_node = min(size, int(env.get("LOCAL_WORLD_SIZE", size)))
    possible = {
        "RANK": range(size), "MASTER_PORT": range(1, 2**16), "LOCAL_WORLD_SIZE": range(1, size + 1),
        "LOCAL_RANK": range(per_node),
    }
    for name in ["RANK", "MASTER_PORT", *[name for name in LOCAL if name in env]]:
        if int(env[name]) not in possible[name]:
            ends = f"{possible[name].start} to {possible[name].stop - 1}"
            what = f"{names.get(name, name)} is {env[name]} beside {names.get('WORLD_SIZE', 'WORLD_SIZE')}={size}"
            raise LoadmasterError(f"{what}, and goes from {ends}\n    fix: {fix}")


def _refuse_no_number(env: Mapping[str, str], names: Sequence[str], fix: str) -> None:
    for name in names:
        if not env.get(name, "").isdecimal():
            said = repr(env.get(name, "not set"))
            raise LoadmasterError(f"{name} is {said} in the environment, no number\n    fix: {fix}")


def await_address(host: str, patience_s: float = NAME_S) -> None:
    """Return once the meeting place's name has an address here. Raises LoadmasterError that names it."""
    began = time.monotonic()
    told = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            said = getattr(error, "strerror", None) or str(error)
        if time.monotonic() - began >= patience_s:
            raise LoadmasterError(
                f"MASTER_ADDR={host} has no address on this host ({said}); give the first host's name or address as "
                "all hosts know it: MASTER_ADDR, or --master-addr"
            )
        if not told:
            print(f"MASTER_ADDR={host} has no address here yet ({said}); waiting {patience_s:.0f} s", file=sys.stderr)
            told = True
        time.sleep(1)


def first_host(nodelist: str) -> str:
    """First name of a Slurm list: `gpu[07-09,12],login1` -> gpu07."""
    match = re.match(r"([^\[,]*)(?:\[([^\]-]*?)[-,\]])?", nodelist)
    return "" if match is None else match.group(1) + (match.group(2) or "").split(",")[0]


def job_port(job_id: str) -> int:
    """A port of the job's own, so that two jobs on one node do not meet."""
    return 20000 + int(job_id) % 20000 if job_id.isdigit() else PORT


def _per_node(text: str, fix: str) -> int:
    """Processes on a node; Slurm writes `8(x2)` for two nodes of 8, and `8,4` for unequal ones."""
    counts = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", text)}
    if not counts:
        raise LoadmasterError(f"{text!r} says of no node how many processes it has\n    fix: {fix}")
    if len(counts) != 1:
        raise LoadmasterError(
            f"the nodes have different numbers of tasks ({text}); start as many on each: srun --ntasks-per-node=N"
        )
    return counts.pop()


def _meeting_place(env: Mapping[str, str], launcher: str, alone: bool) -> dict[str, str]:
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", "")) or ("127.0.0.1" if alone else "")
    if not address:
        raise LoadmasterError(
            f"{launcher} started processes on several hosts and none of them knows where to meet; "
            "name the first host: mpirun -x MASTER_ADDR=HOST ..."
        )
    port = env.get("MASTER_PORT") or str(job_port(env.get("SLURM_JOB_ID", "")))
    return {"MASTER_ADDR": address, "MASTER_PORT": port}
