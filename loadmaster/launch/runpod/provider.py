"""Runpod as a Provider: Pods, network volumes and the live catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loadmaster import catalog
from loadmaster.launch.provider import PREFIX, LogLine, Machine, NoCapacity, Offer, Order, Volume
from loadmaster.launch.runpod.client import RunpodClient
from loadmaster.launch.runpod.http import Refused
from loadmaster.launch.runpod.types import (
    CreateNetworkVolume,
    CreatePod,
    Mounts,
    NetworkMount,
    NetworkVolume,
    Pod,
    PodGpu,
    body,
)

MOUNT = "/workspace"
MIN_CUDA = "13.0"
"""What torch's wheels from PyPI are built for since 2.11; hosts with an older driver do not run them."""
STOCK = ("HIGH", "MEDIUM", "LOW")


class Runpod:
    name = "runpod"

    def __init__(self, client: RunpodClient | None = None):
        self.client = client or RunpodClient()

    @property
    def api(self) -> str:
        return self.client.api.base_url

    def offers(self, gpus: list[str], counts: tuple[int, ...], cloud: str) -> list[Offer]:
        """Of the catalogue's `gpus`, what is in stock; one call for each count, as stock depends on it."""
        names = {catalog.gpus()[gpu]["name"]: gpu for gpu in gpus}
        found = []
        for count in counts:
            for kind in self.client.gpus("POD", count, cloud.upper()):
                stocked = sorted(
                    (place for place in kind.data_centers if place.availability in STOCK),
                    key=lambda place: STOCK.index(place.availability),
                )
                most = getattr(kind.max_count, cloud)
                if kind.id in names and count <= most and kind.availability not in (None, "NONE"):
                    price = getattr(kind.price, cloud) * count
                    places = tuple(place.id for place in stocked)
                    found.append(Offer(names[kind.id], kind.id, count, price, places))
        return found

    def volumes(self) -> list[Volume]:
        return [_volume(volume) for volume in self.client.volumes()]

    def create_volume(self, name: str, size_gb: int, place: str) -> Volume:
        return _volume(self.client.create_volume(CreateNetworkVolume(name, size_gb, place)))

    def delete_volume(self, id: str) -> None:
        self.client.delete_volume(id)

    def rent(self, order: Order) -> Machine:
        try:
            return _machine(self.client.create_pod(_pod(order)))
        except Refused as error:
            if error.status == 400:  # the service has one answer for a broken rule and for want of stock
                raise NoCapacity(str(error)) from None
            raise

    def machine(self, id: str) -> Machine | None:
        pod = self.client.pod(id)
        return None if pod is None or pod.status == "TERMINATED" else _machine(pod)

    def machines(self) -> list[Machine]:
        pods = self.client.pods()
        return [_machine(p) for p in pods if p.name.startswith(PREFIX) and p.status != "TERMINATED"]

    def log(self, id: str, since: str | None) -> Iterator[LogLine]:
        return (LogLine(event.id, event.ts, event.line) for event in self.client.pod_log(id, since))

    def terminate(self, id: str) -> None:
        self.client.delete_pod(id)

    def rent_request(self, order: Order) -> dict[str, Any]:
        return {"method": "POST", "url": f"{self.api}/pods", "body": body(_pod(order))}

    def volume_request(self, name: str, size_gb: int, place: str) -> dict[str, Any]:
        request = CreateNetworkVolume(name, size_gb, place)
        return {"method": "POST", "url": f"{self.api}/network-volumes", "body": body(request)}


def _pod(order: Order) -> CreatePod:
    mounts = None
    if order.volume is not None:
        mounts = Mounts(network=[NetworkMount(order.volume.id, MOUNT)])
    return CreatePod(
        name=order.name,
        image=order.image,
        args=order.arguments,
        gpu=PodGpu(order.offer.gpu_id, order.offer.count, MIN_CUDA),
        disk=order.disk_gb,
        env=order.env,
        cloud="SECURE" if order.cloud == "secure" else "COMMUNITY",
        data_center_ids=list(order.places) or None,
        mounts=mounts,
    )


def _volume(volume: NetworkVolume) -> Volume:
    return Volume(volume.id, volume.name, volume.size, volume.data_center)


def _machine(pod: Pod) -> Machine:
    label = f"{pod.gpu.count}x {pod.gpu.id}" if pod.gpu else "CPU"
    alive = pod.status in ("PROVISIONING", "STARTING", "RUNNING")
    return Machine(pod.id, pod.name, pod.status, alive, label, pod.cost, pod.created_at, pod.env)
