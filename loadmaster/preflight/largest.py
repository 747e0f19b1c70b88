"""The largest number of rows, and the longest row, that fit where what was asked for does not."""

from __future__ import annotations

from dataclasses import replace

from loadmaster.config.schema import Job
from loadmaster.preflight.search import Candidate, evaluate, fixed, may_compile
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

    With layers' inputs in host memory where `like` has them there.
    """
    checkpointing = job.activation_checkpointing
    if checkpointing == "auto":
        checkpointing = "offload" if like.setup.checkpointing == "offload" else "full"
    setup = replace(like.setup, micro_batch_size=1, checkpointing=checkpointing)

    def fits(length: int) -> bool:
        if job.compile is True and not may_compile(job, checkpointing, length):
            return False
        compiled = fixed(job, like.hardware, checkpointing, length)["compiled"]
        return evaluate(job, shape, like.hardware, replace(setup, sequence_length=length, compiled=compiled)).fits

    if not fits(ROW_STEP):
        return 0
    low, high = ROW_STEP, 2 * ROW_STEP
    while high <= MOST_ROW and fits(high):
        low, high = high, 2 * high
    while high - low > ROW_STEP:
        middle = (low + high) // (2 * ROW_STEP) * ROW_STEP
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
