"""Bills of a month, and where Flex, Active and a Pod cross."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster import catalog
from loadmaster.endpoint.economics import (
    MONTH_S,
    Prices,
    Service,
    cold_share,
    cold_start_s,
    crossing_rate,
    crossing_utilisation,
    month,
    share_up,
)

SERVICE = Service(request_s=2, start_s=100, idle_timeout_s=10, requests_per_second=4)
H100 = Prices(flex=4.18, pod=3.99)


def test_rare_requests_pay_start_work_and_timeout_each() -> None:
    rate = 1e-5
    assert share_up(rate, SERVICE) == pytest.approx(rate * (100 + 2 + 10), rel=0.01)
    assert cold_share(rate, SERVICE) == pytest.approx(1, rel=0.01)


def test_steady_requests_keep_a_worker_up_and_warm() -> None:
    assert share_up(3, SERVICE) == pytest.approx(1)
    assert cold_share(3, SERVICE) == pytest.approx(0, abs=1e-9)
    assert share_up(1000, SERVICE) == 1 and cold_share(1000, SERVICE) == 0


def test_the_bill_of_a_month() -> None:
    rare, steady, heavy = (month(rate, SERVICE, H100, workers) for rate, workers in ((0.0005, 1), (2, 1), (9, 3)))
    assert rare.cheapest == "flex" and steady.cheapest == "pod"
    assert steady.pod_usd == pytest.approx(3.99 * 720) and steady.flex_usd == pytest.approx(4.18 * 720)
    assert heavy.pod_usd == pytest.approx(3 * steady.pod_usd)
    assert heavy.flex_usd == pytest.approx(4.18 * 720 * 9 / 4)
    assert heavy.active_usd == pytest.approx(3 * 4.18 * 720)
    assert month(9, SERVICE, replace(H100, active_discount=0.2), 3).active_usd == pytest.approx(3 * 0.8 * 4.18 * 720)
    assert rare.requests == pytest.approx(0.0005 * MONTH_S)
    with pytest.raises(ValueError, match="above 0"):
        month(0, SERVICE, H100, 1)


def test_without_a_discount_active_is_never_cheaper_and_with_one_from_its_rest() -> None:
    assert crossing_utilisation(H100)["active"] is None
    assert crossing_utilisation(replace(H100, active_discount=0.2))["active"] == pytest.approx(0.8)
    for discount in (0.0, 0.2):  # a Pod's price has no part in what Active workers are reduced by
        assert crossing_utilisation(replace(H100, active_discount=discount))["pod"] == pytest.approx(3.99 / 4.18)
    assert crossing_rate(SERVICE, H100, "active") is None


@pytest.mark.parametrize("discount", [0.2, 0.3])
def test_bills_are_equal_at_the_crossing_rate(discount: float) -> None:
    prices = replace(H100, active_discount=discount)
    rate = crossing_rate(SERVICE, prices, "active")
    assert rate is not None
    bill = month(rate, SERVICE, prices, 1)
    assert bill.flex_usd == pytest.approx(bill.active_usd, rel=1e-6)
    assert month(rate / 2, SERVICE, prices, 1).cheapest == "flex"


def test_a_worker_that_never_pauses_crosses_where_its_work_alone_is_the_share() -> None:
    """One request of 2 s at a time, no start and no timeout: up 80% of the time at 0.4 requests a second."""
    one_by_one = Service(request_s=2, start_s=0, idle_timeout_s=0, requests_per_second=0.5)
    assert crossing_rate(one_by_one, replace(H100, active_discount=0.2), "active") == pytest.approx(0.4)


def test_a_cold_start_reads_the_weights_from_where_they_are() -> None:
    """39.5 GB from a network volume of 0.2 to 0.4 GB/s: 99 to 198 s, besides container and server."""
    slow, fast, image = (
        cold_start_s(39.5e9, "volume"), cold_start_s(39.5e9, "volume", "high"), cold_start_s(39.5e9, "image"),
    )
    assert slow - fast == pytest.approx(98.75)
    facts = catalog.serving()["cold_start"]
    assert image > slow > cold_start_s(0, "volume") == facts["container_s"]["value"] + facts["server_s"]["value"] > 0
