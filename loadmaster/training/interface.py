"""The network interface that leads from this host to the others of its world.

Gloo takes the one of the host's name, which Debian and Ubuntu put at 127.0.1.1, where no other host finds it
(pytorch/gloo#40); a rented container's name may stand for one that ends at its own machine.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket

import psutil
from torch.distributed import Store

from loadmaster.training.ranks import NCCL_DEFAULT


def settle_interface(store: Store, rank: int, size: int, meeting: str) -> None:
    """Tell gloo its interface, unless it was told, and NCCL where it was told NCCL_DEFAULT. All ranks come here.

    meeting: where they meet, which its own host may know by an address of loopback; that one looks towards another.
    """
    keys = [f"loadmaster/address/{other}" for other in range(size)]
    own = towards(meeting)
    store.set(keys[rank], own)
    if not _is_seen(own):
        own = next((towards(other) for other in map(bytes.decode, store.multi_get(keys)) if _is_seen(other)), "")
    name = _name_of(own) if _is_seen(own) else ""
    if name:  # else all are on this host, or the way has an address that is no interface's
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if os.environ.get("NCCL_SOCKET_IFNAME") == NCCL_DEFAULT:
            os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"


def stay_on_this_host() -> None:
    """Tell gloo the interface that no other host reaches, unless it was told: it listens to whoever connects."""
    if name := _name_of("127.0.0.1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def no_such_interface(error: BaseException) -> str | None:
    """What to say where gloo was told an interface that this host does not have; None of another error."""
    named = re.search(r"Unable to find address for: (\S+)", str(error))
    if named is None:
        return None
    own = ", ".join(sorted(psutil.net_if_addrs()))
    return f"GLOO_SOCKET_IFNAME names {named[1]}, which is none of this host's network interfaces ({own}); unset it"


def towards(host: str) -> str:
    """This host's address on the way to another; nothing is sent. Empty where there is no way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return ""


def _is_seen(address: str) -> bool:
    return bool(address) and not ipaddress.ip_address(address).is_loopback


def _name_of(address: str) -> str:
    having = (name for name, bound in psutil.net_if_addrs().items() if address in (each.address for each in bound))
    return next(having, "")
