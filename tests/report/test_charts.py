"""Curves are drawn once for light and dark, and long runs stay small."""

from __future__ import annotations

import re

import pytest

from loadmaster.report.charts import Curve, binned, draw, smoothed
from loadmaster.report.export_chart import NARROW, WIDE, Point, draw_exports


def test_long_series_are_averaged_into_bins_that_keep_the_mean():
    steps = list(range(10_000))
    x, y = binned(steps, [float(s % 7) for s in steps], most=500)
    assert len(x) == len(y) == 500
    assert x[0] == pytest.approx(9.5) and sum(y) / len(y) == pytest.approx(3.0, abs=0.01)


def test_short_series_are_drawn_as_they_are():
    assert binned([1, 2, 3], [5.0, 6.0, 7.0]) == ([1, 2, 3], [5.0, 6.0, 7.0])


def test_smoothing_neither_lags_nor_moves_the_ends():
    line = [float(v) for v in range(50)]
    assert smoothed(line) == pytest.approx(line)
    noisy = [v + (-1) ** i for i, v in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smoothed(noisy)[3:-3], line[3:-3], strict=True)) < 0.5


@pytest.mark.parametrize(
    "values",
    [
        [1.0], [1.0, 1.0], [0.0] * 20, [1e-9, 1e6] * 20, [1e308] * 20, [1.7e308, -1.7e308] * 20,
        [float(v) for v in range(20_000)],
    ],
)
def test_every_shape_of_series_can_be_drawn_small(values: list[float]):
    steps = tuple(range(1, len(values) + 1))
    curve = Curve("Gradient norm", "L2", "norm", steps, tuple(values), may_be_log=True, from_zero=True)
    svg = draw(curve, 300, 200)
    assert svg.startswith('<svg viewBox="0 0 300 200"') and svg.rstrip().endswith("</svg>")
    assert len(svg) < 150_000
    assert "optimizer step" in svg and max(map(len, re.findall(">([^<>]+)</text>", svg))) < 20


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_labels_of_exports_that_are_alike_lie_apart(size: tuple[int, int]):
    names = ["fp8", "fp8_block", "int8"]
    svg = draw_exports([Point(name, 135.0, 1e-9 * number, 0.02, True) for number, name in enumerate(names)], size)
    at = [float(re.search(rf'y="([0-9.]+)"[^>]*>{name}</text>', svg)[1]) for name in names]
    assert at[0] - at[1] > 9 and at[1] - at[2] > 9


@pytest.mark.filterwarnings("ignore")
def test_labels_beyond_what_can_be_drawn_are_not_moved_for_ever():
    points = [Point(name, 100.0, 1e300, None, False) for name in ("fp8", "int4")]
    assert "<svg" in draw_exports([Point("bf16", 100.0, 0.0, None, True), *points], NARROW)
