"""The simulation against queueing theory, and the bill against the simulation."""

from __future__ import annotations

import math
from random import Random
from statistics import mean

import pytest

from loadmaster.config.schema import EndpointConfig
from loadmaster.endpoint.arrivals import bursty, from_csv, poisson
from loadmaster.endpoint.economics import MONTH_S, Service, cold_share, share_up
from loadmaster.endpoint.simulate import Fleet, simulate
from loadmaster.endpoint.sizing import arrivals_of
from loadmaster.errors import DataError


def always_on(workers: int, slots: int = 1) -> Fleet:
    return Fleet(min_workers=workers, max_workers=workers, slots=slots)


@pytest.mark.parametrize(("workers", "load"), [(1, 0.5), (1, 0.8), (3, 0.8)])
def test_waits_of_m_m_c_are_erlangs(workers: int, load: float) -> None:
    arrivals = poisson(load * workers, 60_000, seed=1)
    random = Random(2)
    outcome = simulate(arrivals, [random.expovariate(1.0) for _ in arrivals], always_on(workers))
    offered = load * workers
    last = offered**workers / math.factorial(workers) / (1 - load)
    must_wait = last / (sum(offered**k / math.factorial(k) for k in range(workers)) + last)
    assert mean(outcome.waits_s) == pytest.approx(must_wait / (workers * (1 - load)), rel=0.1)
    assert sum(wait > 0 for wait in outcome.waits_s) / len(arrivals) == pytest.approx(must_wait, rel=0.05)


def test_slots_of_one_worker_are_servers_of_one_queue() -> None:
    arrivals = poisson(2.4, 10_000, seed=3)
    one, three = (simulate(arrivals, 1.0, fleet) for fleet in (always_on(1, slots=3), always_on(3)))
    assert one.waits_s == pytest.approx(three.waits_s)
    assert three.active_worker_s == pytest.approx(3 * one.active_worker_s)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_waits_of_m_d_1_are_pollaczek_khinchines(load: float) -> None:
    outcome = simulate(poisson(load, 80_000, seed=4), 1.0, always_on(1))
    assert mean(outcome.waits_s) == pytest.approx(load / (2 * (1 - load)), rel=0.06)


@pytest.mark.parametrize("rate", [0.002, 0.02, 0.05])
def test_billed_time_and_cold_starts_are_those_of_the_closed_form(rate: float) -> None:
    service = Service(request_s=5, start_s=100, idle_timeout_s=30, requests_per_second=10)
    fleet = Fleet(max_workers=1, slots=10_000, start_s=100, idle_timeout_s=30)
    outcome = simulate(poisson(rate, 3000 / rate, seed=5), 5.0, fleet)
    assert outcome.flex_worker_s / outcome.seconds == pytest.approx(share_up(rate, service), rel=0.06)
    assert outcome.cold_share == pytest.approx(cold_share(rate, service), rel=0.08)


def test_one_request_pays_start_work_and_idle_time() -> None:
    outcome = simulate([10.0], 2.0, Fleet(start_s=60, idle_timeout_s=5))
    assert outcome.waits_s == [60] and outcome.cold == 1
    assert outcome.flex_worker_s == 67 and outcome.usd(3600) == 67
    assert outcome.usd(3600, over_s=2 * outcome.seconds) == pytest.approx(134)


def test_a_warm_worker_is_used_again_and_not_started_twice() -> None:
    outcome = simulate([0.0, 1.0, 64.0, 200.0], 2.0, Fleet(start_s=60, idle_timeout_s=5, slots=2))
    assert outcome.waits_s == [60, 59, 0, 60] and outcome.cold == 3 and outcome.most_workers == 1


def test_a_queue_brings_more_workers_up_to_the_limit_and_they_end() -> None:
    fleet = Fleet(max_workers=3, start_s=10, idle_timeout_s=5, queue_delay_s=4)
    outcome = simulate([0.0] * 6, 100.0, fleet)
    assert outcome.most_workers == 3
    assert sorted(outcome.waits_s) == [10, 14, 14, 110, 114, 114]
    assert outcome.flex_worker_s == 3 * (10 + 200 + 5)


