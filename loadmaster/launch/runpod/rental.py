"""What one order becomes at Runpod: a Pod, an Instant Cluster, or, where the user insists, a group of plain Pods.

A cluster is one thing to the API: made by one request, ended by one, its members cannot be deleted singly. Plain
Pods are made one after the other, as the others must know the first one's address; they are told apart by the
end of their names and belong together by its beginning. They reach each other by global networking only, which
carries 100 Mbit/s (the provider's documentation) against a cluster's 1600 Gbit/s and more.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from loadmaster.errors import ProviderError
from loadmaster.launch.provider import MOUNT, Machine, Order
from loadmaster.launch.runpod.client import RunpodClient
from loadmaster.launch.runpod.types import (
    Cluster,
    ClusterCompute,
    CreateCluster,
    CreatePod,
    Mounts,
    NetworkMount,
    Pod,
    PodGpu,
    body,
)
from loadmaster.training.ranks import NCCL_DEFAULT

MIN_CUDA = "13.0"
"""What torch's wheels from PyPI are built for since 2.11; hosts with an older driver do not run them."""
NODE = re.compile(r"-node(\d+)$")
PORT = "29500"


def alive(pod: Pod) -> bool:
    return pod.status not in ("EXITED", "ERROR", "TERMINATED")  # one that nobody knows yet costs money as well


def rent(client: RunpodClient, order: Order) -> Machine:
    """Raises ProviderError; what was made of a group before that is deleted again."""
    if order.offer.nodes == 1:
        return pod_machine(client.create_pod(_pod(order)))
    if not order.plain:
        return cluster_machine(client.create_cluster(_cluster(order)), [])
    made: list[Pod] = []
    try:
        for node in range(order.offer.nodes):
            made.append(client.create_pod(_node(order, node, made[0].id if made else None)))
    except BaseException:
        with contextlib.suppress(ProviderError):  # what hinders that is not what went wrong; it is looked for by name
            end(client, [pod.id for pod in made])
        raise
    return groups(made)[0]


def end(client: RunpodClient, pods: Sequence[str]) -> None:
    """Delete all of them: where one is refused, the others cost money as well. Raises ProviderError for the first."""
    refused: ProviderError | None = None
    for id in pods:
        try:
            client.delete_pod(id)
        except ProviderError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def refresh(client: RunpodClient, machine: Machine) -> Machine | None:
    if machine.kind == "Instant Cluster":
        cluster = client.cluster(machine.id)
        return None if cluster is None else cluster_machine(cluster, client.cluster_pods(machine.id))
    ids = machine.members or (machine.id,)
    found = [pod for id in ids if (pod := client.pod(id)) and pod.status != "TERMINATED"]
    if not found:
        return None
    if machine.kind == "Pod":
        return pod_machine(found[0])
    group = groups(found)[0]
    return group if len(found) == len(ids) else replace(group, alive=False, status=f"{len(found)} of {len(ids)} there")


def listed(pods: list[Pod], clusters: list[Cluster]) -> list[Machine]:
    """Single Pods, groups and clusters; `pods` has the members of the clusters, too."""
    own = [pod for pod in pods if pod.cluster is None and pod.status != "TERMINATED"]
    joined = [cluster_machine(c, [p for p in pods if p.cluster and p.cluster.id == c.id]) for c in clusters]
    return [*(pod_machine(pod) for pod in own if not NODE.search(pod.name)), *groups(own), *joined]


def member(client: RunpodClient, machine: Machine, node: int) -> str | None:
    """Id of the Pod that is that node; None while it has none."""
    if machine.kind == "Pods":
        return machine.members[node] if node < len(machine.members) else None
    found = client.cluster_pods(machine.id)
    return next((pod.id for pod in found if pod.cluster is not None and pod.cluster.rank == node), None)


def pod_machine(pod: Pod) -> Machine:
    label = f"{pod.gpu.count}x {pod.gpu.id}" if pod.gpu else "CPU"
    return Machine(pod.id, pod.name, pod.status, alive(pod), label, pod.cost, pod.created_at, pod.env)


def cluster_machine(cluster: Cluster, members: list[Pod]) -> Machine:
    compute = cluster.compute
    ordered = sorted(members, key=lambda pod: (pod.cluster is None or pod.cluster.rank is None, _rank(pod)))
    label = f"{compute.pod_count} nodes of {compute.gpu_count_per_pod}x {compute.gpu_type_id}"
    return _several("Instant Cluster", cluster.id, cluster.name, label, cluster.created_at, ordered, compute.pod_count)


