"""The exports as a picture: what each format costs on disk, and how far it is from the model as trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from loadmaster.report.charts import FIRST, SECOND, THIRD, drawn

WIDE, NARROW = (960, 300), (360, 260)
"""CSS pixels, also on a phone."""
LEAST_KL = 1e-7
"""Nats; what is nearer than that to the trained model is drawn here, on a logarithmic axis."""


@dataclass(frozen=True)
class Point:
    """One format: MB (10^6 bytes) on disk, mean KL in nats a token, the limit it is held to, and the judgement."""

    name: str
    megabytes: float
    mean_kl: float
    limit: float | None
    passed: bool


def draw_exports(points: list[Point], size: tuple[int, int]) -> Markup:
    """An <svg> that scales with its container: size on disk against mean KL, with a tick at each format's limit."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    def plot(axes: Any) -> None:
        labels = []
        for point in sorted(points, key=lambda point: point.mean_kl):
            kl = max(point.mean_kl, LEAST_KL)
            colour = FIRST if point.passed else SECOND
            axes.plot([point.megabytes], [kl], marker="o" if point.passed else "X", markersize=8, color=colour)
            beside: dict[str, Any] = {"xytext": (14, -4), "textcoords": "offset points"}
            labels.append(axes.annotate(point.name, (point.megabytes, kl), **beside))
            if point.limit is not None:
                axes.plot([point.megabytes], [point.limit], marker="_", markersize=22, markeredgewidth=2, color=THIRD)
                axes.plot([point.megabytes] * 2, sorted((kl, point.limit)), color=THIRD, linewidth=0.8, dashes=(2, 2))
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, 1.25 * max(point.megabytes for point in points))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=size[0] // 90))
        axes.margins(y=0.2)
        axes.set_xlabel("MB on disk")
        axes.set_ylabel("mean KL, nats a token")
        axes.figure.draw_without_rendering()  # lays the axes out
        _set_apart(labels)

    said = "Mean KL divergence of each export over its size on disk"
    return Markup(drawn(plot, f"exports {len(points)} {size}", size, said))


def _set_apart(labels: list[Any]) -> None:
    """Move each label, from the lowest on, up to where it lies over none below it."""
    placed: list[Any] = []
    for label in labels:
        for below in sorted(placed, key=lambda box: box.y0):
            box = label.get_window_extent()
            if box.overlaps(below):
                up = 1 + (below.y1 - box.y0) * 72 / label.figure.dpi
                label.xyann = (label.xyann[0], label.xyann[1] + up)
        placed.append(label.get_window_extent())
