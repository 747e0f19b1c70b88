"""What launching needs of a cloud, whichever it is: the edge at which a second provider would join.

Everything that is made carries a name that starts with PREFIX and is used once; that is how it is found again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

PREFIX = "loadmaster-"


@dataclass(frozen=True)
class Offer:
    """A machine that can be rented."""

    gpu: str
    """Catalogue name."""
    gpu_id: str
    """The provider's name for it."""
    count: int
    usd_per_hour: float
    """Of all its GPUs, the provider's list price at this moment."""
    places: tuple[str, ...]
    """Data centres that have it in stock, fullest first; empty: unknown, the provider chooses."""

    @property
    def label(self) -> str:
        return f"{self.count}x {self.gpu}"


@dataclass(frozen=True)
class Volume:
    id: str
    name: str
    size_gb: int
    place: str


@dataclass(frozen=True)
class Order:
    """A machine with what runs on it."""

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


@dataclass(frozen=True)
class Machine:
    id: str
    name: str
    status: str
    """In the provider's word."""
    alive: bool
    """False: its container has ended, though its disk may go on costing."""
    label: str
    usd_per_hour: float
    created: datetime
    env: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class LogLine:
    id: str
    at: str
    text: str


class NoCapacity(Exception):
    """The machine is not to be had there at present, says the provider; another place or machine may do."""


class Provider(Protocol):
    """All methods raise ProviderError, rent() also NoCapacity. None of them makes anything twice."""

    name: str

    @property
    def api(self) -> str:
        """Base URL under which a machine ends itself."""
        ...

    def offers(self, gpus: list[str], counts: tuple[int, ...], cloud: str) -> list[Offer]: ...

    def volumes(self) -> list[Volume]: ...

    def create_volume(self, name: str, size_gb: int, place: str) -> Volume: ...

    def delete_volume(self, id: str) -> None: ...

    def rent(self, order: Order) -> Machine: ...

    def machine(self, id: str) -> Machine | None: ...

    def machines(self) -> list[Machine]:
        """Those that this tool has made."""
        ...

    def log(self, id: str, since: str | None) -> Iterator[LogLine]:
        """Lines as they come; ends, or raises, when none came for a while."""
        ...

    def terminate(self, id: str) -> None: ...

    def rent_request(self, order: Order) -> dict[str, Any]:
        """The very request that rent() sends: method, url and body."""
        ...

    def volume_request(self, name: str, size_gb: int, place: str) -> dict[str, Any]: ...
