"""A meeting place that only this host reaches.

TCPStore listens at every interface and asks nobody who he is; the peers that gloo connects to are named in it, ranks
unpickle what those send, and the elastic agent's own rendezvous (c10d) unpickles what lies in the store. So where all
processes are on this host, it listens at 127.0.0.1 alone.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

ADDRESS = "127.0.0.1"
BACKEND = "loadmaster-loopback"
CONNECT_S = 60


def is_loopback(host: str) -> bool:
    """Whether a name, or an address in whatever notation, stands for this host's loopback alone."""
    return _loopback(host) is not None


def _loopback(host: str) -> tuple[socket.AddressFamily, str] | None:
    """Its address there, IPv4's where there are both."""
    # Debian's hosts know themselves at 127.0.1.1, and others of the same world may know them elsewhere.
    may_be_name = host.lower() == "localhost" or "LOCAL_WORLD_SIZE" in os.environ
    flags = 0 if may_be_name else socket.AI_NUMERICHOST
    try:
        places = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError):
        return None
    found = [_as_bound(family, place[0]) for family, *_, place in places]
    return min(found) if all(ip_address(address).is_loopback for _, address in found) else None


def _as_bound(family: socket.AddressFamily, address: str) -> tuple[socket.AddressFamily, str]:
    """An IPv4 address that is written as IPv6's (::ffff:127.0.0.1) is itself."""
    mapped = getattr(ip_address(address), "ipv4_mapped", None)
    return (socket.AF_INET, str(mapped)) if mapped else (family, address)


def ear(host: str, port: int) -> int | None:
    """A listening socket's descriptor at one of loopback's addresses, for the store to take over; None for other
    hosts' meeting places, and where the port is taken: by the store itself, which this process keeps from one job of a
    sweep to the next, or by another, which the store says."""
    found = _loopback(host)
    if found is None:
        return None
    family, address = found
    try:
        return socket.create_server((address, port), family=family).detach()
    except OSError:
        return None


class _Rendezvous(StaticTCPRendezvous):
    def __init__(self, run_id: str):
        listening = socket.create_server((ADDRESS, 0))
        super().__init__(ADDRESS, listening.getsockname()[1], 0, 1, run_id, CONNECT_S)
        self._store = TCPStore(
            ADDRESS, self.master_port, 1, True, timedelta(seconds=CONNECT_S), multi_tenant=True,
            master_listen_fd=listening.detach(),
        )

    def get_backend(self) -> str:
        return BACKEND


def _create(parameters: RendezvousParameters) -> Any:
    return _Rendezvous(parameters.run_id)


def register() -> None:
    """Tell the elastic agent of it, as a kind of rendezvous."""
    rendezvous_handler_registry.register(BACKEND, _create)
