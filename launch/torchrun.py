"""Start this node's processes with what the machine says about itself: one command for every node of any cluster.

    python launch/torchrun.py train.py recipe=full_70b

Where the shape of the cluster comes from, first found first:

    flags        --nnodes --nproc-per-node --node-rank --master-addr --master-port, before the script;
                 --rdzv-endpoint=HOST:PORT is the last two in one, and --rdzv-backend=static is what it always is
    Runpod       Instant Clusters: NUM_NODES, NUM_TRAINERS, NODE_RANK, PRIMARY_ADDR or MASTER_ADDR, ..._PORT,
                 WORLD_SIZE
    SkyPilot     SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK, SKYPILOT_NODE_IPS, SKYPILOT_NUM_GPUS_PER_NODE
    Slurm        SLURM_NNODES, SLURM_NODEID, SLURM_GPUS_ON_NODE; MASTER_ADDR and MASTER_PORT, else the first host of
                 SLURM_STEP_NODELIST or SLURM_JOB_NODELIST and a port of the job's own
    nothing      this machine alone, with a process for each of its GPUs

The rendezvous is static: every node is told its rank and the first one's address. Instant Clusters do not do
the other kind (c10d). There NCCL must be told its network, ens1: the container's eth0 leads nowhere.

The processes run under torch's elastic agent, as torchrun's do. Unlike torchrun's, this command's exit code is
theirs (75: stopped with a checkpoint saved), and it leaves them the time that they need to save.
"""

from __future__ import annotations

from loadmaster import starting

if __name__ == "__main__":  # until the agent takes the signals
    starting.listen()
    starting.refuse_another_python()

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from loadmaster.ending import ended
from loadmaster.errors import LoadmasterError, StoppedOnRequest
from loadmaster.streams import settle_streams
from loadmaster.training.agent import Meeting, Workers, run_workers
from loadmaster.training.ranks import PORT, first_host, job_port

FLAGS = ("nnodes", "nproc-per-node", "node-rank", "master-addr", "master-port", "rdzv-endpoint", "rdzv-backend")
RUNPOD_INTERFACE = "ens1"


class Wrong(LoadmasterError):
    """What is missing or contradictory, and what would work."""

    exit_code = 2


@dataclass(frozen=True)
class Start:
    """What to run on this node. processes: as many, or `gpu` for one for each GPU that it has."""

    processes: str
    script: list[str]
    meeting: Meeting | None
    environment: dict[str, str]


