"""Flex or Active, from what an endpoint was billed: the arithmetic of `loadmaster endpoint review`. Pure.

    worker-hours of an hour   its bill / price of a worker-hour       w_h, from GET /billing/serverless by the hour
    bill with k Active        sum over hours of  k (1 - d) p + max(0, w_h - k) p
    k is worth it             while the k-th worker was up for more than 1 - d of the time
    always-on Pods            the same with the Pod's price in place of (1 - d) p; balancing them is up to you

p is the list price of a Flex worker-hour at this moment, d the discount of Active workers that you agreed with the
provider (none is public, and with d = 0 no Active worker is ever cheaper). Starts and idle time are in the bill, so
they are in w_h. A worker that is always up by `workers.min` is in the bill as well and counts as used; what it would
have been without it is not measured, and is said so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from loadmaster.endpoint.economics import Prices
from loadmaster.errors import LoadmasterError
from loadmaster.launch.runpod.types import Endpoint, EndpointBill, GpuType
from loadmaster.words import counted

LEAST_HOURS = 72
"""Three days: a working day and a night say little of a month. The provider itself scales down after as many."""
MONTH_HOURS = 720
FEWEST_HOURS, MOST_HOURS = 2, 24 * 90
"""That are looked back on."""


@dataclass(frozen=True)
class Review:
    """Of `hours` measured hours, scaled to a month of 720."""

    hours: int
    worker_hours: float
    busiest: float
    """Workers billed in the busiest hour."""
    share_up: float
    """Of the time that one worker or more was billed for: mean of min(1, w_h)."""
    flex_usd_month: float
    best_active: int
    """Active workers of the cheapest bill."""
    best_usd_month: float
    active_from: float
    """Share of the time from which an Active worker is cheaper: 1 - discount."""
    pod_from: float | None
    """The same for an always-on Pod; above 1 it never is."""
    enough: bool
    """Whether so much was measured that a promotion may rest on it."""


def review(worker_hours: Sequence[float], prices: Prices) -> Review:
    """worker_hours: billed in each hour since the endpoint was first used, hours of nothing included."""
    hours = len(worker_hours)
    scale = MONTH_HOURS / hours if hours else 0.0

    def bill(active: int) -> float:
        return scale * sum(active * prices.active + max(0.0, w - active) * prices.flex for w in worker_hours)

    most = int(max(worker_hours, default=0.0)) + 1
    best = min(range(most + 1), key=lambda active: (round(bill(active), 6), active))
    return Review(
        hours=hours, worker_hours=sum(worker_hours), busiest=max(worker_hours, default=0.0),
        share_up=sum(min(1.0, w) for w in worker_hours) / hours if hours else 0.0, flex_usd_month=bill(0),
        best_active=best, best_usd_month=bill(best), active_from=1 - prices.active_discount,
        pod_from=prices.pod / prices.flex if prices.pod else None, enough=hours >= LEAST_HOURS,
    )


def verdict(found: Review, least_workers: int) -> str:
    """One sentence: what to do, and the number that says so. least_workers: as the endpoint is set now."""
    if not found.hours:
        return "nothing was billed, so there is nothing to decide on: Flex stays."
    if not found.enough:
        return f"{counted(found.hours, 'hour')} measured, {LEAST_HOURS} are needed: Flex stays until then."
    saved = found.flex_usd_month - found.best_usd_month
    if found.best_active == 0:
        less = (
            f" {least_workers} always up cost more than they are used: endpoint scale ID --min 0 where waiting for a "
        )
        return (
            f"Flex: a worker was up {found.share_up:.0%} of the time, and an Active one is cheaper from "
            f"{found.active_from:.0%}." + (less + "start is acceptable." if least_workers else "")
        )
    if found.best_active == least_workers:
        return f"as it is: {least_workers} Active workers are the cheapest for what was measured."
    return (
        f"{found.best_active} Active (endpoint scale ID --min {found.best_active}): a worker was up "
        f"{found.share_up:.0%} of the time, above {found.active_from:.0%}; ${saved:,.0f} a month less than Flex alone."
    )


def lines(found: Review, prices: Prices, least_workers: int) -> list[str]:
    """The figures and the verdict, for a terminal."""
    said = [
        f"{found.hours} hours measured: {found.worker_hours:,.1f} worker-hours billed, {found.busiest:.1f} workers in "
        "the busiest hour",
        f"a month like this: ${found.flex_usd_month:,.2f} at ${prices.flex:.2f} a worker-hour (list price now)",
    ]
    if prices.active_discount:
        off = f"{prices.active_discount:.0%} off"
        said.append(f"with {found.best_active} Active at {off}: ${found.best_usd_month:,.2f}")
    if found.pod_from is not None:
        never = " (never)" if found.pod_from >= 1 else ""
        said.append(f"an always-on Pod at ${prices.pod:.2f}/h is cheaper from {found.pod_from:.0%} of the time{never}")
    if least_workers:
        said.append(f"{least_workers} workers are always up and in these figures; without them it was not measured")
    return [*said, verdict(found, least_workers)]


def worker_hours(bills: Sequence[EndpointBill], prices: Prices, least_workers: int, now: datetime) -> list[float]:
    """Of each whole hour from the first that was billed to now; the hour that has not ended is left out.

    least_workers: always up, and billed at the Active rate; taken to have been the same all the time.
    """
    ended = [bill for bill in bills if bill.end_time <= now]
    if not ended:
        return []
    first = min(bill.start_time for bill in ended)
    hours = [0.0] * int((now - first).total_seconds() // 3600)
    for bill in ended:
        at = int((bill.start_time - first).total_seconds() // 3600)
        if at < len(hours):
            always = min(bill.gpu_amount, least_workers * prices.active)
            hours[at] += always / prices.active + (bill.gpu_amount - always) / prices.flex
    return hours


def prices_of(endpoint: Endpoint, live: Sequence[GpuType], active_discount: float) -> Prices:
    """Prices of one worker of this endpoint today; of several cards that it may get, the dearest.

    Raises LoadmasterError where the catalogue has no price for them.
    """
    gpu: dict[str, Any] = endpoint.gpu or {}
    out, count = gpu.get("excludedTypes") or [], gpu.get("count", 1)
    cards = [kind for kind in live if kind.pool in gpu.get("pools", []) and kind.id not in out]
    priced = [kind for kind in cards if kind.price.serverless]
    if not priced:
        raise LoadmasterError(f"the provider's catalogue has no price for the workers of {endpoint.name}")
    card = max(priced, key=lambda kind: kind.price.serverless or 0)
    return Prices(count * (card.price.serverless or 0), count * (card.price.secure or 0), active_discount)
