"""Prices: shipped, of the user's own file after a refresh, and of the job's own; each plan says which and of when."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from rich.console import Console

from loadmaster import catalog
from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig, PlanConfig
from loadmaster.errors import ConfigError, ProviderError
from loadmaster.launch.prices import refresh_prices, show_prices
from loadmaster.launch.runpod import Api, RunpodClient
from loadmaster.preflight import make_plan
from tests.launch.fake_runpod import GPUS, FakeRunpod


def plan(**options):
    return make_plan(
        Job(
            model=ModelConfig(name="meta-llama/Llama-3.1-8B"), method="lora", batch=BatchConfig(16),
            hardware=HardwareConfig(gpu="h100_80gb", count=2), plan=PlanConfig(**options), max_steps=10,
        )
    )


def test_a_refresh_writes_dated_prices_that_plans_then_use(tmp_path, monkeypatch, capsys) -> None:
    before = plan().price
    monkeypatch.setenv("LOADMASTER_PRICES", str(tmp_path / "settings" / "prices.yaml"))
    with FakeRunpod() as fake:
        assert refresh_prices(Console(), RunpodClient(Api(fake.key, fake.url))) == 0
        assert fake.violations == []
    secure = GPUS["NVIDIA H100 80GB HBM3"][3]
    today = str(datetime.now(UTC).date())
    after = plan()
    assert before["date"] == "2026-11-09"
    assert after.price["date"] == today and after.price["usd_per_hour"] == pytest.approx(2 * secure)
    assert before["hosts"] == after.price["hosts"] == "secure"
    assert "/catalog/gpus" in after.price["source"] and today in capsys.readouterr().out


def test_without_a_key_a_refresh_says_which_variable_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("LOADMASTER_PRICES", str(tmp_path / "prices.yaml"))
    with pytest.raises(ProviderError, match="RUNPOD_API_KEY"):
        refresh_prices(Console())
    assert not (tmp_path / "prices.yaml").exists()


def test_the_jobs_own_price_comes_before_every_list(capsys) -> None:
    own = plan(prices_usd_per_hour={"h100_80gb": 2.5})
    assert own.price["usd_per_hour"] == 5 and own.price["date"] is None
    assert own.cost_usd == pytest.approx(own.hours * 5, abs=0.01)


def test_prices_are_shown_with_date_and_source(capsys) -> None:
    assert show_prices(Console()) == 0
    said = capsys.readouterr().out
    assert "as shipped" in said and "2026-11-09" in said
    assert all(machine["gpu"] in said for machine in catalog.machines())


def test_a_refresh_prices_cards_that_the_catalogue_has_no_machine_of(tmp_path, monkeypatch, capsys) -> None:
    assert "a40" not in catalog.prices()["gpus"]
    monkeypatch.setenv("LOADMASTER_PRICES", str(tmp_path / "prices.yaml"))
    monkeypatch.setitem(GPUS, "NVIDIA A40", (*GPUS["NVIDIA L40S"][:3], 0.44, *GPUS["NVIDIA L40S"][4:]))
    with FakeRunpod() as fake:
        refresh_prices(Console(), RunpodClient(Api(fake.key, fake.url)))
    assert catalog.prices()["gpus"]["a40"]["pod_usd_per_hour"] == 0.44
    assert "rtx3090" not in capsys.readouterr().out  # nothing is said to be missing that never had a price
    assert make_plan(
        Job(model=ModelConfig(name="meta-llama/Llama-3.1-8B"), method="lora", hardware=HardwareConfig(gpu="a40"))
    ).price["usd_per_hour"] == pytest.approx(0.44)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: [", "while parsing a flow node"),
        ("", "it lacks a field"),
        ("h100_80gb: 2.5", "it lacks a field"),
        ("{date: 2026-12-01, source: mine, gpus: {h200: 2.5}}", "it lacks a field"),
        ("{date: 2026-12-01, source: mine, gpus: {h200: {pod_usd_per_hour: 2.5}}}", "it lacks a field"),
        ("{date: 2026-12-01, source: mine, gpus: {a40: {community_usd_per_hour: 0.3, date: 2026-12-01}}}",
         "it lacks a field"),
        ("{date: 2026-12-01, source: mine, gpus: {h200: {pod_usd_per_hour: $3, date: 2026-12-01}}}",
         "h200.pod_usd_per_hour is '$3'"),
    ],
)
def test_a_price_file_that_is_none_is_named_with_what_works(text, said, tmp_path, monkeypatch) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    monkeypatch.setenv("LOADMASTER_PRICES", str(file))
    with pytest.raises(ConfigError, match=re.escape(f"price file = '{file}'  (LOADMASTER_PRICES)")) as raised:
        plan()
    assert said in str(raised.value) and "pod_usd_per_hour: NUMBER" in str(raised.value)
    assert "without it the shipped prices count" in str(raised.value)


def test_a_price_file_that_is_named_and_not_there_is_not_taken_for_the_shipped_prices(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOADMASTER_PRICES", str(tmp_path / "pricse.yaml"))
    with pytest.raises(ConfigError, match=r"pricse.yaml'  \(LOADMASTER_PRICES\)\n    there is no such file\n"):
        plan()
    monkeypatch.setenv("LOADMASTER_PRICES", str(tmp_path))
    with pytest.raises(ConfigError, match=r"\(LOADMASTER_PRICES\)\n    is a folder\n"):
        plan()


def test_a_price_file_may_price_a_part_and_say_more_than_is_read(tmp_path, monkeypatch) -> None:
    file = tmp_path / "prices.yaml"
    entry = "{serverless_usd_per_hour: 4, date: 2026-12-01, note: by contract}"
    file.write_text(f"{{date: 2026-12-01, source: mine, gpus: {{h100_80gb: {entry}}}}}")
    shipped = catalog.prices()["gpus"]["h100_80gb"]
    monkeypatch.setenv("LOADMASTER_PRICES", str(file))
    own = catalog.prices()["gpus"]["h100_80gb"]
    assert own["serverless_usd_per_hour"] == 4 and own["pod_usd_per_hour"] == shipped["pod_usd_per_hour"]
