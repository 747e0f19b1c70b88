"""Learning rate and intervals as pure functions of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadmaster.config.schema import Job, OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig, peak: float) -> float:
    """Rate of optimizer step `step` (1-based): a linear rise to `peak` over the warm-up, then the schedule.

    The schedule reaches its end where the step after the last one would be, so that the last one still trains.
    """
    warmup = math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    begin = max(warmup, steps - math.ceil(config.decay_ratio * steps)) if config.schedule == "wsd" else warmup
    if config.schedule == "constant" or step <= begin:
        return peak
    progress = (step - begin) / (steps - begin + 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * max(0.0, shape))


@dataclass
class HeldOutLosses:
    """The lowest held-out loss of a run so far, its step, and how many evaluations since then found none below it."""

    lowest: float | None = None
    step: int = 0
    in_vain: int = 0

    def add(self, loss: float | None, step: int) -> None:
        """loss: None where it was not finite."""
        self.in_vain += 1
        if loss is not None and (self.lowest is None or loss < self.lowest):
            self.lowest, self.step, self.in_vain = loss, step, 0


def checkpoint_interval(job: Job, steps: int) -> int:
    """Steps between checkpoints; auto is a tenth of the run and at least 10."""
    every = job.checkpoint.every_steps
    return max(10, steps // 10) if every == "auto" else every


def evaluation_interval(job: Job, steps: int) -> int | None:
    """Steps between held-out evaluations, or None for only at the end."""
    every = job.evaluation.every_steps
    return checkpoint_interval(job, steps) if every == "auto" else every
