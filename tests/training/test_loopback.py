"""Where all processes are on one host, no other host reaches where they meet. In process."""

from __future__ import annotations

import os
import socket

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from loadmaster.errors import LoadmasterError
from loadmaster.training import loopback
from loadmaster.training.agent import Workers, _launch_config
from loadmaster.training.interface import stay_on_this_host
from loadmaster.training.world import meet
from tests.launch.fake_runpod import free_port


def listened_at(port: int) -> set[str]:
    found = psutil.Process().net_connections("tcp")
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN and each.laddr.port == port}


def test_the_workers_of_one_host_meet_where_no_other_host_reaches():
    backend = _launch_config(Workers(2, ["train.py"]))["rdzv_backend"]
    handler = rendezvous_handler_registry.create_handler(RendezvousParameters(backend, loopback.ADDRESS, "a", 1, 1))
    there = handler.next_rendezvous().bootstrap_store_info
    assert listened_at(there.master_port) == {"127.0.0.1"}
    worker = TCPStore(there.master_addr, there.master_port, is_master=False, wait_for_workers=False)
    worker.set("a", "b")
    assert worker.get("a") == b"b"


HOSTS = {
    "127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "LOCALHOST": "127.0.0.1", "2130706433": "127.0.0.1",
    "127.0.1.1": "127.0.1.1", "::1": "::1", "::ffff:127.0.0.1": "127.0.0.1",
}


@pytest.mark.parametrize("host", HOSTS)
def test_so_do_ranks_that_another_launcher_started_there(host, monkeypatch):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", str(port))
    kept = [meet(0, 1, f"loadmaster/group/{job}") for job in range(2)]  # of a sweep
    assert listened_at(port) == {HOSTS[host]}
    assert kept[1].check(["loadmaster/group/0/here/0"])


def stand_for(addresses: list[str], monkeypatch) -> None:
    """Let every name stand for these."""

    def found(host, *_, flags=0, **__):
        if flags & socket.AI_NUMERICHOST and not host[0].isdigit():
            raise socket.gaierror("Name or service not known")
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(family, 1, 6, "", (address, 0)) for family, address in zip(families, addresses, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.mark.parametrize(("addresses", "local"), [(["127.0.1.1"], True), (["127.0.1.1", "10.0.0.7"], False)])
def test_a_hosts_own_name_is_local_where_it_stands_for_loopback_alone(addresses, local, monkeypatch):
    stand_for(addresses, monkeypatch)
    assert loopback.ear("the-host", 0) is None  # nobody says that the others are on this host, who may know another
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    descriptor = loopback.ear("the-host", 0)
    assert (descriptor is not None, loopback.is_loopback("the-host")) == (local, local)
    if descriptor is not None:
        with socket.socket(fileno=descriptor) as ear:
            assert ear.getsockname()[0] == "127.0.1.1"


def test_localhost_is_ipv4s_where_it_is_both(monkeypatch):
    stand_for(["::1", "127.0.0.1"], monkeypatch)
    with socket.socket(fileno=loopback.ear("localhost", 0)) as ear:
        assert ear.getsockname()[0] == "127.0.0.1"


def test_others_reach_the_first_of_several_hosts_which_may_call_itself_localhost(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(LoadmasterError, match="missing: rank 1") as raised:
        meet(0, 2, "loadmaster/group/0", patience_s=0.5)
    assert listened_at(port) not in (set(), {"127.0.0.1"}), raised  # which holds the store


def test_gloo_listens_at_this_hosts_own_interface_unless_it_is_told_another(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    stay_on_this_host()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    stay_on_this_host()
    assert "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[os.environ["GLOO_SOCKET_IFNAME"]]}
