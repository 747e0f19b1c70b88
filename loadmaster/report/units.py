"""Numbers as people read them: never without a unit, never with digits that mean nothing."""

from __future__ import annotations

import math
from typing import Any

from loadmaster.report.inputs import number

MISSING = "\N{EN DASH}"


def gib(value: Any) -> str:
    """A size that is given in GiB (2^30 bytes)."""
    return _with(value, lambda v: f"{v:,.2f} GiB" if v == 0 or abs(v) >= 0.01 else f"{v:.4f} GiB")


def file_size(value: Any) -> str:
    """A size that is given in bytes; in powers of ten, as files and downloads are counted everywhere."""

    def show(v: float) -> str:
        for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
            if v >= size:
                return f"{v / size:,.2f} {unit}" if unit == "GB" else f"{v / size:,.1f} {unit}"
        return f"{v:.0f} B"

    return _with(value, show)


def seconds(value: Any) -> str:
    def show(v: float) -> str:
        if 0 < v < 0.1:
            return f"{1000 * v:.0f} ms"
        if v < 10:
            return f"{v:.1f} s"
        if round(v) < 60:
            return f"{v:.0f} s"
        minutes, rest = divmod(round(v), 60)
        if minutes < 60:
            return f"{minutes} min {rest:02d} s"
        return f"{minutes // 60} h {minutes % 60:02d} min"

    return _with(value, show)


def hours(value: Any) -> str:
    found = number(value)
    return MISSING if found is None else seconds(found * 3600)


def percent(value: Any, digits: int = 1) -> str:
    """A share between 0 and 1."""
    return _with(value, lambda v: f"{100 * v:.{digits}f}%")


def signed_percent(value: Any) -> str:
    return _with(value, lambda v: f"{100 * v:+.1f}%".replace("-", "\N{MINUS SIGN}"))


def rate(value: Any) -> str:
    return _with(value, lambda v: f"{v:,.0f} tokens/s" if v >= 10 else f"{v:.1f} tokens/s")


def usd(value: Any) -> str:
    return _with(value, lambda v: f"${v:,.2f}")


def count(value: Any) -> str:
    return _with(value, lambda v: f"{v:,.0f}")


def things(value: Any, one: str, many: str | None = None) -> str:
    """A count of something, in the singular where there is one."""
    return _with(value, lambda v: f"{v:,.0f} {one if v == 1 else many or one + 's'}")


def parameters(value: Any) -> str:
    def show(v: float) -> str:
        for unit, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
            if float(f"{v:.3g}") >= size:  # 999.9 million are 1 billion
                return f"{v / size:.3g} {unit}"
        return f"{v:,.0f}"

    return _with(value, show)


def decimals(value: Any, digits: int = 4) -> str:
    return _with(value, lambda v: f"{v:,.{digits}f}")


def significant(value: Any, digits: int = 3) -> str:
    """Three significant digits for figures whose size is not known beforehand (KL, perplexity)."""
    return _with(value, lambda v: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:#.{digits}g}".rstrip("."))


def _with(value: Any, show: Any) -> str:
    found = number(value)
    if found is None:
        return MISSING
    return "infinite" if math.isinf(found) else show(found)
