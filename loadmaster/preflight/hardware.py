"""What there is to train on: the machine's own GPUs or CPU, or machines of the catalogue. No torch.

What the driver says of a card's memory (nvml.py) counts what it keeps itself, so the catalogue's usable figure is taken
for a known card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from loadmaster import catalog
from loadmaster.config.schema import HardwareConfig
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.nvml import local_gpus
from loadmaster.processors import threads
from loadmaster.words import counted

GIB = 2**30
OWN_PRICE = "plan.prices_usd_per_hour"
DRIVER_SHARE = 0.994
"""Share of NVML's total that a process can use, of a card that is not in the catalogue (an H100's: 0.994)."""
UNKNOWN_NETWORK_GBPS = 1.0
"""Of a node, where the catalogue has no cluster of such machines."""
LEAST_SHARE = 0.98
"""The least of the catalogue's cards (L4, A10G, RTX 3090)."""


@dataclass(frozen=True)
class Hardware:
    """One or more equal machines. Bandwidths in 10^9 bytes/s, tflops in 10^12 dense operations/s."""

    gpu: str
    """Catalogue name, `cpu`, or the driver's name of a card that the catalogue does not know."""
    count: int
    nodes: int
    memory_gib: float
    host_memory_gib: float | None
    compute_capability: float
    bandwidth_gb_per_s: float
    tflops: dict[str, float]
    link_gb_per_s: float
    host_gb_per_s: float
    network_gbps: float = 0.0
    """Of a whole node."""
    usd_per_hour: float | None = None
    """Of everything: nodes x count x the price of a GPU."""
    price_note: str = ""
    known: bool = True
    """False: a card that is not in the catalogue; its speed is not predicted."""

    @property
    def world_size(self) -> int:
        return self.count * self.nodes

    @property
    def is_cpu(self) -> bool:
        return self.gpu == "cpu"

    @property
    def has_fp8(self) -> bool:
        return "fp8" in self.tflops and self.compute_capability >= 8.9

    def budget_gib(self, reserve: float) -> float:
        """What a plan may take of one GPU; reserve: the share that it leaves free (plan.reserve)."""
        return self.memory_gib * (1 - reserve)

    @property
    def label(self) -> str:
        if self.is_cpu:
            return "CPU" if self.world_size == 1 else f"{self.world_size} CPU processes"
        name = f"{self.count}x {self.gpu}"
        return f"{self.nodes} nodes of {name}" if self.nodes > 1 else name


def find_hardware(config: HardwareConfig) -> Hardware:
    """The machine that `hardware=` names.

    Raises ConfigError for a name that is neither local, cpu nor in the catalogue.
    """
    if config.gpu == "cpu":
        return cpu(1 if config.count == "auto" else config.count, config.nodes)
    if config.gpu == "local":
        return detect_local(config.count, config.nodes)
    if config.gpu not in catalog.gpus():
        names = ", ".join(["local", "cpu", *catalog.gpus()])
        message = "this GPU is not in the catalogue"
        raise ConfigError([Problem("hardware.gpu", config.gpu, IN_THE_JOB, message, f"use one of: {names}")])
    return from_catalog(config.gpu, 1 if config.count == "auto" else config.count, config.nodes)


def from_catalog(gpu: str, count: int, nodes: int = 1) -> Hardware:
    facts = catalog.gpus()[gpu]
    machine = next((m for m in catalog.machines() if m["gpu"] == gpu), {})
    price = catalog.prices()["gpus"].get(gpu)
    per_gpu = machine.get("host_memory_gib_per_gpu")
    return Hardware(
        gpu=gpu,
        count=count,
        nodes=nodes,
        memory_gib=facts["memory_gib"],
        host_memory_gib=None if per_gpu is None else float(per_gpu * count),
        compute_capability=facts["compute_capability"],
        bandwidth_gb_per_s=facts["bandwidth_gb_per_s"],
        tflops=facts["tflops"],
        link_gb_per_s=facts["link_gb_per_s"],
        host_gb_per_s=facts["host_gb_per_s"],
        network_gbps=machine.get("network_gbps", 0.0),
        usd_per_hour=None if price is None else price["pod_usd_per_hour"] * count * nodes,
        price_note="" if price is None else f"{catalog.prices()['provider']} list price of {dated(price)}",
    )


def dated(price: dict) -> str:
    """The day of a price of the catalogue, and where it is not one of the provider's own data centres."""
    return f"{price['date']} (community hosts)" if price.get("hosts") == "community" else str(price["date"])


def priced(hardware: Hardware, own: dict[str, float] | None) -> Hardware:
    """The machine at the job's own price of its GPU, if it gives one."""
    usd = (own or {}).get(hardware.gpu)
    if usd is None:
        return hardware
    return replace(hardware, usd_per_hour=usd * hardware.world_size, price_note=OWN_PRICE)


