"""Runpod without an account: what a dry run can know with no key, from the catalogue's machines and list prices."""

from __future__ import annotations

from loadmaster import catalog
from loadmaster.errors import ProviderError
from loadmaster.launch.provider import Machine, Offer, Volume
from loadmaster.launch.runpod.http import KEY_VARIABLE, base_url_from_environment
from loadmaster.launch.runpod.provider import Runpod


class Listed(Runpod):
    """Asks nobody: every machine counts as in stock, and no volume or machine as there. It can rent nothing."""

    def __init__(self) -> None:
        pass

    @property
    def not_asked(self) -> str:
        said = f"the catalogue's list prices: {KEY_VARIABLE} is not set, so stock, prices and volumes were not asked"
        unknown = [gpu for gpu, price in catalog.prices()["gpus"].items() if price.get("hosts") == "community"]
        return f"{said}; of {' and '.join(unknown)} only community hosts' prices are known" if unknown else said

    @property
    def api(self) -> str:
        return base_url_from_environment().rstrip("/")

    def offers(
        self, gpus: list[str], counts: tuple[int, ...], cloud: str, nodes: int = 1, plain: bool = False
    ) -> list[Offer]:
        price = "pod_usd_per_hour" if cloud == "secure" else "community_usd_per_hour"
        priced = {gpu: found for gpu, found in catalog.prices()["gpus"].items() if price in found}
        rented = {count for machine in catalog.machines() if machine["gpu"] in gpus for count in machine["counts"]}
        if not rented & set(counts):
            numbers = " or ".join(f"{count}x" for count in counts) if rented else "machine with"
            raise ProviderError(
                f"the catalogue knows no {numbers} {' or '.join(gpus)} to rent; with {KEY_VARIABLE} set the provider "
                "is asked"
            )
        return [
            Offer(
                gpu, catalog.gpus()[gpu]["name"], count, priced[gpu][price] * count * nodes, (), nodes,
                cloud == "secure" and priced[gpu].get("hosts") == "community",
            )
            for machine in catalog.machines()
            if (gpu := machine["gpu"]) in gpus and gpu in priced and (plain or nodes <= machine["max_nodes"])
            for count in machine["counts"]
            if count in counts
        ]

    def volumes(self) -> list[Volume]:
        return []

    def machines(self) -> list[Machine]:
        return []
