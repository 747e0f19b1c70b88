"""Who is alive, who waits and who is slow: decisions on what ranks say of themselves. Pure, no torch.

Every rank publishes a beat every second or two. What is judged is how long ago a beat, or the progress in it,
last *changed* by the reader's own clock, so the hosts' clocks need not agree:

    silent   its beats have stopped: the process was killed or stopped, or its host or network is gone
    stuck    beats come, and nobody has made progress for longer than the limit: those that are furthest behind
             have not arrived, the others wait for them
    slow     its own part of a step takes much longer than the other ranks'
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

STEP_FLOOR_S = 300.0
"""Shortest limit for a step, where none is set. The first step's goes by the rehearsal's."""
STEP_FACTOR = 20.0
"""A step that takes so many times the slowest one before is stuck."""
LONG_PHASES = ("start", "load", "rehearse", "reference", "evaluate", "save")
LONG_PHASE_S = 1800.0
"""Limit in those, where nobody counts steps: a rank moves on as long as its stacks change from beat to beat."""
PREPARE = "prepare"
"""One rank downloads and tokenises for the others, in threads and processes whose stacks are in no beat: no limit."""
WRITER = "checkpoint"
"""The thread whose stack counts beside the main one, which may wait for it: a large checkpoint takes long to write."""
SLOW_FACTOR = 1.2
"""A straggler's own part of a step takes so many times the ranks' median."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `mark` counts the points passed within the step; `count` counts beats."""

    rank: int
    node: int
    host: str
    count: int = 0
    mark: int = 0
    step: int = 0
    phase: str = "start"
    where: str = ""
    """Line of this program that the rank is in: `loop.py:120 in backward`."""
    stack: int = 0
    """Checksum of the lines of the rank's stacks: of its main thread and its writer."""
    busy_s: float = 0.0
    """Mean seconds of a step that the rank worked and did not wait, over its last steps; 0: not known."""
    state: str = "running"
    """running, done, or ended: it is about to end, for `reason`."""
    reason: str = ""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, self.mark

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Beat:
        return cls(**json.loads(data))


@dataclass(frozen=True)
class Sighting:
    """A rank's last beat, and for how long by the reader's clock the beat and the progress in it are the same."""

    beat: Beat
    quiet_s: float = 0.0
    idle_s: float = 0.0


def see(before: Sighting | None, beat: Beat, passed_s: float) -> Sighting:
    """The new sighting of a rank, `passed_s` after `before`."""
    if before is None:
        return Sighting(beat)
    quiet = 0.0 if beat.count != before.beat.count else before.quiet_s + passed_s
    moved = beat.progress != before.beat.progress or (beat.phase in LONG_PHASES and beat.stack != before.beat.stack)
    idle = 0.0 if moved else before.idle_s + passed_s
    return Sighting(beat, quiet, idle)


def age(before: Sighting, passed_s: float) -> Sighting:
    """The same rank, nothing heard of it meanwhile."""
    return replace(before, quiet_s=before.quiet_s + passed_s, idle_s=before.idle_s + passed_s)


def limit_s(phase: str, hang_s: float | None, slowest_step_s: float) -> float:
    """Seconds without progress after which a phase counts as stuck; `hang_s`: as set for a step, None is auto."""
    if phase == PREPARE:
        return math.inf
    if phase in LONG_PHASES:
        return max(LONG_PHASE_S, hang_s or 0.0)
    return max(STEP_FLOOR_S, STEP_FACTOR * slowest_step_s) if hang_s is None else hang_s


def judge(sightings: Sequence[Sighting], silence_s: float, hang_s: float | None, slowest_step_s: float) -> str | None:
    """What is wrong, naming hosts and ranks; None while all is well."""
    ended = [s.beat for s in sightings if s.beat.state == "ended"]
    if ended:
        return ended[0].reason
    running = [s for s in sightings if s.beat.state == "running"]
    silent = [s for s in running if s.quiet_s > silence_s]
    if silent:
        return lost(silent, sightings)
    if not running:
        return None
    behind = min(s.beat.progress for s in running)
    late = [s for s in running if s.beat.progress == behind]
    allowed = max(limit_s(s.beat.phase, hang_s, slowest_step_s) for s in late)
    if any(s.idle_s <= allowed for s in running):
        return None
    return _stuck(late, running)


