"""Start `torchrun` with what the machine says about itself: one command for every node of any cluster.

    python launch/torchrun.py train.py recipe=full_70b

Where the shape of the cluster comes from, first found first:

    flags        --nnodes --nproc-per-node --node-rank --master-addr --master-port, before the script
    Runpod       Instant Clusters: NUM_NODES, NUM_TRAINERS, NODE_RANK, MASTER_ADDR or PRIMARY_ADDR, ..._PORT
    Slurm        SLURM_NNODES, SLURM_NODEID, SLURM_GPUS_ON_NODE, SLURM_STEP_NODELIST or SLURM_JOB_NODELIST
    nothing      this machine alone, with a process for each of its GPUs

The rendezvous is static: every node is told its rank and the first one's address. Instant Clusters do not do
the other kind (c10d). There NCCL must be told its network, ens1: the container's eth0 leads nowhere.

Standard library only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

FLAGS = ("nnodes", "nproc-per-node", "node-rank", "master-addr", "master-port")
PORT = "29500"
RUNPOD_INTERFACE = "ens1"


class Wrong(Exception):
    """What is missing or contradictory, and what would work."""


@dataclass(frozen=True)
class Start:
    """argv: the whole torchrun command. environment: variables to set besides."""

    argv: list[str]
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
    head = ["torchrun", f"--nproc-per-node={processes}"]
    if nodes == 1:
        return Start([*head, "--standalone", *script], extra)
    if not found["master-addr"]:
        raise Wrong(
            f"{nodes} nodes, and no address of the first one; give --master-addr, or MASTER_ADDR in the environment"
        )
    port = str(_number("master-port", found["master-port"], 1))
    shape = [f"--nnodes={nodes}", f"--node-rank={rank}", "--rdzv-backend=static"]
    place = [f"--master-addr={found['master-addr']}", f"--master-port={port}"]
    return Start([*head, *shape, *place, *script], extra)


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our flags (--name=value or --name value, dashes or underscores) before the script; the rest untouched."""
    flags: dict[str, str] = {}
    position = 0
    while position < len(arguments) and arguments[position].startswith("--"):
        name, equals, value = arguments[position][2:].replace("_", "-", 2).partition("=")
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
    return flags, arguments[position:]


def _shape(flags: dict[str, str], env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    extra: dict[str, str] = {}
    if "NUM_NODES" in env and ("PRIMARY_ADDR" in env or "MASTER_ADDR" in env):
        found = {
            "nnodes": env["NUM_NODES"],
            "nproc-per-node": env.get("NUM_TRAINERS", "gpu"),
            "node-rank": env.get("NODE_RANK", "0"),
            "master-addr": env.get("PRIMARY_ADDR") or env.get("MASTER_ADDR", ""),
            "master-port": env.get("PRIMARY_PORT") or env.get("MASTER_PORT", PORT),
        }
        if env["NUM_NODES"] != "1" and "NCCL_SOCKET_IFNAME" not in env:
            extra["NCCL_SOCKET_IFNAME"] = RUNPOD_INTERFACE
    elif "SLURM_NNODES" in env:
        found = {
            "nnodes": env["SLURM_NNODES"],
            "nproc-per-node": _gpus(env),
            "node-rank": env.get("SLURM_NODEID", "0"),
            "master-addr": _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")),
            "master-port": _slurm_port(env),
        }
    else:
        found = {
            "nnodes": "1",
            "nproc-per-node": "gpu",
            "node-rank": env.get("NODE_RANK", "0"),
            "master-addr": env.get("MASTER_ADDR", ""),
            "master-port": env.get("MASTER_PORT", PORT),
        }
        if "nnodes" not in flags:
            found["node-rank"] = "0"
    return {**found, **flags}, extra


def _gpus(env: Mapping[str, str]) -> str:
    """SLURM_GPUS_ON_NODE is a count, or with some versions a list of ids (0,1,2,3)."""
    given = env.get("SLURM_GPUS_ON_NODE", "")
    return str(len(given.split(","))) if "," in given else given or "gpu"


def _first_host(nodelist: str) -> str:
    """First name of a Slurm list: `gpu[07-09,12],login1` -> gpu07."""
    match = re.match(r"([^\[,]*)(?:\[([^\]-]*?)[-,\]])?", nodelist)
    return "" if match is None else match.group(1) + (match.group(2) or "").split(",")[0]


def _slurm_port(env: Mapping[str, str]) -> str:
    """A port of the job's own, so that two jobs on one node do not meet."""
    job = env.get("SLURM_JOB_ID", "")
    return str(20000 + int(job) % 20000) if job.isdigit() else PORT


def _number(name: str, text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise Wrong(f"{name} is {text!r}, and must be a number of at least {least}")
    return int(text)


def main() -> None:
    try:
        start = plan(sys.argv[1:], os.environ)
    except Wrong as error:
        sys.exit(f"error: {error}")
    os.environ.update(start.environment)
    # As a module of this Python, so that it is the torch of this environment and not one that is first on PATH.
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *start.argv[1:]])


if __name__ == "__main__":
    main()