def not_offered(hardware: Hardware) -> str | None:
    """A sentence where a machine has a list price for each GPU and the catalogue has no such machine to rent."""
    machine = next((m for m in catalog.machines() if m["gpu"] == hardware.gpu), None)
    if machine is None or hardware.usd_per_hour is None or hardware.price_note == OWN_PRICE:
        return None
    counts, nodes = machine["counts"], machine["max_nodes"]
    if hardware.count in counts and (hardware.nodes == 1 or (hardware.nodes <= nodes and hardware.count == counts[-1])):
        return None
    comes = f"{', '.join(map(str, counts[:-1]))} or {counts[-1]} GPUs" + (" of one node" if nodes == 1 else "")
    clusters = f", or 2 to {nodes} nodes of {counts[-1]}" if nodes > 1 else ""
    said = f"the catalogue knows no {hardware.label} to rent: {hardware.gpu} comes as {comes}{clusters}"
    return f"{said}; the price here is that of so many single GPUs"


def unknown_network(hardware: Hardware) -> str | None:
    """A sentence where several nodes are planned whose network the catalogue does not know."""
    if hardware.nodes == 1 or hardware.network_gbps or not hardware.known:
        return None
    return (
        f"the network between nodes of {hardware.gpu} is not known here and taken for {UNKNOWN_NETWORK_GBPS:g} Gb/s: "
        "a faster one makes other plans, and faster ones"
    )


def rentable() -> list[Hardware]:
    """Every machine of the catalogue, clusters of 2 to max_nodes full nodes included."""
    found = []
    for machine in catalog.machines():
        found += [from_catalog(machine["gpu"], count) for count in machine["counts"]]
        found += [from_catalog(machine["gpu"], max(machine["counts"]), n) for n in range(2, machine["max_nodes"] + 1)]
    return found


def cpu(count: int = 1, nodes: int = 1) -> Hardware:
    """This machine's processors as `count` processes a node, which share its memory and its threads."""
    memory = host_memory_gib()
    return Hardware(
        gpu="cpu",
        count=count,
        nodes=nodes,
        memory_gib=memory / count,
        host_memory_gib=memory,
        compute_capability=0.0,
        bandwidth_gb_per_s=value("cpu", "bandwidth_gb_per_s") / count,
        tflops={"fp32": value("cpu", "tflops_per_thread") * threads() / count},
        link_gb_per_s=value("cpu", "gloo_gb_per_s"),
        host_gb_per_s=value("cpu", "bandwidth_gb_per_s"),
        network_gbps=8 * count * value("cpu", "gloo_gb_per_s"),
    )


def host_memory_gib() -> float:
    """Memory that this process may use: the container's limit where there is one, else the machine's."""
    limits = [_meminfo_bytes()]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits) / GIB


def _meminfo_bytes() -> int:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal:"))
    except OSError:  # macOS
        import psutil  # a plan on Linux is not to wait for it

        return psutil.virtual_memory().total


def detect_local(count: int | str = "auto", nodes: int = 1) -> Hardware:
    """This machine: its visible GPUs (all, or `count` of them), else its CPU."""
    cards = local_gpus()
    if not cards and count in ("auto", 1):
        return cpu(nodes=nodes)
    if not cards:
        remedy = f"hardware.gpu=cpu hardware.count={count} trains with {count} processes on this machine's processors"
        message = "this machine has no GPU, or no driver that shows it"
        raise ConfigError([Problem("hardware.count", count, IN_THE_JOB, message, remedy)])
    name, total_gib, capability = cards[0]
    alike = len(list(takewhile(lambda card: card[0] == name, cards)))  # ranks on unlike ones wait for the slowest
    count = alike if count == "auto" else int(count)
    if alike < count <= len(cards):
        message = f"this machine's GPUs are not alike: {', '.join(card[0] for card in cards)}"
        remedy = f"hardware.count={alike}, or CUDA_VISIBLE_DEVICES with the numbers of like ones"
        raise ConfigError([Problem("hardware.count", count, IN_THE_JOB, message, remedy)])
    if count > len(cards):
        message = f"this machine has {counted(len(cards), 'GPU')}"
        remedy = f"use hardware.count={len(cards)} or less, or name a machine of the catalogue with hardware.gpu"
        raise ConfigError([Problem("hardware.count", count, IN_THE_JOB, message, remedy)])
    host = host_memory_gib()
    known = catalog_name(name, total_gib)
    if known is not None:
        usable = catalog.gpus()[known]["memory_gib"]
        usable = usable if total_gib >= usable else total_gib * LEAST_SHARE  # ECC takes a part of some
        return replace(
            from_catalog(known, count, nodes),
            memory_gib=usable,
            host_memory_gib=host,
            usd_per_hour=None,
            price_note="",
        )
    return Hardware(  # known=False: no speed is worked out from these rates
        gpu=name,
        count=count,
        nodes=nodes,
        memory_gib=total_gib * DRIVER_SHARE,
        host_memory_gib=host,
        compute_capability=capability,
        bandwidth_gb_per_s=500.0,
        tflops={"bf16": 100.0, "fp32": 20.0},
        link_gb_per_s=16.0,
        host_gb_per_s=16.0,
        known=False,
    )


def catalog_name(driver_name: str, total_gib: float) -> str | None:
    """Catalogue name of the card that the driver calls so, if its memory agrees within 9%: ECC takes up to 6.3."""
    found = {}
    for key, facts in catalog.gpus().items():
        words = facts["match"]
        if all(re.search(rf"(?<![^ -]){word}(?![^ -])", driver_name, re.I) for word in words):
            found[key] = len(words), abs(total_gib / facts["memory_gib"] - 1)
    alike = [key for key, (_, off) in found.items() if off < 0.09]
    return max(alike, key=lambda key: found[key][0], default=None)