def test_another_worker_starts_where_a_request_has_waited_and_no_slot_is_coming() -> None:
    busy = Fleet(min_workers=1, max_workers=2, slots=2, start_s=10, queue_delay_s=4)
    assert simulate([0.0, 0.0, 0.0], 100.0, busy).waits_s == [0, 0, 14]
    # The second waits 2 s and the third 3.5, so the fourth second of neither is reached.
    outcome = simulate([0.0, 1.0, 2.5], 3.0, Fleet(min_workers=1, max_workers=2, start_s=10, queue_delay_s=4))
    assert outcome.waits_s == [0, 2, 3.5] and outcome.most_workers == 1


def test_a_worker_that_finds_nothing_to_do_ends_and_is_billed() -> None:
    """The second starts at 4 s, is ready at 14, when the first has done all, and ends at 19."""
    outcome = simulate([0.0, 0.0], 1.0, Fleet(max_workers=2, start_s=10, idle_timeout_s=5, queue_delay_s=4))
    assert outcome.waits_s == [10, 11] and outcome.flex_worker_s == (12 + 5) + (19 - 4)


def test_a_worker_that_is_always_up_is_warm_for_the_very_first_request() -> None:
    outcome = simulate([0.0, 1.0, 2.0, 3.0, 4.0], 4.0, always_on(1))
    assert outcome.cold == 0
    assert outcome.waits_s == [0, 3, 6, 9, 12] and outcome.wait_s(0.5) == 6


def test_min_workers_trade_money_for_waits() -> None:
    arrivals = poisson(0.01, 200_000, seed=6)
    cold, warm = (simulate(arrivals, 3.0, Fleet(min_workers=n, start_s=90, slots=8)) for n in (0, 1))
    assert warm.wait_s(0.99) < 1 < cold.wait_s(0.5)
    assert warm.usd(4.18) > cold.usd(4.18) and warm.usd(4.18, 0.2) < warm.usd(4.18)
    assert warm.cold_share < 0.01 < cold.cold_share


def test_bursts_have_the_same_mean_and_longer_waits() -> None:
    even, bursts = poisson(0.1, 500_000, seed=7), bursty(0.1, 500_000, seed=7)
    assert len(bursts) == pytest.approx(len(even), rel=0.1)
    assert bursts == sorted(bursts)
    assert len(bursty(1.0, 20_000, factor=2, burst_s=10, seed=7)) == pytest.approx(20_000, rel=0.1)
    assert simulate(bursts, 2.0, always_on(1)).wait_s(0.99) > 3 * simulate(even, 2.0, always_on(1)).wait_s(0.99)


def test_real_timestamps_are_read_from_a_csv(tmp_path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("time,route\n2026-11-24T08:00:10,/v1\n2026-11-24T08:00:00,/v1\n\n2026-11-24T08:00:12.5,/v1\n")
    assert from_csv(path) == [0, 10, 12.5]
    path.write_text("1700000000\n1700000003\n")
    assert from_csv(path) == [0, 3]
    path.write_text("time\n1\nsoon\n")
    with pytest.raises(DataError, match=r"requests\.csv:3: 'soon'"):
        from_csv(path)
    for text in ("time\nsoon\n1\n2\n", "0\ninf\n1\n"):  # one heading at most, and no time without end
        path.write_text(text)
        with pytest.raises(DataError, match=r"requests\.csv:2"):
            from_csv(path)
    path.write_text("time\n1\n")
    with pytest.raises(DataError, match="at least 2"):
        from_csv(path)
    with pytest.raises(DataError, match="no such file"):
        from_csv(tmp_path / "none.csv")


def test_a_fleet_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="min_workers"):
        Fleet(min_workers=2, max_workers=1)


@pytest.mark.parametrize(
    ("rate", "seconds"), [(0.0001, MONTH_S), (0.5, 10_000), (2, 3600), (100, 300)], ids=["month", "few", "hour", "many"]
)
def test_as_long_is_simulated_as_has_a_few_thousand_requests(rate: float, seconds: float) -> None:
    for arrivals, made in (("poisson", poisson), ("bursty", bursty)):
        assert arrivals_of(EndpointConfig(requests_per_second=rate, arrivals=arrivals)) == made(rate, seconds)
