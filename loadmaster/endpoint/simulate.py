"""A small simulation of an endpoint: who waits how long, for a worker that starts or a slot, and what it costs.

Requests queue first come, first served. A worker runs `slots` at a time, each for as long as it takes. With no
worker up, a request starts one at once; with some, one more starts when a request has waited `queue_delay_s` and
those that are starting will not be enough. A worker that has nothing to do for `idle_timeout_s` ends, down to
`min_workers`, which are there from the beginning and are billed as Active. Everything from start to end is billed.

Checked against closed forms: M/M/c and M/D/1 waits, and economics.share_up (tests/endpoint/test_simulate.py).
FlashBoot is not modelled: the provider promises no time for it, so a start is always a cold one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, repeat


@dataclass(frozen=True)
class Fleet:
    """How an endpoint scales."""

    min_workers: int = 0
    max_workers: int = 3
    slots: int = 1
    """Requests that a worker runs at once."""
    start_s: float = 60.0
    idle_timeout_s: float = 10.0
    queue_delay_s: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1 or self.slots < 1:
            raise ValueError("a fleet needs 0 <= min_workers <= max_workers, and at least one worker and slot")


@dataclass(frozen=True)
class Outcome:
    """Of one simulation. Waits are from arrival to the start of the work, seconds, in order of arrival."""

    fleet: Fleet
    seconds: float
    waits_s: list[float]
    cold: int
    """Requests that a worker served which was not yet up when they came."""
    flex_worker_s: float
    active_worker_s: float
    most_workers: int

    def wait_s(self, share: float) -> float:
        """Percentile of the waits: 0.99 is p99."""
        ordered = sorted(self.waits_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def cold_share(self) -> float:
        return self.cold / len(self.waits_s) if self.waits_s else 0.0

    def usd(self, flex_per_hour: float, active_discount: float = 0.0, over_s: float | None = None) -> float:
        """Bill of the simulated time, or of `over_s` seconds like it."""
        scale = 1.0 if over_s is None else over_s / self.seconds
        billed = self.flex_worker_s + self.active_worker_s * (1 - active_discount)
        return flex_per_hour / 3600 * billed * scale


@dataclass
class _Worker:
    started: float
    ready: float
    active: bool
    busy: int = 0
    up: bool = False
    used: int = 0
    """Grows with every piece of work, so that an idle check knows whether it is still about the same pause."""


@dataclass
class _State:
    fleet: Fleet
    events: list[tuple[float, int, str, object]] = field(default_factory=list)
    order: count = field(default_factory=count)
    queue: deque[int] = field(default_factory=deque)
    workers: list[_Worker] = field(default_factory=list)
    flex_worker_s: float = 0.0
    most_workers: int = 0

    def at(self, time: float, kind: str, what: object) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, what))

    def start(self, now: float) -> None:
        worker = _Worker(started=now, ready=now + self.fleet.start_s, active=False)
        self.workers.append(worker)
        self.most_workers = max(self.most_workers, len(self.workers))
        self.at(worker.ready, "ready", worker)

    def start_if_needed(self, now: float) -> None:
        coming = sum(self.fleet.slots for worker in self.workers if not worker.up)
        if len(self.workers) < self.fleet.max_workers and coming < len(self.queue):
            self.start(now)


def simulate(arrivals: Sequence[float], service_s: float | Sequence[float], fleet: Fleet) -> Outcome:
    """arrivals: ascending seconds; service_s: seconds of every request, or of each one."""
    state = _State(fleet)
    services = repeat(service_s) if isinstance(service_s, int | float) else service_s
    works = [work for _, work in zip(arrivals, services, strict=False)]
    waits = [0.0] * len(arrivals)
    cold, now = 0, 0.0
    for _ in range(fleet.min_workers):
        state.workers.append(_Worker(started=0.0, ready=0.0, active=True, up=True))
    state.most_workers = len(state.workers)
    for index, time in enumerate(arrivals):
        state.at(time, "arrival", index)

    def serve(now: float) -> None:
        nonlocal cold
        for worker in state.workers:  # the first ones are filled first, so that the last ones can end
            while state.queue and worker.up and worker.busy < fleet.slots:
                index = state.queue.popleft()
                waits[index] = now - arrivals[index]
                cold += worker.ready > arrivals[index]
                worker.busy += 1
                worker.used += 1
                state.at(now + works[index], "done", worker)

    def rest(worker: _Worker, now: float) -> None:
        if worker.up and worker.busy == 0 and not worker.active:
            state.at(now + fleet.idle_timeout_s, "idle", (worker, worker.used))

    while state.events:
        now, _, kind, what = heapq.heappop(state.events)
        if kind == "arrival":
            state.queue.append(what)  # type: ignore[arg-type]
            serve(now)
            if state.queue and not state.workers:
                state.start(now)
            elif state.queue:
                state.at(now + fleet.queue_delay_s, "late", what)
        elif kind == "late":
            if state.queue and state.queue[0] <= what:  # type: ignore[operator]
                state.start_if_needed(now)
        elif kind == "idle":
            worker, used = what  # type: ignore[misc]
            if worker.busy == 0 and worker.used == used:
                worker.up = False
                state.workers.remove(worker)
                state.flex_worker_s += now - worker.started
        else:
            worker: _Worker = what  # type: ignore[no-redef]
            if kind == "ready":
                worker.up = True
            else:
                worker.busy -= 1
            serve(now)
            rest(worker, now)
    return Outcome(fleet, now, waits, cold, state.flex_worker_s, now * fleet.min_workers, state.most_workers)
