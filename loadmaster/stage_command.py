"""`loadmaster plan`, `train`, `evaluate`, `export`, `bundle`: the stages up to one, of a job or of a run that is there.

A job is given in the words of train.py; a run by its directory, whose own settings then count, and words behind it
change them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import chdir
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from loadmaster import hub
from loadmaster.config.compose import Composed
from loadmaster.config.hydra_sources import GROUP
from loadmaster.config.overrides import assigned, note_repeated
from loadmaster.config.schema import STAGES, Job
from loadmaster.config.shipped import shipped_folder
from loadmaster.errors import ConfigError, UsageError
from loadmaster.rundir import LAUNCH_RECORD, newest_in

SUCH_AS = "such as runs/smoke/<date-time>"
WITH_A_WORD = ("--config-dir", "-cd", "--config-name", "-cn", "--cfg", "-c", "--info", "-i", "--package", "-p")
"""Options of train.py that the next word is the value of."""


def run_stage(arguments: argparse.Namespace, words: list[str], misused: Callable[[str], NoReturn]) -> int:
    """Returns the exit code. misused: called with what does not go together on the command line."""
    from loadmaster.config.hydra_app import run_app

    stage = arguments.stage
    _refuse_other_end(stage, words)
    shown = {"--json": arguments.json, "--nodes": arguments.nodes is not None, "--compare": bool(arguments.compare)}
    if sum(shown.values()) > 1:
        misused(f"{' and '.join(name for name, given in shown.items() if given)}: one of them at a time")
    if any(shown.values()):
        from loadmaster import plan_command

        note_repeated(words)
        if arguments.compare:
            return plan_command.side_by_side(arguments.compare, words)
        if arguments.nodes is not None:
            return plan_command.on_more_nodes(arguments.nodes, words)
        return plan_command.as_json(words)
    if stage != "plan" and set(words) <= {"--dry-run"}:
        raise UsageError(nothing_given(stage, newest_in(Path("runs"))))
    place = place_of_run(words)
    folder = Path.cwd()
    if place is not None:
        run = checked_run(Path(words[place]).expanduser()).absolute()
        from loadmaster.export.served.check import folder_of_paths

        if recipe := next((word for word in words if word.startswith(f"{GROUP}=")), None):
            raise UsageError(f"{words[place]} {recipe}: a run has its own settings; give one of the two")
        rest = [over_run(word) for word in words[:place] + words[place + 1 :]]
        words, folder = [*words_of_run(run), *rest], folder_of_paths(run)

    def run_stages(composed: Composed) -> int:
        hub.settle_for(composed.job)
        from loadmaster.pipeline import run

        return run(composed)

    def compare(jobs: list[Job], start: float) -> None:
        from loadmaster.report.side_by_side import show_sweep

        show_sweep(jobs, start)

    with chdir(folder):  # which the run's own paths count from
        # In front: --info takes what follows it.
        return run_app(run_stages, [f"stop_after={stage}", *words], tuple(shown) if stage == "plan" else (), compare)


def _refuse_other_end(stage: str, words: list[str]) -> None:
    for override in words:
        key, _, value = override.partition("=")
        if key == "stop_after" and value != stage:
            remedy = f"loadmaster {value}" if value in STAGES else f"leave it out; the stages are {', '.join(STAGES)}"
            raise ConfigError.of(key, value, f"`loadmaster {stage}` ends after {stage}", remedy, "command line")


def nothing_given(stage: str, newest: Path | None) -> str:
    """What to give, where nothing was; newest: a run that is here."""
    run = f"loadmaster {stage} {newest or 'RUN'}"
    what = "the newest run here" if newest else f"a run directory, {SUCH_AS}"
    return f"{stage} what? {run} goes on with {what}; loadmaster {stage} recipe=smoke begins the small job"


def place_of_run(words: list[str]) -> int | None:
    """Where among the words a run directory stands: a folder's name, no setting, no option and no value of one."""
    for place, (before, word) in enumerate(pairwise(["", *words])):
        is_setting = "=" in word or word[:1] in ("", *"-+") or (word.startswith("~") and not word.startswith("~/"))
        if not is_setting and before not in WITH_A_WORD and ("/" in word or os.path.isdir(word)):
            return place
    return None


def checked_run(run: Path) -> Path:
    """`run`. Raises UsageError where it is no run directory, or its run lies elsewhere."""
    if os.path.isfile(run / LAUNCH_RECORD):
        raise UsageError(
            f"{run} is the folder of a launch, whose run lies where it ran: the command of the launch, given again, "
            "goes on there"
        )
    if os.path.isfile(run / "config.yaml"):
        return run
    if not os.path.isdir(run):
        what = "is a file" if os.path.exists(run) else "there is no such folder"
        raise UsageError(f"{run}: {what}; give a run directory, {SUCH_AS}, or settings as key=value")
    newest = newest_in(run)
    give = f"one of those in it, the newest is {newest}" if newest else f"one, {SUCH_AS}"
    raise UsageError(f"{run} is no run directory: give {give}")


def words_of_run(run: Path) -> list[str]:
    """The words of train.py that go on with a run: its settings, in its folder."""
    return [f"--config-dir={run}", "--config-name=config", assigned("run_dir", str(run))]


def over_run(word: str) -> str:
    """A word that follows a run: a group's file is laid over its settings, which no file of that group is behind."""
    key, _, value = word.partition("=")
    is_group = key != GROUP and (shipped_folder("conf") / key).is_dir()
    return f"+{word}" if key and is_group and value[:1] not in ("", "{") else word