def groups(pods: list[Pod]) -> list[Machine]:
    """Plain Pods that were rented together, as one machine each."""
    by_name: dict[str, list[Pod]] = {}
    for pod in pods:
        if NODE.search(pod.name):
            by_name.setdefault(NODE.sub("", pod.name), []).append(pod)
    return [_group(name, sorted(members, key=_rank)) for name, members in by_name.items()]


def _group(name: str, pods: list[Pod]) -> Machine:
    gpu = pods[0].gpu
    label = f"{len(pods)} Pods of {gpu.count}x {gpu.id}" if gpu else f"{len(pods)} Pods"
    return _several("Pods", pods[0].id, name, label, min(pod.created_at for pod in pods), pods, len(pods))


def _several(
    kind: Literal["Instant Cluster", "Pods"], id: str, name: str, label: str, created: datetime, pods: list[Pod],
    nodes: int,
) -> Machine:
    return Machine(
        id=id, name=name, status=_statuses(pods), alive=all(map(alive, pods)), label=label,
        usd_per_hour=sum(pod.cost for pod in pods), created=created, env=pods[0].env if pods else {}, kind=kind,
        nodes=nodes, members=tuple(pod.id for pod in pods),
    )


def _rank(pod: Pod) -> int:
    if pod.cluster is not None:
        return pod.cluster.rank or 0
    match = NODE.search(pod.name)
    return int(match.group(1)) if match else 0


def _statuses(pods: list[Pod]) -> str:
    """PROVISIONING where there is none yet."""
    counts = sorted(Counter(pod.status for pod in pods).items())
    return ", ".join(f"{count} {status}" for status, count in counts) or "PROVISIONING"


def requests(api: str, order: Order) -> list[dict[str, Any]]:
    if order.offer.nodes == 1:
        return [{"method": "POST", "url": f"{api}/pods", "body": body(_pod(order))}]
    if not order.plain:
        return [{"method": "POST", "url": f"{api}/clusters", "body": body(_cluster(order))}]
    nodes = range(order.offer.nodes)
    first = "<id of the Pod above>"
    return [
        {"method": "POST", "url": f"{api}/pods", "body": body(_node(order, node, first if node else None))}
        for node in nodes
    ]


def _pod(order: Order) -> CreatePod:
    return CreatePod(
        name=order.name,
        image=order.image,
        args=order.arguments,
        gpu=PodGpu(order.offer.gpu_id, order.offer.count, MIN_CUDA),
        disk=order.disk_gb,
        env=_env(order),
        cloud="SECURE" if order.cloud == "secure" else "COMMUNITY",
        data_center_ids=list(order.places) or None,
        mounts=_mounts(order),
    )


def _env(order: Order) -> dict[str, str]:
    """With references to secrets, which the service fills in on the machine."""
    return {**order.env, **{name: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for name, secret in order.secrets.items()}}


def _mounts(order: Order) -> Mounts | None:
    return None if order.volume is None else Mounts(network=[NetworkMount(order.volume.id, MOUNT)])


def _cluster(order: Order) -> CreateCluster:
    return CreateCluster(
        name=order.name,
        compute=ClusterCompute(order.offer.gpu_id, order.offer.count, order.offer.nodes),
        image=order.image,
        type="TRAINING",
        args=order.arguments,
        disk=order.disk_gb,
        env=_env(order),
        mounts=_mounts(order),
        data_center_ids=list(order.places) or None,
    )


def _node(order: Order, node: int, first: str | None) -> CreatePod:
    """first: id of node 0's Pod, which is its name in the others' network."""
    shape = {
        "NUM_NODES": str(order.offer.nodes),
        "NODE_RANK": str(node),
        "NUM_TRAINERS": str(order.offer.count),
        "MASTER_ADDR": "localhost" if first is None else f"{first}.runpod.internal",
        "MASTER_PORT": PORT,
        "NCCL_SOCKET_IFNAME": NCCL_DEFAULT,  # launch/torchrun.py would ask for ens1
    }
    named = replace(order, name=f"{order.name}-node{node}", env={**shape, **order.env})
    return replace(_pod(named), global_networking=True)
