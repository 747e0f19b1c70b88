"""The rows of a step over GPUs: each of them has equally many, in micro-batches of equal size."""

from __future__ import annotations

import math
from dataclasses import replace

from loadmaster.config.schema import Job


def rounded_up(rows: int, gpus: int) -> int:
    """The next number of rows that divides over so many GPUs."""
    return math.ceil(rows / gpus) * gpus


def dividing(job: Job, gpus: int) -> int:
    """batch.global_size where it divides over so many GPUs, else the next that does, in micro-batches as written."""
    rows, each = job.batch.global_size, 1 if job.micro_batch_size == "auto" else job.micro_batch_size
    if rows % gpus == 0:
        return rows
    return gpus * each if job.optimizer.in_backward is True and each > 1 else rounded_up(rows, gpus * each)


def with_rows(job: Job, rows: int) -> Job:
    """The job with so many rows in a step (batch.global_size)."""
    if rows == job.batch.global_size:
        return job
    return replace(job, batch=replace(job.batch, global_size=rows))


def divisors(number: int) -> list[int]:
    """In order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
