"""Flex or Active from bills, by hand-worked figures; and whether served words are the recorded ones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from loadmaster.endpoint.economics import Prices
from loadmaster.endpoint.inference import Load, NotAnswered, loads
from loadmaster.endpoint.review import lines, prices_of, review, verdict, worker_hours
from loadmaster.endpoint.smoke import compared, failures, figures, similarity
from loadmaster.endpoint.validate import WARM_S, Expected, _asked, too_slow
from loadmaster.errors import LoadmasterError
from loadmaster.launch.runpod.types import Endpoint, EndpointBill, GpuType, parse

H100 = Prices(flex=4.18, pod=3.99, active_discount=0.2)
NOW = datetime(2026, 11, 24, 12, 30, tzinfo=UTC)


def bill(hours_ago: int, usd: float) -> EndpointBill:
    end = NOW.replace(minute=0) - timedelta(hours=hours_ago - 1)
    return EndpointBill(end - timedelta(hours=1), end, usd)


def test_without_a_discount_flex_is_never_beaten() -> None:
    found = review([1.0] * 100, Prices(4.18, 3.99))
    assert found.best_active == 0 and found.share_up == 1
    assert verdict(found, 0).startswith(
        "Flex: a worker was up 100% of the time, and an Active one is cheaper from 100%"
    )


@pytest.mark.parametrize(("share", "active"), [(0.79, 0), (0.81, 1)])
def test_active_begins_where_a_worker_is_up_for_more_than_the_rest_of_its_price(share: float, active: int) -> None:
    found = review([share] * 100, H100)
    assert (found.best_active, found.share_up) == (active, pytest.approx(share))
    assert found.flex_usd_month == pytest.approx(share * 4.18 * 720)
    assert found.best_usd_month == pytest.approx(min(share, 0.8) * 4.18 * 720)


def test_workers_are_promoted_one_by_one() -> None:
    """Nights of one worker and days of three: the first is up always, the second and third half of the time."""
    found = review([1.0, 3.0] * 50, H100)
    assert found.best_active == 1 and found.busiest == 3 and found.share_up == 1
    assert found.best_usd_month == pytest.approx(720 * (0.8 * 4.18 + 0.5 * 2 * 4.18))
    assert "1 Active (endpoint scale ID --min 1)" in verdict(found, 0)
    assert verdict(found, 1).startswith("as it is")
    assert verdict(found, 2).startswith("1 Active")
    assert "endpoint scale ID --min 0" in verdict(review([0.1] * 100, H100), 1)


def test_promotion_needs_three_measured_days() -> None:
    assert "71 hours measured, 72 are needed: Flex stays" in verdict(review([1.0] * 71, H100), 0)
    promoted = verdict(review([1.0] * 72, H100), 0)
    assert promoted.startswith("1 Active") and "$602 a month less than Flex alone" in promoted  # 0.2 x 4.18 x 720
    assert "nothing was billed" in verdict(review([], H100), 0)
    said = "\n".join(lines(review([0.5] * 100, H100), H100, 0))
    assert "50.0 worker-hours billed" in said and "cheaper from 95% of the time" in said


def test_hours_come_from_the_bill_with_the_silent_ones_between() -> None:
    bills = [bill(5, 4.18), bill(3, 2.09), bill(0, 4.18)]  # the last one is the hour that runs
    assert worker_hours(bills, H100, 0, NOW) == pytest.approx([1, 0, 0.5, 0, 0])
    assert worker_hours([], H100, 0, NOW) == []
    assert worker_hours([bill(1, 4.18), bill(1, 2.09)], H100, 0, NOW) == pytest.approx([1.5])
    always = worker_hours([bill(2, 0.8 * 4.18 + 2.09), bill(1, 0.8 * 4.18)], H100, 1, NOW)
    assert always == pytest.approx([1.5, 1.0])


def test_prices_are_those_of_the_cards_that_it_may_get() -> None:
    def card(id: str, serverless: float | None) -> GpuType:
        return parse(GpuType, {
            "id": id, "name": id, "pool": "P", "memory": 48, "secure": True, "community": True,
            "price": {"secure": 0.9, "community": 0.7, "serverless": serverless},
            "maxCount": {"secure": 8, "community": 8},
        })

    endpoint = Endpoint(
        id="e", name="loadmaster-x", workers={"min": 0}, scaling={"type": "QUEUE_DELAY", "queueDelay": 4},
        network_volumes=[], data_center_ids=[], timeout=1, flashboot="OFF", created_at=NOW,
        gpu={"pools": ["P"], "count": 2, "excludedTypes": ["L40"]},
    )
    prices = prices_of(endpoint, [card("A40", 1.22), card("L40S", 1.91), card("L40", 9.0)], 0.0)
    assert (prices.flex, prices.pod) == pytest.approx((3.82, 1.8))
    with pytest.raises(LoadmasterError, match="no price"):
        prices_of(endpoint, [card("L40S", None)], 0.0)


@pytest.mark.parametrize(
    ("expected", "text", "least", "most"),
    [
        ("The tea is in crate two.", "The tea is in crate two.", 1, 1),
        ("The tea is in crate two.", "The tea is in crate three, I think.", 0.6, 0.9),
        ("The tea is in crate two.", "I cannot help with that.", 0, 0.4),
        ("", "", 1, 1),
        ("", "Something", 0, 0),
        ("東京に行きます", "東京へ行きます", 0.7, 0.95),
    ],
)
def test_similarity_counts_words_in_order(expected: str, text: str, least: float, most: float) -> None:
    assert least <= similarity(expected, text) <= most


def test_one_answer_that_went_another_way_is_forgiven_and_a_lost_stop_is_not() -> None:
    asked = [{"role": "user", "content": "?"}]
    recorded = {"messages": asked, "text": "It is in crate two.", "finish_reason": "stop"}
    same = compared(recorded, {"text": " It is in crate two.", "finish_reason": "stop"})
    other = compared(recorded, {"text": "We have no such thing aboard", "finish_reason": "length"})
    on = compared(recorded, {"text": "It is in crate two.", "finish_reason": "length"})
    assert same.ends_alike and other.ends_alike is None and on.ends_alike is False
    assert failures([same, same, other]) == []
    assert len(failures([other, other, same])) == 1 and "must be at least 0.5" in failures([other, other, same])[0]
    assert "stop tokens" in failures([same, same, on])[0]
    assert figures([same, other])["equal"] == 1


def test_a_load_is_of_distinct_prompts_of_bounded_length() -> None:
    bodies = loads({"model": "m"}, 8, 100, 16)
    texts = [body["messages"][0]["content"] for body in bodies]
    assert len(set(text[:2] for text in texts)) == 8 and all(len(text.split()) == 51 for text in texts)
    assert all(body["max_tokens"] == 16 and body["ignore_eos"] and body["model"] == "m" for body in bodies)


def test_slower_than_planned_is_told_by_figure() -> None:
    planned = {"first_token_s": 0.1, "tokens_per_second_each": 100.0}
    load = Load(8, 4, first_token_s=1.4, slowest_first_token_s=2, tokens_per_second=60, tokens_per_second_each=21)
    assert too_slow(load, planned, 5.0) == []
    assert [said.split()[1] for said in too_slow(load, planned, 2.0)] == ["first", "answer"]


class Served:
    """An endpoint that gives the same answer to whatever it is asked, and keeps that."""

    def __init__(self, text: str, finish_reason: str = "stop"):
        self.choice = {"message": {"content": text}, "finish_reason": finish_reason}
        self.asked, self.waits = [], []

    def ask(self, given: dict, wait_s: float) -> dict:
        self.asked.append(given["openai_input"])
        self.waits.append(wait_s)
        return {"model": "m", "choices": [self.choice]}


def recorded(text: str) -> Expected:
    asked = [{"role": "user", "content": "Where?"}]
    prompt = {"messages": asked, "text": text, "finish_reason": "stop", "tokens": 2, "max_tokens": 32}
    return Expected("m", 2048, [prompt, prompt], {}, 5.0)


def test_recorded_prompts_are_asked_as_they_were_and_only_the_first_waits_for_a_start() -> None:
    for text in ("There.", ""):  # the export may have said nothing
        served = Served(text)
        assert _asked(served, recorded(text), 900.0, lambda _: None)["equal"] == 2
        assert [body["max_tokens"] for body in served.asked] == [32, 32]
        # Greedy, whatever generation_config.json asks for.
        assert {(body["temperature"], body["repetition_penalty"]) for body in served.asked} == {(0, 1.0)}
        assert served.waits == [900.0, WARM_S]


@pytest.mark.parametrize(
    ("text", "reason", "said"), [("", "stop", "has no text"), ("There.", "abort", "ended with 'abort'")]
)
def test_an_answer_that_is_none_is_no_answer(text: str, reason: str, said: str) -> None:
    with pytest.raises(NotAnswered, match=said):
        _asked(Served(text, reason), recorded("There."), 900.0, lambda _: None)
