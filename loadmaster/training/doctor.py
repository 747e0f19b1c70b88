"""Before training, on every rank: do all hosts run the same job with the same software, and are they fit for it?

What differs from most is wrong: code, configuration, data, versions, clocks. Room on disk and in shared memory is
held against what the plan needs. These stop the run, naming the node. Links are measured by a short all-reduce
within each node and an exchange with the next one, and a node whose links fall short is named too, as a warning:
what a catalogue promises was never measured here over several GPUs.

Rates are 10^9 bytes/s. Within a node it is the all-reduce's bus bandwidth, 2 (n - 1) / n x bytes / s (the
convention of nccl-tests), which compares with a link's one-direction rate whatever n is.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from loadmaster import catalog
from loadmaster.errors import LoadmasterError
from loadmaster.files import sha256_file, sha256_json
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import GIB
from loadmaster.preflight.plan import Plan
from loadmaster.training.metrics import reset_peak
from loadmaster.training.world import World

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "torchao", "numpy", "safetensors",
    "triton",
)
CLOCK_S = 5.0
"""Clocks further apart than this make logs and checkpoints' times misleading, and can break TLS and NFS."""
SHM_GIB = 1.0
"""Shared memory that NCCL and its ranks of one node want; containers start with 64 MiB unless told otherwise."""
LOGS_GIB = 1.0
"""Room that a node wants which is not the lead's; what the run keeps is written there or on a disk that all share."""
FAIR_SHARE = 0.4
"""A link below this share of what the catalogue expects, or of what the other nodes' links do, is slow."""
SLOW_LATENCY = 10.0
"""A link whose smallest message takes so many times what the model expects, or what the other nodes' takes, is slow."""
MEGABYTES = {"cpu": 4, "cuda": 128}
REPEATS = 3


@dataclass(frozen=True)
class Report:
    """What one rank found. Rates in 10^9 bytes/s, None where there is nobody to measure it with."""

    rank: int
    node: int
    host: str
    code: str = ""
    config: str = ""
    data: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    clock_s: float = 0.0
    disk_free_gib: float = 0.0
    shm_free_gib: float | None = None
    latency_us: float = 0.0
    node_gb_per_s: float | None = None
    next_gb_per_s: float | None = None
    node_latency_us: float | None = None
    """Of the smallest all-reduce within the node."""
    next_latency_us: float | None = None
    """Of the smallest exchange with this rank's peer on the next node."""

    @property
    def place(self) -> str:
        return f"node {self.node} ({self.host})"


@dataclass(frozen=True)
class Needs:
    """What the plan asks of a node; a rate of None is not known."""

    disk_gib: float = 0.0
    shm_gib: float = 0.0
    node_gb_per_s: float | None = None
    next_gb_per_s: float | None = None
    node_latency_us: float | None = None
    next_latency_us: float | None = None


def needs_of(plan: Plan) -> Needs:
    """From the plan and the catalogue; nothing is expected of a CPU's links."""
    facts = catalog.gpus().get(plan.hardware.gpu)
    shm, count = SHM_GIB if plan.hardware.count > 1 and plan.hardware.gpu != "cpu" else 0.0, plan.hardware.count
    if facts is None:
        return Needs(plan.disk_gib, shm)
    machine = next((m for m in catalog.machines() if m["gpu"] == plan.hardware.gpu), {})
    network = machine.get("network_gbps", 0) / 8 or None
    call_us = value("latency", "collective_us")
    return Needs(
        plan.disk_gib, shm, facts["link_gb_per_s"] if count > 1 else None, network,
        call_us + (count - 1) * value("latency", "link_us"), call_us + value("latency", "network_us"),
    )


# ------------------------------------------------------------------- decisions


def differences(reports: Sequence[Report], needs: Needs) -> list[str]:
    """What must be put right before training, a sentence each, naming node and rank; pure."""
    found = []
    for name, what in (("code", "loadmaster's own files"), ("config", "the job's settings"), ("data", "the data")):
        values = {r.rank: getattr(r, name) for r in reports}
        found += _unlike(reports, values, lambda here, usual, what=what: f"{what} differ ({here[:8]}, not {usual[:8]})")
    for package in sorted({name for r in reports for name in r.versions}):
        values = {r.rank: r.versions.get(package, "missing") for r in reports}
        found += _unlike(reports, values, lambda here, usual, name=package: f"{name} is {here}, not {usual}")
    clocks = [r.clock_s for r in reports]
    usual_s = max(clocks, key=lambda mine: sum(abs(other - mine) <= CLOCK_S for other in clocks))
    for node in _by_node(reports):
        skew_s = node[0].clock_s - usual_s
        if abs(skew_s) > CLOCK_S:
            side = "ahead of" if skew_s > 0 else "behind"
            found.append(f"{node[0].place}: its clock is {abs(skew_s):.1f} s {side} the usual one; start NTP there")
        disk = min(r.disk_free_gib for r in node)
        wanted = needs.disk_gib if node[0].node == 0 else min(needs.disk_gib, LOGS_GIB)
        if disk < wanted:
            found.append(f"{node[0].place}: {disk:.1f} GiB free for the run, which writes {wanted:.1f} GiB there")
        shm = min((r.shm_free_gib for r in node if r.shm_free_gib is not None), default=None)
        if shm is not None and shm < needs.shm_gib:
            found.append(
                f"{node[0].place}: {shm:.2f} GiB free in /dev/shm, and its ranks want {needs.shm_gib:.1f}; "
                "start the container with --shm-size=8g (or --ipc=host)"
            )
    return found


