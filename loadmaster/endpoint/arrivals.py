"""When requests come: Poisson, in bursts, or as they really came (a CSV). Seconds from the start, ascending."""

from __future__ import annotations

import csv
import math
from datetime import datetime
from pathlib import Path
from random import Random

from loadmaster.errors import DataError


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Independent requests, `rate` a second."""
    return _exponential(rate, 0.0, seconds, Random(seed))


def bursty(rate: float, seconds: float, factor: float = 10.0, burst_s: float = 60.0, seed: int = 0) -> list[float]:
    """The same mean rate in bursts: `factor` times as many for about `burst_s`, then silence.

    Bursts and pauses have exponential lengths; the share of time in a burst is 1 / factor.
    """
    random, now, found = Random(seed), 0.0, []
    while now < seconds:
        now += random.expovariate(1 / (burst_s * (factor - 1))) if factor > 1 else 0.0
        end = min(seconds, now + random.expovariate(1 / burst_s))
        found += _exponential(rate * factor, now, end, random)
        now = end
    return found


def _exponential(rate: float, start: float, end: float, random: Random) -> list[float]:
    found, now = [], start + random.expovariate(rate)
    while now < end:
        found.append(now)
        now += random.expovariate(rate)
    return found


def from_csv(path: Path) -> list[float]:
    """First column: seconds (or any UNIX time) or ISO 8601; a heading is skipped.

    Raises DataError naming the line of what is neither, and for a file with fewer than 2 times.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give a CSV with one request a line, its time first")
    times: list[float] = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or not row[0].strip():
                continue
            seconds = _seconds(row[0].strip())
            if seconds is None and number > 1:
                raise DataError(f"{path}:{number}: {row[0]!r} is neither seconds nor a time like 2026-11-24T08:00:00")
            if seconds is not None:
                times.append(seconds)
    if len(times) < 2:
        raise DataError(f"{path}: holds {len(times)} times; at least 2 are needed")
    times.sort()
    return [time - times[0] for time in times]


def _seconds(text: str) -> float | None:
    try:
        number = float(text)
        return number if math.isfinite(number) else None
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
