"""What a stated load asks for: machines by the price of all their workers, and what is billed, started and simulated.

Of an 8B model of Llama's shape, whose config.json alone is there.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from loadmaster.config.schema import EndpointConfig, Job, ModelConfig
from loadmaster.endpoint import sizing
from loadmaster.endpoint.economics import Prices
from loadmaster.endpoint.simulate import Fleet
from loadmaster.endpoint.sizing import Sizing, arrivals_of, size, traffic_of

CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}
WEIGHTS = 16_060_522_496
JOB = Job(recipe="tickets", model=ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct"))


@pytest.fixture
def sized(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = [{"path": "model.safetensors", "bytes": WEIGHTS}, {"path": "tokenizer.json", "bytes": 9_000_000}]
    manifest = {"format": "bf16", "base_model": {"name": "org/base", "revision": None}, "files": files}
    manifest["bytes"] = sum(file["bytes"] for file in files)
    monkeypatch.setattr(sizing, "simulate", lambda *asked: asked)

    def made(format: str = "bf16", context: int = 2048, bytes: int = manifest["bytes"], **endpoint) -> Sizing:
        job = replace(JOB, endpoint=EndpointConfig(**endpoint))
        return size(job, {**manifest, "format": format, "bytes": bytes}, tmp_path, context)

    return made


def dollars(found: Sizing) -> float:
    return found.workers * found.plan.flex_usd_per_hour


def test_the_cheapest_machine_is_that_of_all_the_workers_it_needs(sized):
    """Ten requests a second are cheapest on another card than one: the price of a single worker does not decide."""
    chosen = {rate: sized(requests_per_second=rate) for rate in (0.01, 10.0)}
    assert chosen[0.01].plan.gpu != chosen[10.0].plan.gpu and chosen[10.0].workers > 1
    for rate, found in chosen.items():
        cards = ("l40s", "a100_80gb", "h100_80gb", "h200", "b200")
        others = [sized(requests_per_second=rate, gpu=card, count=1) for card in cards]
        assert dollars(found) <= min(map(dollars, others))
        assert len({(plan.gpu, plan.gpus) for plan in (found.plan, *found.runners_up)}) == 5  # of one node each


def test_the_bills_are_of_a_tenth_the_load_and_ten_times_it_at_the_machines_prices(sized):
    found = sized(requests_per_second=30.0, gpu="h100_80gb", count=1, active_discount=0.2)
    flex, pod = found.plan.flex_usd_per_hour, found.plan.pod_usd_per_hour
    assert found.prices == Prices(flex, pod, 0.2) and flex > pod > 0
    assert [bill.requests_per_second for bill in found.bills] == pytest.approx([3, 30, 300])
    for bill in found.bills:
        assert bill.active_usd == pytest.approx(0.8 * flex * 720 * bill.workers)
        assert bill.pod_usd == pytest.approx(pod * 720 * bill.workers)
    assert found.bills[1].workers == found.workers < found.bills[2].workers


@pytest.mark.parametrize(("rate", "late_ms", "needed"), [(30.0, None, 4), (8.0, 85, 4), (300.0, None, 38)])
def test_a_worker_that_is_always_up_is_billed_as_often_as_the_load_needs_one(sized, rate, late_ms, needed):
    """It was as often as full ones would do, 3 for the 4 of the first load, and was said to be cheaper than Flex."""
    asked = {"gpu": "h100_80gb", "count": 1, "active_discount": 0.2, "p99_first_token_ms": late_ms}
    tenth, found = (sized(requests_per_second=times * rate, **asked) for times in (0.1, 1))
    assert found.workers == needed and found.bills[1].cheapest == "flex"
    assert [bill.workers for bill in found.bills[:2]] == [tenth.workers, needed]
    if needed < 10:  # beyond MOST_WORKERS there is no plan, and a bill all the same
        assert found.bills[2].workers == sized(requests_per_second=10 * rate, **asked).workers
    else:
        assert found.bills[2].workers == 10 * needed


def test_as_many_requests_on_each_of_three_workers_take_as_long_as_on_one(sized):
    full = sized(gpu="l40s", count=1).service.requests_per_second
    one, three = (sized(gpu="l40s", count=1, requests_per_second=n * 0.79 * full) for n in (1, 3))
    assert (one.workers, three.workers) == (1, 3)
    assert three.service.request_s == pytest.approx(one.service.request_s)


def test_two_cards_read_half_the_weights_each(sized):
    one, two = (sized(gpu="h100_80gb", count=count) for count in (1, 2))
    assert two.load.tokens_per_second_each > 1.3 * one.load.tokens_per_second_each
    assert sized(count=2).plan.gpus == 2


def test_a_cold_start_reads_the_weights_alone_and_of_an_adapter_its_base_as_well(sized):
    def read_s(found: Sizing) -> float:
        slow, nothing = found.starts["network volume at 0.2 GB/s"], list(found.starts.values())[-1]
        return slow - nothing

    whole, adapter = sized(), sized("adapter", bytes=2_000_000_000)
    assert read_s(whole) == pytest.approx(WEIGHTS / 0.2e9)
    assert read_s(adapter) == pytest.approx((2 * 134_515_008 + 2e9) / 0.2e9, rel=0.01)
    fast, slow = whole.start_s
    assert slow - fast == pytest.approx(WEIGHTS / 0.4e9) and whole.service.start_s == slow


def test_the_chosen_fleet_is_simulated_first_and_none_twice(sized):
    found = sized(min_workers=5, idle_timeout_s=60, requests_per_second=1.0)
    assert (found.min_workers, found.max_workers) == (5, 5)
    fleets = [fleet for _, _, fleet in found.outcomes]
    assert fleets[0] == Fleet(5, 5, found.requests_at_once, found.start_s[1], 60)
    assert all(a != b for a, b in itertools.combinations(fleets, 2))
    assert {request_s for _, request_s, _ in found.outcomes} == {found.service.request_s}
    same = sized(min_workers=1, max_workers=2, idle_timeout_s=60, requests_per_second=1.0)
    assert len(same.outcomes) == 6  # one of the others is the chosen one


def test_a_variant_of_a_format_takes_what_its_family_does(sized):
    plans = [replace(sized(name).plan, format="") for name in ("int4", "int4_gptq", "int4_awq")]
    assert plans[0] == plans[1] == plans[2] != replace(sized("bf16").plan, format="")


def test_a_limit_on_the_first_token_is_told_in_milliseconds():
    assert traffic_of(EndpointConfig(p99_first_token_ms=250), 2048).p99_first_token_s == 0.25


def test_of_many_times_in_a_csv_the_first_are_simulated(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text("".join(f"{second}\n" for second in range(30_010)))
    assert arrivals_of(EndpointConfig(arrivals=str(path))) == list(range(30_000))
