"""Numbers carry their unit and no digits that mean nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from loadmaster.report import units
from loadmaster.report.evaluation import Sample, are_ties, evaluation_section, samples_section
from loadmaster.report.overview import off_by


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.gib, 61.0, "61.00 GiB"),
        (units.gib, 0.0012, "0.0012 GiB"),
        (units.gib, 0, "0.00 GiB"),
        (units.file_size, 269_000_000, "269.0 MB"),
        (units.file_size, 16.06e9, "16.06 GB"),
        (units.gib, 0.01, "0.01 GiB"),
        (units.file_size, 12, "12 B"),
        (units.file_size, 1000, "1.0 KB"),
        (units.seconds, 0.014, "14 ms"),
        (units.seconds, 1.23, "1.2 s"),
        (units.seconds, 59.7, "1 min 00 s"),
        (units.seconds, 185, "3 min 05 s"),
        (units.seconds, 10, "10 s"),
        (units.seconds, 3600, "1 h 00 min"),
        (units.hours, 1.2, "1 h 12 min"),
        (units.percent, 0.9167, "91.7%"),
        (units.signed_percent, -0.943, "\N{MINUS SIGN}94.3%"),
        (units.rate, 412345.2, "412,345 tokens/s"),
        (units.rate, 10, "10 tokens/s"),
        (lambda v: units.things(v, "row"), 1, "1 row"),
        (lambda v: units.things(v, "row"), 0, "0 rows"),
        (lambda v: units.things(v, "batch", "batches"), 2, "2 batches"),
        (units.usd, 12.4, "$12.40"),
        (units.parameters, 134_515_008, "135 million"),
        (units.parameters, 8.03e9, "8.03 billion"),
        (units.parameters, 999_885_952, "1 billion"),
        (units.significant, 1.1774, "1.18"),
        (units.significant, 123.4, "123"),
        (units.significant, 1000.4, "1,000"),
        (units.decimals, math.inf, "infinite"),
        (units.gib, math.nan, units.MISSING),
        (units.gib, None, units.MISSING),
        (units.gib, True, units.MISSING),
        (units.gib, "12", units.MISSING),
    ],
)
def test_a_number_is_shown_with_its_unit(show, value, text: str):
    assert show(value) == text


@pytest.mark.parametrize(
    ("predicted", "measured", "text"),
    [(61.0, 60.0, "1.7% too high"), (57.0, 60.0, "5.0% too low"), (60.0, 60.0, "exact"), (60.0, 0.0, units.MISSING)],
)
def test_a_prediction_is_held_against_the_measurement(predicted: float, measured: float, text: str):
    assert off_by(predicted, measured) == text


def test_what_changed_is_of_what_was_before_and_of_shares_in_points():
    before = {"held_out": {"loss": 2.0, "perplexity": 0.0}, "task": {"metric": 0.25, "per_field": {"a": 0.5, "b": 1.0}}}
    after = {"held_out": {"loss": 1.5, "perplexity": 4.0}, "task": {"metric": 0.75, "per_field": {"a": 0.5, "c": 1.0}}}
    changes = evaluation_section(SimpleNamespace(evaluation={"before": before, "after": after}))
    assert {change.name: change.difference for change in changes} == {
        "loss": "\N{MINUS SIGN}25.0%", "perplexity": units.MISSING, "answers right": "+50.0 points", "a": "+0.0 points",
        "c": units.MISSING,
    }
    pairs = {"held_out": {"loss": 0.6, "pairs": 3, "reward_accuracy": 1.0, "reward_margin": 0.2}}
    (loss, preferred) = evaluation_section(SimpleNamespace(evaluation={"after": pairs}))
    assert (loss.unit, loss.before, loss.after, preferred.after) == ("of a pair", units.MISSING, "0.6000", "100.0%")


@pytest.mark.parametrize(
    ("accuracy", "margin", "tie"), [(0.0, 0.0, True), (0.0, -0.1, False), (0.5, 0.0, False), (None, None, False)]
)
def test_pairs_are_ties_where_nothing_tells_them_apart(accuracy, margin, tie: bool):
    assert are_ties({"reward_accuracy": accuracy, "reward_margin": margin}) is tie


def test_an_answer_is_marked_as_it_was_then_and_as_it_is_now():
    asked = {"prompt": "p", "reference": "r"}
    sides = {"before": [{**asked, "answer": "x", "right": False}], "after": [{**asked, "answer": "r", "right": True}]}
    files = SimpleNamespace(evaluation={name: {"task": {"samples": found}} for name, found in sides.items()})
    assert samples_section(files) == [Sample("p", "r", "x", False, "r", True)]
