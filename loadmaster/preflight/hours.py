"""How long a run takes, from a machine's start to its last stage, and what that costs.

    hours = steps x rows of a step x tokens of a row / tokens a second
            + start, download, load, rehearsal
            + exports: written, calibrated, read back and scored
"""

from __future__ import annotations

import math
from dataclasses import replace

from loadmaster.config.schema import Job
from loadmaster.preflight.calibration import CALIBRATED
from loadmaster.preflight.candidate import FORWARDS, Candidate
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.disk import export_bytes
from loadmaster.preflight.exports import counts_exports
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.speed import tokens_per_second
from loadmaster.preflight.verification import verifying


def run_hours(job: Job, candidate: Candidate, dataset_tokens: int | None) -> float | None:
    """Start, download, load, training and export."""
    tokens = run_tokens(job, dataset_tokens)
    if tokens is None or not candidate.tokens_per_second:
        return None
    training = tokens / candidate.tokens_per_second / 3600 + reference_hours(job, candidate, dataset_tokens)
    return training + overhead_hours(job, candidate)


def run_usd(hours: float | None, usd_per_hour: float | None) -> float | None:
    """Dollars of a run, to the cent; None where its hours or the machine's price are not known."""
    return None if hours is None or usd_per_hour is None else round(hours * usd_per_hour, 2)


def steps(job: Job, dataset_tokens: int | None) -> int | None:
    """Optimizer steps of the run; None when the dataset's size is not known."""
    if job.max_steps is not None:
        return job.max_steps
    if dataset_tokens is None:
        return None
    rows = math.ceil(dataset_tokens / job.sequence_length)
    return max(1, math.ceil(math.ceil(rows / job.batch.global_size) * job.epochs))


def mean_rows(job: Job, dataset_tokens: int | None) -> float:
    """Of a step: the last one of an epoch has the rows that are left."""
    if dataset_tokens is None:
        return job.batch.global_size
    rows = max(1, math.ceil(dataset_tokens / job.sequence_length))
    return rows / math.ceil(rows / job.batch.global_size)


def run_tokens(job: Job, dataset_tokens: int | None) -> float | None:
    """Of all steps; None when the dataset's size is not known."""
    count = steps(job, dataset_tokens)
    return None if count is None else count * mean_rows(job, dataset_tokens) * job.sequence_length


def reference_hours(job: Job, candidate: Candidate, dataset_tokens: int | None) -> float:
    """Of the passes over the data that DPO (one) and KTO (two) make before training, where all weights are trained; 0
    for others."""
    tokens, rate = run_tokens(job, dataset_tokens), candidate.tokens_per_second
    if job.objective not in FORWARDS or candidate.setup.adapters or tokens is None or not rate:
        return 0.0
    beside = replace(candidate.setup, forwards=FORWARDS[job.objective])  # a step with the passes that are made before
    asking = tokens_per_second(candidate.shape, candidate.hardware, beside)
    return min(tokens, dataset_tokens or tokens) * (1 / asking - 1 / rate) / 3600


def overhead_hours(job: Job, candidate: Candidate) -> float:
    """Start of the machine, download, load, rehearsal, and the export: written, calibrated, read back and scored.

    What the scoring moves, where no GPU holds the model, is in it.
    """
    shape, hardware, setup = candidate.shape, candidate.hardware, candidate.setup
    if hardware.is_cpu:
        return 0.0
    least = least_overhead_hours(job, shape, rented=hardware.usd_per_hour is not None)
    if not counts_exports(job):
        return least
    written = export_bytes(job, shape, setup) / 1e9 / value("overhead", "export_gb_per_s")
    return least + (written + verifying(job, shape, hardware, setup).seconds) / 3600


def before_training_hours(shape: ModelShape) -> float:
    """The model loaded from this machine's disk, and the rehearsal."""
    load_s = 2 * shape.parameters / 1e9 / value("overhead", "load_gb_per_s")
    return (load_s + value("overhead", "rehearsal_s")) / 3600


def first_step_hours(job: Job, candidate: Candidate, dataset_tokens: int | None) -> float:
    """From the program's start to the end of its first step: a stop before that has nothing to save. Without
    reference_hours, of which nothing is lost."""
    step_s = mean_rows(job, dataset_tokens) * job.sequence_length / candidate.tokens_per_second
    before = 0.0 if candidate.hardware.is_cpu else before_training_hours(candidate.shape)
    return before + step_s / 3600


def least_overhead_hours(job: Job, shape: ModelShape, rented: bool) -> float:
    """Of that, what is the same for every setup and machine."""
    size_gb = 2 * shape.parameters / 1e9
    seconds = 3600 * before_training_hours(shape)
    if counts_exports(job):
        formats = [name for name in job.export.formats if name != "adapter"]
        seconds += size_gb * (1 + len(formats)) / value("overhead", "export_gb_per_s")
        calibrated = sum(name in CALIBRATED for name in formats)
        seconds += calibrated * shape.parameters / 1e9 * value("overhead", "calibrate_s_per_billion")
    if rented:
        seconds += value("overhead", "start_s") + size_gb / value("overhead", "download_gb_per_s")
    return seconds / 3600
