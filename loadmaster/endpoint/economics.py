"""Flex, Active or an always-on Pod: the bill of a month, and where the three cross.

A Flex worker is billed from the moment it starts to load until it has been idle for its timeout:

    up = t + (e^(r D) - 1) / r      seconds from one cold start to the next shutdown
    share of time up = 1 - 1 / (r t + e^(r D))

with r requests a second (Poisson), t seconds of start, D = seconds of a request + idle timeout, and one worker that
runs everything side by side (the busy period of an M/D/infinity queue, exact). Where traffic needs several workers
the bill is at least their busy time; simulate.py has the waits. Active and Pod are billed all the time. Prices are
inputs, and so is the discount of Active workers, which the provider no longer publishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadmaster import catalog

MONTH_S = 30 * 86_400.0
LARGEST_EXPONENT = 700.0
"""e to this is the largest that a float holds; a worker with more requests than that is simply always up."""


@dataclass(frozen=True)
class Service:
    """One kind of worker under one kind of request."""

    request_s: float
    """A request takes so long on a worker that others use as well."""
    start_s: float
    """Cold start, billed: container, weights, server."""
    idle_timeout_s: float
    requests_per_second: float
    """That one worker carries when full."""


@dataclass(frozen=True)
class Prices:
    """US dollars an hour of one worker with all its cards."""

    flex: float
    pod: float
    """0: not known."""
    active_discount: float = 0.0
    """Share off the Flex price, by agreement with the provider."""

    @property
    def active(self) -> float:
        return self.flex * (1 - self.active_discount)


@dataclass(frozen=True)
class Bill:
    """Of a month of 30 days at `requests_per_second`."""

    requests_per_second: float
    requests: float
    workers: int
    """That an always-on endpoint needs; Flex needs so many at times."""
    flex_usd: float
    active_usd: float
    pod_usd: float
    flex_share_up: float
    """Of the month that Flex workers are billed for, in workers."""
    cold_start_share: float
    """Of the requests that find no worker ready."""
    cheapest: str


def share_up(rate: float, service: Service) -> float:
    """Of the time that one Flex worker is billed."""
    exponent = rate * (service.request_s + service.idle_timeout_s)
    if exponent > LARGEST_EXPONENT:
        return 1.0
    return 1 - 1 / (rate * service.start_s + math.exp(exponent))


def cold_share(rate: float, service: Service) -> float:
    """Of requests that wait for a worker to start: the first of each cycle and those that come meanwhile."""
    exponent = rate * (service.request_s + service.idle_timeout_s)
    if exponent > LARGEST_EXPONENT:
        return 0.0
    return (1 + rate * service.start_s) / (rate * service.start_s + math.exp(exponent))


def month(rate: float, service: Service, prices: Prices, workers: int) -> Bill:
    """rate: requests a second, Poisson; workers: always on, that it needs. Raises ValueError when it is not above 0."""
    if rate <= 0:
        raise ValueError("requests a second must be above 0")
    up = max(share_up(rate, service), rate / service.requests_per_second)
    hours = MONTH_S / 3600
    usd = {"flex": prices.flex * up * hours, "active": prices.active * workers * hours}
    usd["pod"] = prices.pod * workers * hours
    return Bill(
        requests_per_second=rate, requests=rate * MONTH_S, workers=workers, flex_usd=usd["flex"],
        active_usd=usd["active"], pod_usd=usd["pod"], flex_share_up=up, cold_start_share=cold_share(rate, service),
        cheapest=min(usd, key=usd.__getitem__),
    )


def crossing_utilisation(prices: Prices) -> dict[str, float | None]:
    """Share of billed time from which Active and a Pod are cheaper than Flex; None where they never are."""
    shares = {"active": prices.active / prices.flex, "pod": prices.pod / prices.flex}
    return {name: share if share < 1 else None for name, share in shares.items()}


def crossing_rate(service: Service, prices: Prices, other: str) -> float | None:
    """Requests a second, for one worker, from which `other` ("active" or "pod") is cheaper; None where it never is."""
    share = crossing_utilisation(prices)[other]
    if share is None:
        return None
    low, high = 0.0, service.requests_per_second
    for _ in range(80):
        middle = (low + high) / 2
        up = max(share_up(middle, service), middle / service.requests_per_second)
        low, high = (middle, high) if up < share else (low, middle)
    return high


def cold_start_s(checkpoint_bytes: float, weights: str, rate: str = "low") -> float:
    """Seconds until the first token of a new worker.

    weights: "volume" (network volume, at its `rate` low or high) or "image" (pulled with the container).
    """
    facts = catalog.serving()["cold_start"]
    speed = facts["volume_gb_per_s"][rate] if weights == "volume" else facts["registry_gb_per_s"]["value"]
    return facts["container_s"]["value"] + checkpoint_bytes / (speed * 1e9) + facts["server_s"]["value"]
