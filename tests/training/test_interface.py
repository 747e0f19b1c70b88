"""The interface that leads to the other hosts; over real ones: test_two_hosts.py."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist

from loadmaster.training import interface
from loadmaster.training.ranks import NCCL_DEFAULT

ROUTES = [
    {"first": "127.0.1.1", "10.7.0.2": "10.7.0.1"},  # host 0, which knows its own name as Ubuntu has it
    {"first": "10.7.0.2"},
]
BOUND = {"lo": ["127.0.0.1"], "eth0": ["172.18.0.2"], "net1": ["fe80::1%net1", "10.7.0.1", "10.7.0.2"]}


@pytest.fixture
def settled(monkeypatch):
    bound = {name: [SimpleNamespace(address=one) for one in all_of_it] for name, all_of_it in BOUND.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: bound)
    store = dist.HashStore()
    store.set("loadmaster/address/0", "127.0.1.1")  # the hosts come here one after the other

    def settle(rank, routes, **env):
        monkeypatch.setattr(os, "environ", env)
        monkeypatch.setattr(interface, "towards", lambda host: routes[rank].get(host, ""))
        interface.settle_interface(store, rank, 2, "first")
        return env.get("GLOO_SOCKET_IFNAME"), env.get("NCCL_SOCKET_IFNAME")

    return settle


def test_each_host_takes_the_one_that_leads_to_the_others_unless_it_was_told(settled):
    assert settled(1, ROUTES) == ("net1", None)
    assert settled(0, ROUTES) == ("net1", None)
    assert settled(0, ROUTES, NCCL_SOCKET_IFNAME=NCCL_DEFAULT) == ("net1", "=net1")  # a plain Pod at Runpod
    assert settled(0, ROUTES, GLOO_SOCKET_IFNAME="eth0", NCCL_SOCKET_IFNAME="ib0") == ("eth0", "ib0")


def test_hosts_of_one_machine_are_left_alone(settled):
    alone = [{"first": "127.0.0.1"}, {}]  # and one that has no network
    assert settled(1, alone) == (None, None)
    assert settled(0, alone) == (None, None)


def test_the_way_to_this_machine_itself_is_over_loopback():
    assert interface.towards("127.0.0.1") == "127.0.0.1"


def test_an_interface_that_gloo_was_told_and_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(RuntimeError) as raised:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    said = interface.no_such_interface(raised.value)
    assert said.startswith("GLOO_SOCKET_IFNAME names nosuch0, which is none of this host's") and "lo" in said
    assert interface.no_such_interface(RuntimeError("Connection closed by peer")) is None