def plan(arguments: list[str], env: Mapping[str, str]) -> Start:
    """Pure: the command line and the environment of this node -> what to run. Raises Wrong."""
    flags, script = _split(arguments)
    if not script:
        raise Wrong("no script: python launch/torchrun.py [flags] train.py recipe=NAME ...")
    found, extra = _shape(flags, env)
    nodes, rank = _number("nnodes", found["nnodes"], 1), _number("node-rank", found["node-rank"], 0)
    processes = found["nproc-per-node"]
    if processes != "gpu":
        _number("nproc-per-node", processes, 1)
    if rank >= nodes:
        raise Wrong(f"node-rank {rank} of {nodes} nodes: ranks go from 0 to {nodes - 1}")
    if nodes == 1:
        return Start(processes, script, None, extra)
    if not found["master-addr"]:
        raise Wrong(
            f"{nodes} nodes, and no address of the first one; give --master-addr, or MASTER_ADDR in the environment"
        )
    port = _number("master-port", found["master-port"], 1)
    return Start(processes, script, Meeting(nodes, rank, found["master-addr"], port), extra)


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our flags (--name=value or --name value, dashes or underscores) before the script; the rest untouched."""
    flags: dict[str, str] = {}
    position = 0
    while position < len(arguments) and arguments[position].startswith("--"):
        name, equals, value = arguments[position][2:].partition("=")
        name = name.replace("_", "-")
        if name not in FLAGS:
            raise Wrong(
                f"--{name} is none of {', '.join(f'--{flag}' for flag in FLAGS)}; the script's own words come after it"
            )
        if not equals:
            position += 1
            if position == len(arguments):
                raise Wrong(f"--{name} needs a value")
            value = arguments[position]
        flags[name] = value
        position += 1
    return _meeting_flags(flags), arguments[position:]


def _meeting_flags(flags: dict[str, str]) -> dict[str, str]:
    """--rdzv-endpoint as address and port."""
    backend = flags.pop("rdzv-backend", "static")
    if backend != "static":
        raise Wrong(f"--rdzv-backend={backend}: hosts meet by static rendezvous only, which works on every cluster")
    address, _, port = flags.pop("rdzv-endpoint", "").rpartition(":")
    if port and not address:
        address, port = port, str(PORT)
    return ({"master-addr": address, "master-port": port} if address else {}) | flags


def _shape(flags: dict[str, str], env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    extra: dict[str, str] = {}
    if "NUM_NODES" in env and ("PRIMARY_ADDR" in env or "MASTER_ADDR" in env):
        found = {
            "nnodes": env["NUM_NODES"],
            "nproc-per-node": _trainers(env),
            "node-rank": env.get("NODE_RANK", "0"),
            "master-addr": env.get("PRIMARY_ADDR") or env.get("MASTER_ADDR", ""),
            "master-port": env.get("PRIMARY_PORT") or env.get("MASTER_PORT", str(PORT)),
        }
        if env["NUM_NODES"] != "1" and "NCCL_SOCKET_IFNAME" not in env:
            # gloo, which carries what is on the CPU, would else take that of the host's name.
            extra |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), RUNPOD_INTERFACE)
    elif "SKYPILOT_NUM_NODES" in env:
        found = {
            "nnodes": env["SKYPILOT_NUM_NODES"],
            "nproc-per-node": env.get("SKYPILOT_NUM_GPUS_PER_NODE", "gpu"),
            "node-rank": env.get("SKYPILOT_NODE_RANK", "0"),
            "master-addr": (env.get("SKYPILOT_NODE_IPS", "").split() or [""])[0],
            "master-port": str(PORT),
        }
    elif "SLURM_NNODES" in env:
        found = {
            "nnodes": env["SLURM_NNODES"],
            "nproc-per-node": _gpus(env),
            "node-rank": env.get("SLURM_NODEID", "0"),
            "master-addr": env.get("MASTER_ADDR")
            or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")),
            "master-port": env.get("MASTER_PORT") or str(job_port(env.get("SLURM_JOB_ID", ""))),
        }
    else:
        found = {
            "nnodes": "1",
            "nproc-per-node": "gpu",
            "node-rank": env.get("NODE_RANK", "0"),
            "master-addr": env.get("MASTER_ADDR", ""),
            "master-port": env.get("MASTER_PORT", str(PORT)),
        }
        if "nnodes" not in flags:
            found["node-rank"] = "0"
    return {**found, **flags}, extra


def _trainers(env: Mapping[str, str]) -> str:
    """NUM_TRAINERS, and WORLD_SIZE must agree with it: of two that differ nobody knows which is right."""
    nodes, world = env["NUM_NODES"], env.get("WORLD_SIZE", "")
    if not (world.isdigit() and nodes.isdigit() and int(nodes)):
        return env.get("NUM_TRAINERS", "gpu")
    each = env.get("NUM_TRAINERS", str(int(world) // int(nodes)))
    if each.isdigit() and int(each) * int(nodes) != int(world):
        raise Wrong(
            f"NUM_NODES={nodes} x NUM_TRAINERS={each} is not WORLD_SIZE={world}; "
            "set the one that is wrong, or unset WORLD_SIZE"
        )
    return each


def _gpus(env: Mapping[str, str]) -> str:
    """SLURM_GPUS_ON_NODE is a count, or with some versions a list of ids (0,1,2,3)."""
    given = env.get("SLURM_GPUS_ON_NODE", "")
    return str(len(given.split(","))) if "," in given else given or "gpu"


def _number(name: str, text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise Wrong(f"{name} is {text!r}, and must be a number of at least {least}")
    return int(text)


def _processes(text: str) -> int:
    if text != "gpu":
        return int(text)
    import torch

    found = torch.cuda.device_count()
    if not found:
        raise Wrong("this machine has no GPU to start a process for; say how many processes: --nproc-per-node=N")
    return found


def main() -> int:
    settle_streams()
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    try:
        start = plan(sys.argv[1:], os.environ)
        environment = start.environment | {"LOADMASTER_LEAD": str(os.getpid())}  # workers end with this process
        return run_workers(Workers(_processes(start.processes), start.script, start.meeting, environment))
    except (LoadmasterError, StoppedOnRequest) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(ended(main()))