def lost(silent: Sequence[Sighting], sightings: Sequence[Sighting]) -> str:
    """The sentence that names hosts and ranks that have fallen silent."""
    seconds = max(s.quiet_s for s in silent)
    last = "; ".join(f"rank {s.beat.rank} was last seen {place(s.beat)}" for s in silent[:8])
    gone = {s.beat.rank for s in silent}
    whole = [
        node
        for node in sorted({s.beat.node for s in silent})
        if all(s.beat.rank in gone for s in sightings if s.beat.node == node)
    ]
    sentences = [
        f"{_name(node, silent)} has given no sign of life for {seconds:.0f} s: "
        f"the host, its network or all of its processes are gone"
        for node in whole
    ]
    single = [s.beat for s in silent if s.beat.node not in whole]
    if single:
        names = ", ".join(f"rank {b.rank} on {host_name(b)}" for b in single)
        verb = "has" if len(single) == 1 else "have"
        sentences.append(
            f"{names} {verb} given no sign of life for {seconds:.0f} s: the process was killed, stopped or is stuck"
        )
    return f"{'; '.join(sentences)} ({last})"


def _stuck(late: Sequence[Sighting], running: Sequence[Sighting]) -> str:
    idle = min(s.idle_s for s in running)
    head = f"no progress for {idle:.0f} s"
    if len(late) == len(running):
        where = "; ".join(f"rank {s.beat.rank} on {host_name(s.beat)} {place(s.beat)}" for s in late[:8])
        return f"{head}: every rank is at the same point, and none goes on ({where})"
    names = "; ".join(f"rank {s.beat.rank} on {host_name(s.beat)} is still {place(s.beat)}" for s in late[:8])
    late_ranks = {s.beat.rank for s in late}
    waiting = [s.beat for s in running if s.beat.rank not in late_ranks]
    others = ", ".join(str(b.rank) for b in waiting[:16]) + (", ..." if len(waiting) > 16 else "")
    return f"{head}: {names}; rank{'s' if len(waiting) > 1 else ''} {others} wait{'s' * (len(waiting) == 1)} for it"


def stragglers(busy_s: Sequence[float]) -> list[int]:
    """Ranks whose own seconds of a step are more than SLOW_FACTOR times the median of all; 0 is not known."""
    known = [seconds for seconds in busy_s if seconds > 0]
    if len(known) < 2:
        return []
    # With two ranks the median lies between them: the faster one is the measure.
    usual = min(known) if len(known) == 2 else median(known)
    return [rank for rank, seconds in enumerate(busy_s) if seconds > SLOW_FACTOR * usual]


def slow_beats(sightings: Sequence[Sighting]) -> list[Beat]:
    """The last beats of the ranks that hold the others up, by rank."""
    beats = sorted((s.beat for s in sightings), key=lambda beat: beat.rank)
    return [beats[index] for index in stragglers([beat.busy_s for beat in beats])]


def straggler_message(sightings: Sequence[Sighting]) -> str | None:
    """A sentence that names the ranks that hold the others up; None where none does."""
    beats, slow = [s.beat for s in sightings], slow_beats(sightings)
    if not slow:
        return None
    usual = median(beat.busy_s for beat in beats if beat not in slow)
    names = ", ".join(f"rank {b.rank} on {host_name(b)} ({b.busy_s:.3f} s a step)" for b in slow)
    return f"straggler: {names}; the others' own part of a step takes {usual:.3f} s"


def host_name(beat: Beat) -> str:
    return f"node {beat.node} ({beat.host})"


def place(beat: Beat) -> str:
    """Where a rank is: `at step 12 in save, loop.py:80 in save`."""
    where = f", {beat.where}" if beat.where else ""
    return f"at step {beat.step} in {beat.phase}{where}"


def printer(beats: Sequence[Beat], node: int, missing: set[int]) -> int | None:
    """The rank of a node that tells its log what happened: the lowest that can."""
    return min((b.rank for b in beats if b.node == node and b.rank not in missing), default=None)


def _name(node: int, silent: Sequence[Sighting]) -> str:
    beats = [s.beat for s in silent if s.beat.node == node]
    ranks = f"rank {beats[0].rank}" if len(beats) == 1 else f"ranks {beats[0].rank} to {beats[-1].rank}"
    return f"node {node} (host {beats[0].host}, {ranks})"
