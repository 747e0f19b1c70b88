"""`loadmaster plan`, `train`, `evaluate`, `export`, `bundle`: the stages up to one, of a job or of a run that is there.

A job is given in the words of train.py; a run by its directory, whose own settings then count, and words behind it
change them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import NoReturn

from loadmaster import hub
from loadmaster.config.compose import Composed
from loadmaster.config.overrides import note_repeated
from loadmaster.config.schema import STAGES, Job
from loadmaster.errors import ConfigError, UsageError
from loadmaster.given_run import SETTINGS, from_elsewhere, nothing_given, run_and_words
from loadmaster.rundir import newest_in


def run_stage(arguments: argparse.Namespace, words: list[str], misused: Callable[[str], NoReturn]) -> int:
    """Returns the exit code. misused: called with what does not go together on the command line."""
    stage = arguments.stage
    _refuse_other_end(stage, words)
    shown = {"--json": arguments.json, "--nodes": arguments.nodes is not None, "--compare": bool(arguments.compare)}
    if sum(shown.values()) > 1:
        misused(f"{' and '.join(name for name, given in shown.items() if given)}: one of them at a time")
    if stage != "plan" and set(words) <= {"--dry-run"}:
        raise UsageError(nothing_given(stage, newest_in(Path("runs"), launched=False)))
    run, words = run_and_words(words)
    folder = Path.cwd()
    if run is not None:
        from loadmaster.export.served.check import folder_of_paths

        folder = folder_of_paths(run)
        words = [from_elsewhere(word, Path.cwd(), folder) for word in words]
    with chdir(folder):  # which the run's own paths count from
        return _shown(arguments, words, run) if any(shown.values()) else _staged(stage, words, run, tuple(shown))


def _shown(arguments: argparse.Namespace, words: list[str], run: Path | None) -> int:
    from loadmaster import plan_command

    note_repeated(words)
    if arguments.compare:
        return plan_command.side_by_side(arguments.compare, words, run)
    if arguments.nodes is not None:
        return plan_command.on_more_nodes(arguments.nodes, words, run)
    return plan_command.as_json(words, run)


def _staged(stage: str, words: list[str], run: Path | None, of_plan: tuple[str, ...]) -> int:
    from loadmaster.config.hydra_app import run_app

    def run_stages(composed: Composed) -> int:
        hub.settle_for(composed.job)
        from loadmaster.pipeline import run as run_pipeline

        return run_pipeline(composed)

    def compare(jobs: list[Job], start: float) -> None:
        from loadmaster.report.side_by_side import show_sweep

        show_sweep(jobs, start)

    settings = [] if run is None else [f"--config-dir={run}", f"--config-name={SETTINGS}"]
    # In front: --info takes what follows it.
    words = [f"stop_after={stage}", *settings, *words]
    return run_app(run_stages, words, of_plan if stage == "plan" else (), compare)


def _refuse_other_end(stage: str, words: list[str]) -> None:
    for override in words:
        key, _, value = override.partition("=")
        if key == "stop_after" and value != stage:
            remedy = f"loadmaster {value}" if value in STAGES else f"leave it out; the stages are {', '.join(STAGES)}"
            raise ConfigError.of(key, value, f"`loadmaster {stage}` ends after {stage}", remedy, "command line")
