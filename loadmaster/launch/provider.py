"""What launching needs of a cloud, whichever it is: the edge at which a second provider would join.

Everything that is made carries a name that starts with PREFIX and is used once; that is how it is found again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loadmaster.errors import ProviderError

if TYPE_CHECKING:
    from loadmaster.launch.volume.bucket import Bucket

PREFIX = "loadmaster-"
LATE_LOOKS = 6
"""How often, five seconds apart, what a lost request may have made is looked for: as long as a request may take."""
MOUNT = "/workspace"
"""Where a machine sees its volume; without one it is a folder of the container."""


@dataclass(frozen=True)
class Offer:
    """A machine, or a cluster of equal ones, that can be rented."""

    gpu: str
    """Catalogue name."""
    gpu_id: str
    """The provider's name for it."""
    count: int
    """GPUs in each node."""
    usd_per_hour: float
    """Of all its GPUs on all nodes, the provider's list price at this moment."""
    places: tuple[str, ...]
    """Data centres that have it in stock, fullest first; empty: unknown, the provider chooses."""
    nodes: int = 1
    is_of_community: bool = False
    """Whether it is the price of other people's hosts, for want of that of the secure ones, which would be rented."""

    @property
    def rate(self) -> str:
        hosts = " on community hosts, secure costs more" if self.is_of_community else ""
        return f"${self.usd_per_hour:.2f}/h{hosts}"

    @property
    def label(self) -> str:
        one = f"{self.count}x {self.gpu}"
        return one if self.nodes == 1 else f"{self.nodes} nodes of {one}"


@dataclass(frozen=True)
class Volume:
    id: str
    name: str
    size_gb: int
    place: str


@dataclass(frozen=True)
class Upload:
    """A file of this machine that goes to the volume."""

    path: Path
    name: str
    """On the volume."""
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Order:
    """A machine, or several, with what runs on each of them.

    On several nodes the provider sets NUM_NODES, NODE_RANK, NUM_TRAINERS (GPUs of a node), MASTER_ADDR and
    MASTER_PORT for each; launch/torchrun.py reads them.
    """

    name: str
    offer: Offer
    image: str
    arguments: str
    """One string, split as a shell would."""
    env: dict[str, str] = field(repr=False)
    disk_gb: int
    cloud: str
    volume: Volume | None
    places: tuple[str, ...]
    plain: bool = False
    """Several machines of their own, not a cluster with a fast network."""
    secrets: dict[str, str] = field(default_factory=dict)
    """Further environment variables -> name of the provider's secret that each is to hold."""
    uploads: tuple[Upload, ...] = ()
    """Files that have to be on the volume before the machine starts."""

    @property
    def job(self) -> dict[str, Any]:
        """What a machine is told to run."""
        return json.loads(self.env["LOADMASTER_JOB"])


@dataclass(frozen=True)
class Machine:
    """What one order became: a machine, a cluster, or a group of plain machines."""

    id: str
    name: str
    status: str
    """In the provider's words."""
    alive: bool
    """False: a container of it has ended, though it may go on costing."""
    label: str
    usd_per_hour: float
    """Of all its nodes; 0 while the provider does not say."""
    created: datetime
    env: dict[str, str] = field(repr=False)
    kind: Literal["Pod", "Instant Cluster", "Pods"] = "Pod"
    nodes: int = 1
    members: tuple[str, ...] = ()
    """Ids of the machines of a cluster or group that are there, in order of node; empty for a single one."""


@dataclass(frozen=True)
class LogLine:
    id: str
    at: str
    text: str


class NoCapacity(Exception):
    """The machine is not to be had there at present, says the provider; another place or machine may do."""


class NoAnswer(ProviderError):
    """Nobody knows: the network, or the provider, does not answer at present."""


class Provider(Protocol):
    """All methods raise ProviderError, rent() also NoCapacity. None of them makes anything twice."""

    not_asked: str
    """What offers() and volumes() were taken from where the provider was not asked, and why; empty where it was."""

    @property
    def api(self) -> str:
        """Base URL under which a machine ends itself."""
        ...

    def offers(
        self, gpus: list[str], counts: tuple[int, ...], cloud: str, nodes: int = 1, plain: bool = False
    ) -> list[Offer]: ...

    def volumes(self) -> list[Volume]: ...

    def create_volume(self, name: str, size_gb: int, place: str) -> Volume: ...

    def delete_volume(self, id: str) -> None: ...

    def bucket(self, volume: str) -> Bucket:
        """The files of a volume, by its id. Raises LoadmasterError without its key."""
        ...

    def rent(self, order: Order) -> Machine: ...

    def refresh(self, machine: Machine) -> Machine | None:
        """As it is now; None when it is gone."""
        ...

    def machines(self) -> list[Machine]:
        """Those that this tool has made."""
        ...

    def log(self, machine: Machine, node: int, since: str | None) -> Iterator[LogLine]:
        """Lines of one node as they come; ends, or raises, when none came for a while."""
        ...

    def terminate(self, machine: Machine) -> None:
        """End it with all its nodes."""
        ...

    def rent_requests(self, order: Order) -> list[dict[str, Any]]:
        """The very requests that rent() sends: method, url and body."""
        ...

    def volume_request(self, name: str, size_gb: int, place: str) -> dict[str, Any]: ...
