"""The experiment tracker that a job names, through accelerate's classes; the lead alone has one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.words import without_password


class Tracker:
    """Logs figures by step; of a job without a tracker, or on another rank than the lead, does nothing.

    One that fails is left alone from then on: no run is lost because a server is gone.
    """

    def __init__(self, inner: Any | None, echo: Callable[[str], None]):
        self._inner, self._echo = inner, echo

    def log(self, figures: dict[str, Any], step: int) -> None:
        self._call("log", figures, step=step)

    def close(self) -> None:
        self._call("finish")

    def _call(self, name: str, *arguments: Any, **named: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, name)(*arguments, **named)
        except Exception as error:  # of a library's, a network's or a disk's
            kind, self._inner = type(self._inner).__name__, None
            self._echo(f"warning: {kind} failed ({_said(error)}); from here on metrics.jsonl alone has the figures")


def open_tracker(job: Job, run_dir: Path, job_hash: str, lead: bool, echo: Callable[[str], None]) -> Tracker:
    """Raises ConfigError for one that cannot begin: nobody is logged in, its server does not answer."""
    name = job.tracker.name
    if name == "none" or not lead:
        return Tracker(None, echo)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether they are the main process
    kind = LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": str(run_dir / "tracker")} if kind.requires_logging_directory else {}
    try:
        inner = kind(job.tracker.project, **where)
        if hasattr(inner, "start"):
            inner.start()
        inner.store_init_configuration({"recipe": job.recipe, "job_hash": job_hash})
    except Exception as error:
        remedy = "what its own documentation says, or tracker=none (metrics.jsonl is written in any case)"
        problem = Problem("tracker.name", name, IN_THE_JOB, f"could not begin ({_said(error)})", remedy)
        raise ConfigError([problem]) from error
    return Tracker(inner, echo)


def _said(error: Exception) -> str:
    """Its first line; it may name the address that was asked, with a password in it."""
    return f"{type(error).__name__}: {without_password(next(iter(str(error).strip().splitlines()), ''))[:200]}"


def refuse_missing_tracker(job: Job) -> None:
    """Raise ConfigError for a tracker that is not installed; a run would otherwise go without."""
    name = job.tracker.name
    if name != "none" and importlib.util.find_spec(name) is None:
        remedy = f"pip install {name}, or tracker=tensorboard (metrics.jsonl is written in any case)"
        raise ConfigError([Problem("tracker.name", name, IN_THE_JOB, "is not installed", remedy)])
