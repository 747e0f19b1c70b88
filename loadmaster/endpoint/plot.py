"""The trade-off that scaling settings make, as a picture: dollars a month against waiting."""

from __future__ import annotations

import io
from collections.abc import Sequence

from loadmaster.endpoint.economics import MONTH_S, Prices
from loadmaster.endpoint.simulate import Outcome

DASHES = ("--", ":", "-.")
MARKERS = "osD^vPX"
"""Told apart without colours too, as those that carry a load lie close together."""
SHOWN_FROM_S = 0.001
"""Waits below are drawn here: the axis is logarithmic."""


def draw(outcomes: Sequence[Outcome], prices: Prices, title: str) -> str:
    """SVG text: left the distribution of waits, right p99 wait over the bill, one mark a fleet (the chosen first)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "loadmaster"
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        waits, bill = figure.subplots(1, 2)
        for index, outcome in enumerate(outcomes):
            ordered = sorted(max(wait, SHOWN_FROM_S) for wait in outcome.waits_s)
            shares = [(position + 1) / len(ordered) for position in range(len(ordered))]
            style = {"linewidth": 2.5} if index == 0 else {"linewidth": 1, "linestyle": DASHES[index % len(DASHES)]}
            (line,) = waits.plot(ordered, shares, label=label(outcome), drawstyle="steps-post", **style)
            usd = outcome.usd(prices.flex, prices.active_discount, over_s=MONTH_S)
            marker = {"marker": "*", "markersize": 12} if index == 0 else {"marker": MARKERS[index % len(MARKERS)]}
            bill.plot([usd], [max(outcome.wait_s(0.99), SHOWN_FROM_S)], color=line.get_color(), **marker)
            line.set(**marker, markevery=[len(ordered) * (index + 1) // (len(outcomes) + 1)])
        waits.set(xscale="log", xlabel="wait before the work starts, s", ylabel="share of requests", ylim=(0, 1.02))
        bill.set(yscale="log", xlabel="US dollars a month, list prices", ylabel="p99 wait, s")
        for axes in (waits, bill):
            axes.grid(alpha=0.3)
        figure.suptitle(title)
        figure.legend(*waits.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def label(outcome: Outcome) -> str:
    fleet = outcome.fleet
    return f"{fleet.min_workers} to {fleet.max_workers} workers, idle {fleet.idle_timeout_s:g} s"
