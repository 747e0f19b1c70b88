"""Where the seconds go from the job to its first optimizer step."""

from __future__ import annotations

import os
import time

from loadmaster.training.stop import STARTED

WORDS = {
    "before_training": "until training",
    "load": "loading",
    "rehearsal": "rehearsal",
    "reference": "for what the model said before",
    "resume": "going on from a checkpoint",
    "records": "opening the log and the tracker",
    "first_step": "the step",
}
"""Of each part, in their order, behind its seconds."""
SAID = 0.05
"""Seconds; what took less is told only in figures."""


class Parts:
    """Seconds of what comes one after the other, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def ended(self, name: str) -> None:
        """What took place since the last part was (some more of) this one."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


class Start(Parts):
    """Of a run: until training (imports, plan, data; from the job, in whatever process), then part by part."""

    def __init__(self):
        super().__init__()
        self.seconds["before_training"] = time.time() - float(os.environ.get(STARTED, time.time()))
        self.rehearsal: dict[str, float] = {}
        self.compiles = False
        """Layers, an attention kernel, or an optimizer's step."""

    @property
    def is_over(self) -> bool:
        return "first_step" in self.seconds

    def sentence(self) -> str:
        said = {name: f"{s:.1f} s {WORDS[name]}" for name, s in self.seconds.items() if s >= SAID}
        if "rehearsal" in said and self.once_s >= SAID:
            once = "compiling, and what is done once" if self.compiles else "what is done once"
            said["rehearsal"] += f" ({once}: {self.once_s:.1f} s)"
        return f"first step taken {self.total_s:.1f} s after the job was read: {', '.join(said.values())}"

    @property
    def once_s(self) -> float:
        """What the first step of the rehearsal took beyond the second, which has all that it compiled."""
        return max(0.0, self.rehearsal.get("first_step", 0.0) - self.rehearsal.get("second_step", 0.0))

    def figures(self) -> dict[str, float]:
        """For result.json; a part of the rehearsal has its name in front."""
        of_it = {f"rehearsal_{name}": seconds for name, seconds in self.rehearsal.items()}
        return {name: round(seconds, 3) for name, seconds in {**self.seconds, **of_it, "total": self.total_s}.items()}
