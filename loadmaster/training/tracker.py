"""The experiment tracker that a job names, through accelerate's classes; the lead alone has one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem


class Tracker:
    """Logs figures by step; of a job without a tracker, or on another rank than the lead, does nothing."""

    def __init__(self, inner: Any | None):
        self._inner = inner

    def log(self, figures: dict[str, Any], step: int) -> None:
        if self._inner is not None:
            self._inner.log(figures, step=step)

    def close(self) -> None:
        if self._inner is not None:
            self._inner.finish()


def open_tracker(job: Job, run_dir: Path, job_hash: str, lead: bool) -> Tracker:
    if job.tracker.name == "none" or not lead:
        return Tracker(None)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether they are the main process
    kind = LOGGER_TYPE_TO_CLASS[job.tracker.name]
    where = {"logging_dir": str(run_dir / "tracker")} if kind.requires_logging_directory else {}
    inner = kind(job.tracker.project, **where)
    if hasattr(inner, "start"):
        inner.start()
    inner.store_init_configuration({"recipe": job.recipe, "job_hash": job_hash})
    return Tracker(inner)


def refuse_missing_tracker(job: Job) -> None:
    """Raise ConfigError for a tracker that is not installed; a run would otherwise go without."""
    name = job.tracker.name
    if name != "none" and importlib.util.find_spec(name) is None:
        remedy = f"pip install {name}, or tracker=tensorboard (metrics.jsonl is written in any case)"
        raise ConfigError([Problem("tracker.name", name, IN_THE_JOB, "is not installed", remedy)])
