"""Curves of a run as inline SVG: drawn by matplotlib, coloured by the page.

Every colour goes into the SVG as a marker that is then replaced by a CSS variable, so that one drawing
serves light and dark; text stays text in the page's own font. Title, unit and legend are HTML beside the
drawing, where they wrap and can be read aloud. The smoothed line is a centred mean, so it does not lag.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MOST_POINTS = 800
"""More are averaged in bins: a screen shows no more, and the page stays small."""
SMALLEST_TO_SMOOTH = 12
LOG_SCALE_FROM = 50.0
"""Ratio of the largest to the smallest value from which a chart that allows it is logarithmic."""

COLOURS = {
    "#010101": "var(--ink-soft)", "#020202": "var(--rule)", "#030303": "var(--series-1)", "#040404": "var(--series-2)",
    "#050505": "var(--series-3)", "#060606": "var(--page)",
}
INK, RULE, FIRST, SECOND, THIRD, PAGE = COLOURS
POINTS_PER_INCH = 72


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend. mark: raw, line, points, dashed or skipped, drawn by the style sheet."""

    mark: str
    label: str


@dataclass(frozen=True)
class Curve:
    """One chart: a measured series over optimizer steps, and what it is to be seen against.

    x, y: step and value of the main series. others: (label, steps, values), few points, drawn with marks.
    lines: (label, value), drawn as a dashed level. missing: steps without a value (skipped), marked on the axis.
    """

    title: str
    unit: str
    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    smooth: bool = True
    may_be_log: bool = False
    from_zero: bool = False
    others: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = ()
    lines: tuple[tuple[str, float], ...] = ()
    missing: tuple[float, ...] = ()

    @property
    def is_smoothed(self) -> bool:
        return self.smooth and len(self.y) >= SMALLEST_TO_SMOOTH

    @property
    def legend(self) -> list[Key]:
        """What is drawn, where it is more than one thing."""
        main = [Key("raw", self.label), Key("line", "smoothed")] if self.is_smoothed else [
            Key("line", self.label)
        ]
        others = [Key("points", label) for label, *_ in self.others] + [Key("dashed", label) for label, _ in self.lines]
        skipped = [Key("skipped", "skipped step")] if len(self.missing) else []
        keys = [*main, *others, *skipped]
        return keys if len(keys) > 1 else []


@lru_cache(maxsize=16)
def draw(curve: Curve, width: int, height: int) -> str:
    """The chart as an <svg> element of `width` x `height` CSS pixels that scales with its container.

    Drawn once: the page is written after every stage, and most curves are as they were.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    def plot(axes: Any) -> None:
        axes.figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
        _plot(axes, curve)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=max(3, width // 90), integer=True, min_n_ticks=1))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())

    return drawn(plot, f"{curve.title} {width}x{height}", (width, height),
                 f"{curve.title}, {curve.unit}, over optimizer steps")


def drawn(plot: Callable[[Any], None], salt: str, size: tuple[int, int], description: str) -> str:
    """What `plot` draws on axes of so many CSS pixels, as an <svg> element of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(salt))
        figure = Figure(figsize=(size[0] / POINTS_PER_INCH, size[1] / POINTS_PER_INCH), layout="constrained")
        plot(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(buffer.getvalue(), description)


def _plot(axes: Any, curve: Curve) -> None:
    x, y = binned(curve.x, curve.y)
    if curve.is_smoothed:
        axes.plot(x, y, color=FIRST, linewidth=1, alpha=0.4)
        axes.plot(x, smoothed(y), color=FIRST, linewidth=2)
    else:
        axes.plot(x, y, color=FIRST, linewidth=2, marker="o" if len(y) == 1 else None, markersize=4)
    for _, other_x, other_y in curve.others:
        axes.plot(other_x, other_y, color=SECOND, linewidth=1.2, marker="o", markersize=5, markeredgecolor=PAGE)
    for _, level in curve.lines:
        axes.axhline(level, color=THIRD, linewidth=1.4, dashes=(4, 3))
    if len(curve.missing):
        axes.plot(curve.missing, [0.02] * len(curve.missing), transform=axes.get_xaxis_transform(), linestyle="none",
                  marker="x", color=SECOND, markersize=5)
    if curve.may_be_log and min(y) > 0 and max(y) / min(y) > LOG_SCALE_FROM:
        axes.set_yscale("log")
    elif curve.from_zero:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.02)


def _tick(value: float) -> str:
    return (f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}").replace("-", "\N{MINUS SIGN}")


def binned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points, each the mean of its neighbours."""
    size = -(-len(x) // most)
    if size <= 1:
        return list(x), list(y)
    parts = range(0, len(x), size)
    return [_mean(x[i : i + size]) for i in parts], [_mean(y[i : i + size]) for i in parts]


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, about a twentieth of all on either side, fewer towards the ends."""
    reach = max(2, len(values) // 20)
    out = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        out.append(_mean(values[i - near : i + near + 1]))
    return out


def _mean(values: Sequence[float]) -> float:
    """Of values whose sum may be beyond a float."""
    return sum(value / len(values) for value in values)


def _style(salt: str) -> dict[str, object]:
    return {
        "svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 11, "axes.labelsize": 11,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": RULE, "xtick.color": RULE, "ytick.color": RULE,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.spines.left": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "grid.linewidth": 0.7,
        "axes.axisbelow": True, "ytick.major.size": 0, "ytick.minor.size": 0, "xtick.major.size": 3,
        "figure.facecolor": "none", "axes.facecolor": "none",
    }


def _inline(svg: str, description: str) -> str:
    """The drawing as an element of the page: no prolog, no fixed size, page colours, page font, no ids to clash."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    element = re.sub(r' id="[a-z]+[0-9a-z.]*_[0-9_]+"', "", element)
    view_box = re.search(r'viewBox="([^"]*)"', element)
    assert view_box, "matplotlib writes a viewBox"
    element = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="{view_box[1]}" role="img" aria-label="{description}">', element, count=1
    )
    element = element.replace("xlink:href", "href")
    element = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", element)
    for marker, variable in COLOURS.items():
        element = element.replace(marker, variable)
    return element
