"""Runpod's control plane, REST API v2, typed: Pods, clusters, volumes, endpoints, catalogue.

A creation that got no readable answer may have happened, and a second one would be paid for as well. So every
creation here carries a name that is used once: after a doubtful answer the list is read, what bears the name is
taken, and only when there is nothing is it asked again. Where that still made two, the younger ones are deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from loadmaster.launch.runpod.http import Api, Refused, Unsure, from_environment
from loadmaster.launch.runpod.types import (
    Cluster,
    CreateCluster,
    CreateEndpoint,
    CreateNetworkVolume,
    CreatePod,
    Endpoint,
    EndpointBill,
    GpuType,
    NetworkVolume,
    Pod,
    UpdateEndpoint,
    Worker,
    body,
    parse,
)

FLASHBOOT_SUFFIX = " -fb"
LOG_IDLE_S = 20.0
LOG_TAIL = 5000
"""The most that the service sends of what was logged before."""


class Named(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class LogEvent:
    id: str
    ts: str
    """RFC 3339, as the service wrote it."""
    source: str
    """container, or system for what the host says."""
    line: str


class RunpodClient(AbstractContextManager):
    """Methods are named after the resource; ids are the provider's; None stands for what does not exist (404).

    All raise ProviderError (its message says what to do): Refused with .status, Throttled, NotSent, Unsure.
    """

    def __init__(self, api: Api | None = None):
        self.api = api or from_environment()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.api.close()

    # ---------------------------------------------------------------- Pods

    def pods(self, cluster_members: bool = False) -> list[Pod]:
        members = "true" if cluster_members else None
        return self._list("/pods", "pods", Pod, includeClusterPods=members)

    def pod(self, id: str) -> Pod | None:
        return self._get("/pods", id, Pod)

    def create_pod(self, request: CreatePod) -> Pod:
        return self._create("/pods", request, Pod, self.pods, self.delete_pod)

    def delete_pod(self, id: str) -> None:
        """Terminate: compute and disk end, a network volume stays. Already gone is well."""
        self._delete("/pods", id)

    def pod_log(self, id: str, since: str | None = None, idle_s: float = LOG_IDLE_S) -> Iterator[LogEvent]:
        """Container lines as they come, from the time `since` on (its own lines may come again).

        Ends when the service closes the stream; raises Unsure when it is silent for idle_s.
        """
        path = f"/pods/{quote(id, safe='')}/logs"
        with self.api.stream(path, idle_s, source="container", tail=LOG_TAIL, since=since) as lines:
            yield from _events(lines)

    # ------------------------------------------------------------ clusters

    def clusters(self) -> list[Cluster]:
        return self._list("/clusters", "clusters", Cluster)

    def cluster(self, id: str) -> Cluster | None:
        return self._get("/clusters", id, Cluster)

    def cluster_pods(self, id: str) -> list[Pod]:
        return self._list(f"/clusters/{quote(id, safe='')}/pods", "pods", Pod)

    def create_cluster(self, request: CreateCluster) -> Cluster:
        return self._create("/clusters", request, Cluster, self.clusters, self.delete_cluster)

    def delete_cluster(self, id: str) -> None:
        self._delete("/clusters", id)

    # ------------------------------------------------------------- volumes

    def volumes(self) -> list[NetworkVolume]:
        return self._list("/network-volumes", "networkVolumes", NetworkVolume)

    def volume(self, id: str) -> NetworkVolume | None:
        return self._get("/network-volumes", id, NetworkVolume)

    def create_volume(self, request: CreateNetworkVolume) -> NetworkVolume:
        """The name must not be taken: the service allows several volumes of one name, this client does not.

        A twin is left alone, unlike other twins: it might be somebody's data.
        """
        return self._create("/network-volumes", request, NetworkVolume, self.volumes, lambda id: None)

    def delete_volume(self, id: str) -> None:
        self._delete("/network-volumes", id)

    # ----------------------------------------------------------- endpoints

    def endpoints(self) -> list[Endpoint]:
        return self._list("/serverless", "endpoints", Endpoint)

    def create_endpoint(self, request: CreateEndpoint) -> Endpoint:
        return self._create("/serverless", request, Endpoint, self.endpoints, self.delete_endpoint)

    def update_endpoint(self, id: str, change: UpdateEndpoint) -> Endpoint:
        path = f"/serverless/{quote(id, safe='')}"
        return self.api.call("PATCH", path, lambda answer: parse(Endpoint, answer), body(change))

    def delete_endpoint(self, id: str) -> None:
        self._delete("/serverless", id)

    def endpoint_bills(self, id: str, hours: int) -> list[EndpointBill]:
        """What the endpoint cost in each of the last `hours` hours, the present one included; hours without are left
        out."""
        query = {"serverlessId": id, "bucketSize": "hour", "lastN": hours}
        read = lambda answer: parse(list[EndpointBill], answer["records"])  # noqa: E731
        return self.api.call("GET", "/billing/serverless", read, **query)

    def workers(self, endpoint_id: str) -> list[Worker]:
        return self._list(f"/serverless/{quote(endpoint_id, safe='')}/workers", "workers", Worker)

    # ----------------------------------------------------------- catalogue

    def gpus(self, product: str = "POD", count: int = 1, cloud: str | None = None) -> list[GpuType]:
        """GPU types with list prices and present stock. product: POD, CLUSTER or SERVERLESS."""
        return self._list(
            "/catalog/gpus", "gpus", GpuType, include="AVAILABILITY", product=product, count=count, cloud=cloud
        )

    # ------------------------------------------------------------- inside

    def _list(self, path: str, key: str, kind: type[N], **query: Any) -> list[N]:
        return self.api.call("GET", path, lambda answer: parse(list[kind], answer[key]), **query)  # type: ignore[valid-type]

    def _get(self, path: str, id: str, kind: type[N]) -> N | None:
        try:
            return self.api.call("GET", f"{path}/{quote(id, safe='')}", lambda answer: parse(kind, answer))
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def _delete(self, path: str, id: str) -> None:
        try:
            self.api.call("DELETE", f"{path}/{quote(id, safe='')}", lambda answer: None)
        except Refused as error:
            if error.status != 404:
                raise

    def _create(
        self, path: str, request: Any, kind: type[N], listed: Callable[[], Sequence[N]], delete: Callable[[str], None]
    ) -> N:
        """POST once; after a doubtful answer look for the name before asking again."""
        doubtful = False

        def ask() -> N:
            nonlocal doubtful
            if doubtful and (made := _oldest(listed(), request.name)):
                return self._alone(made, listed, delete)
            asked_before, doubtful = doubtful, True
            made = self.api.call("POST", path, lambda answer: parse(kind, answer), body(request))
            return self._alone(made, listed, delete) if asked_before else made

        return self.api.attempts((Unsure,))(ask)

    def _alone(self, made: N, listed: Callable[[], Sequence[N]], delete: Callable[[str], None]) -> N:
        """Delete whatever else bears the name of `made`: a first request that was carried out late."""
        for twin in listed():
            if asked_for(twin.name) == asked_for(made.name) and twin.id != made.id:
                delete(twin.id)
        return made


def _oldest(things: Sequence[N], name: str) -> N | None:
    named = [thing for thing in things if asked_for(thing.name) == name]
    return min(named, key=lambda thing: str(getattr(thing, "created_at", "")), default=None)


def asked_for(name: str) -> str:
    """The name that was asked for: the service adds a suffix to those of endpoints with FlashBoot."""
    return name.removesuffix(FLASHBOOT_SUFFIX)


def _events(lines: Iterator[str]) -> Iterator[LogEvent]:
    """Server-sent events: `id:` and `data:` lines, a blank line ends each; what is not JSON is left out."""
    id, data = "", []
    for line in lines:
        if line.startswith("id:"):
            id = line[3:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            try:
                value = json.loads("\n".join(data))
                yield LogEvent(id, str(value["ts"]), str(value["source"]), str(value["line"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
            data = []
