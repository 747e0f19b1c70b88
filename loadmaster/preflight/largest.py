"""The largest number of rows, and the longest row, that fit where what was asked for does not."""

from __future__ import annotations

import math
from dataclasses import replace

from loadmaster.config.job_rules import MLP_TOKENS
from loadmaster.config.schema import Job
from loadmaster.preflight.candidate import Candidate, evaluate, fixed, kept_layers, may_compile

ROW_STEP, MOST_ROW = 256, 2**24


def largest_micro_batch(job: Job, failed: Candidate) -> int:
    """Rows that fit in place of `failed`'s, all else equal; where it steps in the backward pass, as all rows of a step.
    0 when not even one does."""
    rows = failed.setup.micro_batch_size * failed.setup.gradient_accumulation_steps
    low, high = 0, failed.setup.micro_batch_size
    while high - low > 1:
        middle = (low + high) // 2
        steps = 1 if failed.setup.in_backward else math.ceil(rows / middle)
        setup = replace(failed.setup, micro_batch_size=middle, gradient_accumulation_steps=steps)
        tried = evaluate(job, failed.shape, failed.hardware, setup)
        low, high = (middle, high) if tried.fits else (low, middle)
    return low


def longest_row(job: Job, like: Candidate, offload: bool = False) -> int:
    """Tokens of the longest row, a multiple of ROW_STEP, that fits one at a time, recomputed, with weights cut where
    the plan may cut them and layers dropped after their forward pass.

    offload: with layers' inputs in host memory; so they are where `like` has them there. What is needed grows almost in
    a line with the row, so the next length to try is where a line through the two tried ones has nothing missing; the
    end that stays for a second time counts for half (Illinois), for the line may have a bend.
    """
    checkpointing = job.activation_checkpointing
    if checkpointing == "auto":
        checkpointing = "offload" if offload or like.setup.checkpointing == "offload" else "full"
    kept = kept_layers(job, like.shape, checkpointing)
    steps = 1 if like.setup.in_backward else like.setup.micro_batch_size * like.setup.gradient_accumulation_steps
    alone = {"micro_batch_size": 1, "gradient_accumulation_steps": steps}
    whole = job.sharding != "auto" or like.setup.sharding != "ddp" or (like.setup.dora and like.setup.adapters)
    spread = {"sharding": like.setup.sharding if whole else "fsdp", "reshard_after_forward": True}
    setup = replace(like.setup, **alone, **spread, checkpointing=checkpointing, kept_layers=kept)

    def missing(length: int) -> float:
        compiled = fixed(job, like.hardware, setup.method, checkpointing, length)["compiled"]
        tried = replace(setup, sequence_length=length, compiled=compiled)
        return evaluate(job, like.shape, like.hardware, tried).missing_gib

    low, high = max(ROW_STEP, setup.sequence_length // ROW_STEP * ROW_STEP), 2 * MOST_ROW
    known = setup == like.setup and not like.fits
    lacks = {low + ROW_STEP: like.missing_gib} if known else {low: missing(low)}
    if known or lacks[low] > 0:
        low, high = ROW_STEP, next(iter(lacks))
        lacks[low] = missing(low)
        if lacks[low] > 0:
            return 0
    before, stayed = low, 0
    while high - low > ROW_STEP:
        if high not in lacks:  # none was too long yet
            guess = min(_crossing(before, low, lacks), 4 * low) if before < low else 2 * low
        else:
            guess = _crossing(low, high, lacks)
        guess = min(max(int(guess // ROW_STEP) * ROW_STEP, low + ROW_STEP), high - ROW_STEP)
        lacks[guess] = missing(guess)
        stays = high if lacks[guess] <= 0 else low
        before, low, high = (low, guess, high) if stays == high else (before, low, guess)
        if stays == stayed and high in lacks:
            lacks[stays] /= 2
        stayed = stays
    return low if job.compile is not True or may_compile(job, checkpointing, low) else MLP_TOKENS


def _crossing(short: int, long: int, lacks: dict[int, float]) -> float:
    """Where the line through two lengths has nothing missing; far away where it does not rise."""
    rise = lacks[long] - lacks[short]
    return short - lacks[short] * (long - short) / rise if rise > 0 else 2.0 * MOST_ROW
