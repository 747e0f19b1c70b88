"""The largest number of rows, and the longest row, that fit where what was asked for does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from loadmaster.config.job_rules import MLP_TOKENS
from loadmaster.config.schema import Job
from loadmaster.preflight.search import Candidate, evaluate, fixed, kept_layers, may_compile
from loadmaster.preflight.shape import ModelShape

ROW_STEP, MOST_ROW = 256, 2**24


def largest_micro_batch(job: Job, shape: ModelShape, failed: Candidate) -> int:
    """Rows that fit in place of `failed`'s, all else equal; 0 when not even one does."""
    low, high = 0, failed.setup.micro_batch_size
    while high - low > 1:
        middle = (low + high) // 2
        tried = evaluate(job, shape, failed.hardware, replace(failed.setup, micro_batch_size=middle))
        low, high = (middle, high) if tried.fits else (low, middle)
    return low


def longest_row(job: Job, shape: ModelShape, like: Candidate) -> int:
    """Tokens of the longest row, a multiple of ROW_STEP, that fits one at a time, recomputed.

    With layers' inputs in host memory where `like` has them there. What is needed grows almost in a line with the row,
    so the next length to try is where a line through the two tried ones has nothing missing.
    """
    checkpointing = job.activation_checkpointing
    if checkpointing == "auto":
        checkpointing = "offload" if like.setup.checkpointing == "offload" else "full"
    kept = kept_layers(job, shape, checkpointing)
    setup = replace(like.setup, micro_batch_size=1, checkpointing=checkpointing, kept_layers=kept)

    @cache
    def missing(length: int) -> float:
        compiled = fixed(job, like.hardware, checkpointing, length)["compiled"]
        tried = replace(setup, sequence_length=length, compiled=compiled)
        return evaluate(job, shape, like.hardware, tried).missing_gib

    low, high = max(ROW_STEP, setup.sequence_length // ROW_STEP * ROW_STEP), 2 * MOST_ROW
    if missing(low) > 0:
        low, high = ROW_STEP, low
        if missing(low) > 0:
            return 0
    before, tries = low, 0
    while high - low > ROW_STEP:
        tries += 1
        if high == 2 * MOST_ROW:  # none was too long yet
            guess = min(_crossing(missing, before, low), 4 * low) if before < low else 2 * low
        else:  # the middle now and then, for the line may have a bend
            guess = _crossing(missing, low, high) if tries % 3 else (low + high) / 2
        guess = min(max(int(guess // ROW_STEP) * ROW_STEP, low + ROW_STEP), high - ROW_STEP)
        if missing(guess) > 0:
            high = guess
        else:
            before, low = low, guess
    return low if job.compile is not True or may_compile(job, checkpointing, low) else MLP_TOKENS


def _crossing(missing: Callable[[int], float], short: int, long: int) -> float:
    """Where the line through two lengths has nothing missing; far away where it does not rise."""
    rise = missing(long) - missing(short)
    return short - missing(short) * (long - short) / rise if rise > 0 else 2.0 * MOST_ROW