def slow_links(reports: Sequence[Report], needs: Needs) -> list[str]:
    """Nodes whose links fall short of the catalogue, or of the other nodes; pure."""
    nodes = _by_node(reports)
    inside = {n[0].node: n[0].node_gb_per_s for n in nodes if n[0].node_gb_per_s is not None}
    # A node sends with all of its ranks at once: its rate is their sum.
    outside = {n[0].node: sum(r.next_gb_per_s for r in n) for n in nodes if n[0].next_gb_per_s is not None}
    names = {n[0].node: n[0].place for n in nodes}
    found = []
    for node, rate in inside.items():
        expected = needs.node_gb_per_s or _others(inside, node)
        if expected and rate < FAIR_SHARE * expected:
            found.append(f"{names[node]}: {rate:.1f} GB/s between its GPUs, of {expected:.1f} expected")
    slow = {}
    for node, rate in outside.items():
        expected = needs.next_gb_per_s or _others(outside, node)
        if expected and rate < FAIR_SHARE * expected:
            slow[node] = (rate, expected)
    for node, (rate, expected) in slow.items():
        after = (node + 1) % len(nodes)
        ends = f"{names[node]} and {names[after]}"
        if len(nodes) > 2 and (node - 1) % len(nodes) in slow:  # slow to both neighbours: it is this one
            ends = f"{names[node]} and its neighbours"
        found.append(f"{rate:.1f} GB/s between {ends}, of {expected:.1f} expected")
    return found + _late(nodes, needs)


def _late(nodes: list[list[Report]], needs: Needs) -> list[str]:
    """Nodes whose smallest messages take too long, by the slowest of their ranks."""
    found = []
    for name, where in (("node_latency_us", "within it"), ("next_latency_us", "to the next node")):
        taken = {n[0].node: max(getattr(r, name) for r in n) for n in nodes if getattr(n[0], name) is not None}
        for n in nodes:
            expected = getattr(needs, name) or _others(taken, n[0].node)
            if expected and taken.get(n[0].node, 0) > SLOW_LATENCY * expected:
                found.append(
                    f"{n[0].place}: a message takes {taken[n[0].node]:.0f} us {where}, of {expected:.0f} expected"
                )
    return found


def summary(reports: Sequence[Report]) -> str:
    """A line for the log: how many are alike, and what the links did."""
    nodes = _by_node(reports)
    parts = [f"{len(reports)} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)} agree"]
    parts.append(f"all-reduce of one number {max(r.latency_us for r in reports):.0f} us")
    inside = [n[0].node_gb_per_s for n in nodes if n[0].node_gb_per_s is not None]
    if inside:
        parts.append(f"{min(inside):.2f} GB/s within a node")
    if nodes[0][0].next_gb_per_s is not None:
        parts.append(f"{min(sum(r.next_gb_per_s or 0 for r in n) for n in nodes):.2f} GB/s from node to node")
    return "doctor: " + ", ".join(parts)


def describe(reports: Sequence[Report]) -> list[str]:
    """A line for each rank: where it is, and what it found."""
    lines = []
    for r in reports:
        shm = "" if r.shm_free_gib is None else f", {r.shm_free_gib:.1f} GiB in /dev/shm"
        rates = [f"{rate:.2f} GB/s {where}" for rate, where in
                 ((r.node_gb_per_s, "in the node"), (r.next_gb_per_s, "to the next")) if rate is not None]
        latencies = ((r.node_latency_us, "in the node"), (r.next_latency_us, "to the next"))
        rates += [f"{taken:.0f} us {where}" for taken, where in latencies if taken is not None]
        links = "".join(f", {rate}" for rate in rates)
        gpu = f", {r.versions['GPU']}" if "GPU" in r.versions else ""
        lines.append(f"rank {r.rank}  {r.place}{gpu}, {r.disk_free_gib:.1f} GiB free on disk{shm}{links}")
    return lines


