"""What training reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from loadmaster.training.rehearsal import Rehearsed


@dataclass
class Outcome:
    """What training reports; goes into result.json."""

    steps: int
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float
    trained_tokens_per_second: float
    rehearsal: Rehearsed
    peaks: dict[str, float]
    """Of the rank that needed most."""
    saves: dict[str, float | bool] | None
    """How many checkpoints, their size, how long the loop waited for them and how long they took to write."""
    recompilations: int = 0
    """Graphs that were compiled after the rehearsal; each makes a step slow, and there should be none."""
    input_share: float = 0.0
    """Of the steps' time, what went by until their batches were there."""
    attention_kernel: str = ""
    """varlen (PyTorch's own), FA3, FA4, flex_attention, or by_document (a CPU, and attention dropout)."""
    resumed_after: int = 0
    """The step whose checkpoint this process went on from: rates and times are of what came after it."""
    taken_step: int = 0
    """The step whose weights are the trained ones."""
    start_s: dict[str, float] = field(default_factory=dict)
    """Seconds of each part until the first step of this process was taken (training/start.py)."""
    compiler_cache: dict[str, int] = field(default_factory=dict)
    """Graphs of this run that were found in the compiler's cache, and that were not."""
