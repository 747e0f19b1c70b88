"""Runpod as a Provider: Pods, Instant Clusters, network volumes and the live catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loadmaster import catalog
from loadmaster.errors import ProviderError
from loadmaster.launch.provider import PREFIX, LogLine, Machine, NoCapacity, Offer, Order, Volume
from loadmaster.launch.runpod import rental
from loadmaster.launch.runpod.client import RunpodClient
from loadmaster.launch.runpod.http import Refused
from loadmaster.launch.runpod.types import CreateNetworkVolume, NetworkVolume, body
from loadmaster.launch.volume.bucket import Bucket

STOCK = ("HIGH", "MEDIUM", "LOW")


class Runpod:
    not_asked = ""

    def __init__(self, client: RunpodClient | None = None):
        self.client = client or RunpodClient()

    @property
    def api(self) -> str:
        return self.client.api.base_url

    def offers(
        self, gpus: list[str], counts: tuple[int, ...], cloud: str, nodes: int = 1, plain: bool = False
    ) -> list[Offer]:
        """Of the catalogue's `gpus`, what is in stock; one call for each count, as stock depends on it.

        The list price is that of Pods; a cluster's own rate is seen once it is there.
        """
        names = {catalog.gpus()[gpu]["name"]: gpu for gpu in gpus}
        product = "POD" if nodes == 1 or plain else "CLUSTER"
        found = []
        for count in counts:
            for kind in self.client.gpus(product, count, cloud.upper()):
                stocked = sorted(
                    (place for place in kind.data_centers if place.availability in STOCK),
                    key=lambda place: STOCK.index(place.availability),
                )
                most = getattr(kind.max_count, cloud)
                if kind.id in names and count <= most and kind.availability not in (None, "NONE"):
                    price = getattr(kind.price, cloud) * count * nodes
                    places = tuple(place.id for place in stocked)
                    found.append(Offer(names[kind.id], kind.id, count, price, places, nodes))
        return found

    def volumes(self) -> list[Volume]:
        return [_volume(volume) for volume in self.client.volumes()]

    def create_volume(self, name: str, size_gb: int, place: str) -> Volume:
        return _volume(self.client.create_volume(CreateNetworkVolume(name, size_gb, place)))

    def delete_volume(self, id: str) -> None:
        self.client.delete_volume(id)

    def bucket(self, volume: str) -> Bucket:
        found = self.client.volume(volume)
        if found is None:
            raise ProviderError(f"there is no network volume {volume} in this account any more")
        return Bucket(found.id, found.data_center)

    def rent(self, order: Order) -> Machine:
        try:
            return rental.rent(self.client, order)
        except Refused as error:
            if error.status == 400:  # the service has one answer for a broken rule and for want of stock
                raise NoCapacity(str(error)) from None
            raise

    def refresh(self, machine: Machine) -> Machine | None:
        return rental.refresh(self.client, machine)

    def machines(self) -> list[Machine]:
        pods, clusters = self.client.pods(cluster_members=True), self.client.clusters()
        ours = rental.listed(pods, clusters)
        return [machine for machine in ours if machine.name.startswith(PREFIX)]

    def log(self, machine: Machine, node: int, since: str | None) -> Iterator[LogLine]:
        id = machine.id if machine.kind == "Pod" else rental.member(self.client, machine, node)
        if id is None:
            raise ProviderError(f"node {node} of {machine.name} has no Pod yet")
        return (LogLine(event.id, event.ts, event.line) for event in self.client.pod_log(id, since))

    def terminate(self, machine: Machine) -> None:
        if machine.kind == "Instant Cluster":
            self.client.delete_cluster(machine.id)
            return
        rental.end(self.client, machine.members or (machine.id,))

    def rent_requests(self, order: Order) -> list[dict[str, Any]]:
        return rental.requests(self.api, order)

    def volume_request(self, name: str, size_gb: int, place: str) -> dict[str, Any]:
        request = CreateNetworkVolume(name, size_gb, place)
        return {"method": "POST", "url": f"{self.api}/network-volumes", "body": body(request)}


def _volume(volume: NetworkVolume) -> Volume:
    return Volume(volume.id, volume.name, volume.size, volume.data_center)
