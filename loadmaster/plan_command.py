"""`loadmaster plan --json`, `--nodes` and `--compare`: plans that are shown, and of which nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

from loadmaster import hub
from loadmaster.config.compose import Composed, compose
from loadmaster.config.hydra_sources import PRIMARY
from loadmaster.config.schema import Job
from loadmaster.dataset_size import dataset_tokens
from loadmaster.errors import ConfigError, DoesNotFit
from loadmaster.given_run import SETTINGS, over_run
from loadmaster.pipeline import planned
from loadmaster.preflight import make_plan
from loadmaster.preflight.scaling import parse_nodes, print_scaling, scaling
from loadmaster.preflight.table import print_comparison
from loadmaster.streams import Output

_OUTSIDE_BRACKETS = re.compile(r",(?![^\[{]*[\]}])")
"""The commas between values, not those inside of one: lora.targets=all-linear,[q_proj,v_proj]."""


def _composed(overrides: list[str], run: Path | None) -> Composed:
    """The job to plan; run: the run directory whose settings the words are laid over."""
    words = [*overrides, "stop_after=plan"]
    return compose(words, *((None, PRIMARY) if run is None else (str(run), SETTINGS)))


def on_more_nodes(nodes: str, overrides: list[str], run: Path | None = None) -> int:
    """Plan the same job on several numbers of nodes; nothing is written. 3 when it fits on none."""
    composed = _composed(overrides, run)
    refuse_trace(composed.job, "--nodes")
    hub.settle(composed.job.model.name)
    job = composed.job
    with composed.located():
        steps = scaling(job, parse_nodes(nodes), dataset_tokens(job))
    print_scaling(job, steps, Output())
    return 0 if any(step.plan.fits for step in steps) else DoesNotFit.exit_code


def refuse_trace(job: Job, flag: str) -> None:
    """Raises ConfigError where a step is to be traced: plans side by side are counted, also of what is not modelled."""
    if job.plan.trace:
        message, remedy = f"{flag} counts plans and traces none", f"plan.trace=false, or each plan without {flag}"
        raise ConfigError.of("plan.trace", True, message, remedy)


def as_json(overrides: list[str], run: Path | None = None) -> int:
    """plan.json on stdout, for programs; nothing is written. 3 when nothing fits."""
    composed = _composed(overrides, run)
    hub.settle(composed.job.model.name)
    with composed.located():
        plan = planned(composed.job)
    print(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    return 0 if plan.fits else DoesNotFit.exit_code


def side_by_side(compare: str, overrides: list[str], run: Path | None = None) -> int:
    """Plan the same job once for each value of one key; nothing is written. 3 when none of them fits."""
    key, equals, values = compare.partition("=")
    if not equals:
        remedy = "--compare hardware=l40s_x1,h200_x1"
        raise ConfigError.of("--compare", compare, "compares values of one key", remedy, "command line")
    plans, jobs = {}, {}
    for value in _OUTSIDE_BRACKETS.split(values):
        words = [*overrides, f"{key}={value}"]
        jobs[value] = _composed(words if run is None else over_run(words), run)
    for composed in jobs.values():
        refuse_trace(composed.job, "--compare")
    hub.settle(*(composed.job.model.name for composed in jobs.values()))
    for value, composed in jobs.items():
        with composed.located():
            plans[value] = make_plan(composed.job, dataset_tokens(composed.job))
    print_comparison(key, plans, Output())
    return 0 if any(plan.fits for plan in plans.values()) else DoesNotFit.exit_code
