"""Numbers carry their unit and no digits that mean nothing."""

from __future__ import annotations

import math

import pytest

from loadmaster.report import units
from loadmaster.report.overview import off_by


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.gib, 61.0, "61.00 GiB"),
        (units.gib, 0.0012, "0.0012 GiB"),
        (units.gib, 0, "0.00 GiB"),
        (units.file_size, 269_000_000, "269.0 MB"),
        (units.file_size, 16.06e9, "16.06 GB"),
        (units.file_size, 12, "12 B"),
        (units.seconds, 0.014, "14 ms"),
        (units.seconds, 1.23, "1.2 s"),
        (units.seconds, 59.7, "1 min 00 s"),
        (units.seconds, 185, "3 min 05 s"),
        (units.hours, 1.2, "1 h 12 min"),
        (units.percent, 0.9167, "91.7%"),
        (units.signed_percent, -0.943, "\N{MINUS SIGN}94.3%"),
        (units.rate, 412345.2, "412,345 tokens/s"),
        (lambda v: units.things(v, "row"), 1, "1 row"),
        (lambda v: units.things(v, "batch", "batches"), 2, "2 batches"),
        (units.usd, 12.4, "$12.40"),
        (units.parameters, 134_515_008, "135 million"),
        (units.parameters, 8.03e9, "8.03 billion"),
        (units.parameters, 999_885_952, "1 billion"),
        (units.significant, 1.1774, "1.18"),
        (units.significant, 123.4, "123"),
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
