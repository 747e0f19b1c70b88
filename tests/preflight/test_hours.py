"""Steps, tokens and hours of a run, from what is known of its data."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from loadmaster.config.schema import BatchConfig
from loadmaster.preflight import hours
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.hardware import cpu, from_catalog
from loadmaster.preflight.hours import overhead_hours, reference_hours, run_hours, run_tokens, steps
from loadmaster.preflight.search import smallest
from tests.preflight.test_make import LLAMA, job

ROW = 2048
JOB = replace(job(LLAMA + "8B", "full", "h100_80gb", 8), batch=BatchConfig(global_size=4))


@pytest.mark.parametrize(
    ("tokens", "changes", "count", "rows"),
    [
        (None, {}, None, None),
        (None, {"max_steps": 7}, 7, 28),
        (40 * ROW, {"max_steps": 7}, 7, 28),
        (40 * ROW, {"epochs": 3}, 30, 120),
        (10 * ROW + 1, {"epochs": 1}, 3, 11),  # the last step of an epoch has the rows that are left
        (10 * ROW + 1, {"epochs": 3}, 9, 33),
        (10 * ROW + 1, {"epochs": 0.5}, 2, 22 / 3),
        (9 * ROW, {"epochs": 1.5}, 5, 15),
        (1, {"epochs": 1}, 1, 1),
    ],
)
def test_steps_and_tokens_of_a_run(tokens, changes, count, rows) -> None:
    asked = replace(JOB, **changes)
    assert steps(asked, tokens) == count
    assert run_tokens(asked, tokens) == (rows and pytest.approx(rows * ROW))


def test_hours_are_tokens_by_their_rate_and_what_comes_before_and_after() -> None:
    shape = find_shape(JOB.model)
    found = smallest(JOB, shape, from_catalog("h100_80gb", 8))
    once, thrice = (replace(JOB, epochs=epochs) for epochs in (1, 3))
    data = 4000 * ROW
    more = run_hours(thrice, found, data) - run_hours(once, found, data)
    assert more == pytest.approx(2 * data / found.tokens_per_second / 3600)
    asking = [reference_hours(replace(each, objective="dpo"), found, data) for each in (once, thrice)]
    assert asking[0] == asking[1] > 0  # each pair is asked about once, however often it is trained on
    assert run_hours(JOB, found, None) is None
    assert run_hours(once, found, data) == pytest.approx(
        data / found.tokens_per_second / 3600 + overhead_hours(once, found)
    )
    dpo = replace(once, objective="dpo")
    assert run_hours(dpo, found, data) - run_hours(once, found, data) == pytest.approx(asking[0])
    adapter = smallest(replace(JOB, method="lora"), shape, from_catalog("h100_80gb", 8))
    assert reference_hours(dpo, adapter, data) == 0  # its reference is the base below it, asked in each step
    own = smallest(replace(JOB, method="lora"), shape, cpu())
    assert overhead_hours(JOB, found) > overhead_hours(JOB, own) == 0


SECONDS = {
    "load_gb_per_s": 2.0, "rehearsal_s": 60.0, "start_s": 100.0, "download_gb_per_s": 0.4, "export_gb_per_s": 0.5,
    "calibrate_s_per_billion": 40.0,
}


@pytest.mark.parametrize(
    ("stop_after", "rented", "seconds"),
    [
        ("train", False, 10 + 60),
        ("train", True, 10 + 60 + 100 + 50),
        ("bundle", False, 10 + 60 + 3 * 40 + 400),  # read back, two formats of whole weights written, one calibrated
        ("bundle", True, 10 + 60 + 3 * 40 + 400 + 100 + 50),
    ],
)
def test_what_20_gb_of_weights_take_beside_training(monkeypatch, stop_after, rented, seconds) -> None:
    monkeypatch.setattr(hours, "value", lambda group, name: SECONDS[name])
    shape, asked = SimpleNamespace(parameters=10e9), replace(JOB, stop_after=stop_after)
    asked = replace(asked, export=replace(asked.export, formats=["bf16", "int4", "adapter"]))
    assert hours.least_overhead_hours(asked, shape, rented) * 3600 == pytest.approx(seconds)

    candidate = SimpleNamespace(
        shape=shape, setup=None, tokens_per_second=100.0,
        hardware=SimpleNamespace(is_cpu=False, usd_per_hour=1.0 if rented else None),
    )
    monkeypatch.setattr(hours, "export_bytes", lambda *_: 30e9)
    monkeypatch.setattr(hours, "verifying", lambda *_: SimpleNamespace(seconds=7.0))
    exporting = 0 if stop_after == "train" else 60 + 7
    assert overhead_hours(asked, candidate) * 3600 == pytest.approx(seconds + exporting)
    first = hours.first_step_hours(asked, candidate, 4000 * ROW)
    assert first * 3600 == pytest.approx(10 + 60 + 4 * ROW / 100)
    candidate.hardware.is_cpu = True
    assert hours.first_step_hours(asked, candidate, 4000 * ROW) * 3600 == pytest.approx(4 * ROW / 100)


def test_dollars_are_hours_by_their_price_to_the_cent() -> None:
    assert hours.run_usd(2.5, 3.999) == 10.0 and hours.run_usd(None, 3.999) is hours.run_usd(2.5, None) is None
