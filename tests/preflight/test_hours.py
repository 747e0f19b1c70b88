"""Steps, tokens and hours of a run, from what is known of its data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.schema import BatchConfig
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
    own = smallest(replace(JOB, method="lora"), shape, cpu())
    assert overhead_hours(JOB, found) > overhead_hours(JOB, own) == 0