def _unlike(reports: Sequence[Report], values: dict[int, str], say: Callable[[str, str], str]) -> list[str]:
    """A sentence for each node (or rank, where a node disagrees with itself) that is not like most.

    Of as many against as many, those with rank 0 are right.
    """
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: (counts[value], value == values[reports[0].rank]))
    found = []
    for node in _by_node(reports):
        theirs = {values[r.rank] for r in node}
        if len(theirs) == 1 and usual not in theirs:
            found.append(f"{node[0].place}: {say(theirs.pop(), usual)}")
        elif len(theirs) > 1:
            odd = [r for r in node if values[r.rank] != usual]
            found += [f"{r.place}, rank {r.rank}: {say(values[r.rank], usual)}" for r in odd]
    return found


def _others(rates: dict[int, float], node: int) -> float | None:
    others = [rate for other, rate in rates.items() if other != node]
    return median(others) if len(others) > 1 else None


def _by_node(reports: Sequence[Report]) -> list[list[Report]]:
    return [[r for r in reports if r.node == node] for node in sorted({r.node for r in reports})]


# --------------------------------------------------------------------- effects


def examine(
    world: World, config: str, data: str, run_dir: Path, needs: Needs, echo: Callable[[str], Any]
) -> list[Report]:
    """Look at every rank; raises the same LoadmasterError on all of them when a node is wrong.

    config, data: hashes of the resolved job and of the prepared rows. echo: hears the summary and the warnings.
    In a world of one there is nothing to compare.
    """
    if world.size == 1:
        return []
    mine = report(world, config, data, run_dir)
    reports = world.gather(mine)
    problems = differences(reports, needs)
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise LoadmasterError(f"the hosts are not fit to train together, nothing was trained:\n{listed}")
    echo(summary(reports))
    for warning in slow_links(reports, needs):
        echo(f"warning: slow link: {warning}")
    return reports


def report(world: World, config: str, data: str, run_dir: Path) -> Report:
    """This rank's; all ranks call it together."""
    latency_us, node_rate, next_rate, *latencies = measure_links(world)
    reset_peak(world.device)  # what was sent is not training's memory
    code, versions = code_hash(), _versions(world)
    disk, shm = _free_gib(run_dir), _free_gib(Path("/dev/shm"))
    world.barrier()  # so that the clocks are read at the same moment
    return Report(
        world.rank, world.node, os.environ.get("NODE_ADDR") or socket.gethostname(), code, config, data, versions,
        time.time(), disk or 0.0, shm, latency_us, node_rate, next_rate, *latencies,
    )


def measure_links(world: World) -> tuple[float, float | None, float | None, float | None, float | None]:
    """Microseconds of the smallest all-reduce, GB/s within this node, GB/s of this rank to its peer on the next;
    microseconds of the smallest message within the node and to the next."""
    one = torch.ones(1, device=world.device)
    latency_us = _timed(lambda: dist.all_reduce(one), world, 10 * REPEATS) * 1e6
    large = torch.ones(MEGABYTES[world.device.type] * 10**6 // 4, device=world.device)
    size_gb, node_rate, next_rate, node_us, next_us = large.nbytes / 1e9, None, None, None, None
    if world.local_size > 1:
        first = range(0, world.size, world.local_size)
        groups = [dist.new_group(list(range(f, min(f + world.local_size, world.size)))) for f in first]
        node_us = _timed(lambda: dist.all_reduce(one, group=groups[world.node]), world, 10 * REPEATS) * 1e6
        seconds = _timed(lambda: dist.all_reduce(large, group=groups[world.node]), world, REPEATS)
        node_rate = 2 * (world.local_size - 1) / world.local_size * size_gb / seconds
        dist.destroy_process_group(groups[world.node])
    if world.nodes > 1:
        after = (world.rank + world.local_size) % world.size
        before = (world.rank - world.local_size) % world.size

        def exchange(sent: torch.Tensor, received: torch.Tensor) -> None:
            steps = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
            for work in dist.batch_isend_irecv(steps):
                work.wait()

        small, received = torch.empty_like(one), torch.empty_like(large)
        next_us = _timed(lambda: exchange(one, small), world, 10 * REPEATS) * 1e6
        next_rate = size_gb / _timed(lambda: exchange(large, received), world, REPEATS)
    return latency_us, node_rate, next_rate, node_us, next_us


def _timed(work: Callable[[], Any], world: World, repeats: int) -> float:
    """Seconds a call takes, after one that sets the connections up."""
    work()
    world.barrier()
    _synchronize(world)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronize(world)
    return (time.perf_counter() - began) / repeats


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


@cache
def code_hash() -> str:
    """Hash of loadmaster's own files, as they are on this host."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".json"))
    return sha256_json([[os.fspath(p.relative_to(package)), sha256_file(p)] for p in files])


def _versions(world: World) -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    if world.device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(world.device)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _free_gib(folder: Path) -> float | None:
    """Free GiB where `folder` is or will be."""
    try:
        there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
        return shutil.disk_usage(there).free / GIB
    except (OSError, StopIteration):
        return None
