"""Runs side by side: what sets them apart, how far each came, and what came of it. No torch here."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loadmaster.config.compose import compose
from loadmaster.config.fields import leaves, written
from loadmaster.config.jobhash import SINCE
from loadmaster.config.schema import STAGES, Job
from loadmaster.config.shipped import local_path
from loadmaster.errors import ConfigError
from loadmaster.report import units
from loadmaster.report.exports import published
from loadmaster.report.inputs import RunFiles, dig, number, read_run
from loadmaster.rundir import RECORD, is_at_work
from loadmaster.streams import Output
from loadmaster.tables import ANY_WIDTH, figure
from loadmaster.words import counted, visible

OWN_DATA = ("data=file", "data.path=shipped:tickets")
"""Words of a job on data of its own, which lies elsewhere."""
RECENT_STEPS = 20
"""As in training/metrics.py, which torch comes with."""
NO_SETTINGS = ("run_dir", "stop_after")
"""What two runs of one job may differ in."""


def show_runs(folders: Sequence[Path], console: Console, with_plans: bool = False) -> None:
    """Print the runs in these folders, oldest first; of runs/, which may have none yet, where no folder is named.

    Of runs that are plans alone their number is told, unless there are no others, they are named or with_plans asks.
    Raises ConfigError for a named folder without any.
    """
    found: dict[Path, None] = {}
    named = {Path(os.path.abspath(folder)) for folder in folders}
    for folder in folders or [Path("runs")]:
        runs = runs_in(folder)
        if not runs and folders:
            message = "holds no run" if os.path.isdir(folder) else "is no folder"
            remedy = "name a run directory, or a folder of some; without one it is runs/, where train.py puts them"
            raise ConfigError.of("FOLDER", str(folder), message, remedy, "command line")
        found |= dict.fromkeys(runs)
    if not found:
        console.print("no runs yet: train.py puts them in runs/, from where it is started", soft_wrap=True)
        return
    files = {run: read_run(run) for run in found}
    shown = {run: each for run, each in files.items() if with_plans or run in named or not is_plan_alone(each)} or files
    show(shown, console)
    if left := len(files) - len(shown):
        console.print(f"{counted(left, 'plan')} without training left out: --all shows them too", highlight=False)


def show_sweep(jobs: Sequence[Job], start: float) -> None:
    """Print the runs of a --multirun that began at `start` (seconds, as time.time()), where any was trained."""
    if os.environ.get("RANK", "0") != "0":  # another process of the same jobs prints it
        return
    folders = [Path("runs") / job.recipe if job.run_dir == "auto" else local_path(job.run_dir) for job in jobs]
    found = dict.fromkeys(run for folder in folders for run in runs_in(folder))
    found = [run for run in found if (run / RECORD).stat().st_mtime >= start]
    if any((run / "metrics.jsonl").exists() for run in found):
        print()
        show({run: read_run(run) for run in found}, Output())


def runs_in(folder: Path) -> list[Path]:
    """Absolute paths of run directories at and below `folder`, by name; what lies in one is not looked into."""
    found = []
    for path, folders, files in os.walk(os.path.abspath(folder)):
        folders.sort()
        if RECORD in files:
            found.append(Path(path))
            folders.clear()
    return found


def is_plan_alone(files: RunFiles) -> bool:
    """Whether no more than a plan was asked for, and nothing was trained before."""
    return files.job("stop_after") == "plan" and not files.metrics and not set(files.stages) - {"plan"}


def show(runs: dict[Path, RunFiles], console: Console) -> None:
    """A line each; in a terminal that has no room for it, fewer figures, and the settings on a line of their own."""
    root = Path(os.path.commonpath([run.parent for run in runs]))
    files = {run: runs[run] for run in sorted(runs, key=lambda run: (run.name, run))}
    apart = [visible(each) for each in set_apart([each.config for each in files.values()])]
    columns = {
        "run": [str(run.relative_to(root)) for run in files],
        "state": [state(each, is_at_work(run)) for run, each in files.items()],
        **{heading: [form(each) for each in files.values()] for heading, form in FIGURES.items()},
    }
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    lines, left_out = _lines(columns), []
    room = console.width if console.is_terminal else ANY_WIDTH
    settings = ["set otherwise", *apart] if any(apart) else [""] * len(lines)
    beside = max(map(cell_len, settings)) + 2 + lines[0].cell_len <= room
    while not beside and lines[0].cell_len > room and (least := next((h for h in LEAST_USEFUL if h in columns), "")):
        left_out.append(least)
        columns.pop(least)
        lines = _lines(columns)
    for line, setting in zip(lines, settings, strict=True):
        if beside:
            line.append(f"  {setting}")
        line.rstrip()
        console.print(line, soft_wrap=True)
        if setting and not beside and line is not lines[0]:
            console.print(Padding(Text(setting), (0, 0, 0, 2), expand=False))
    if left_out:
        console.print(f"no room for {', '.join(left_out)}: loadmaster runs | less -S", highlight=False)
    if said := lowest({str(run.relative_to(root)): each for run, each in files.items()}):
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _lines(columns: dict[str, list[str]]) -> list[Text]:
    """The heading and the rows of a table at its own width, all of one length."""
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="right" if heading in FIGURES else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(escape(visible(cell)) for cell in row))
    screen = Output(file=io.StringIO(), width=ANY_WIDTH)
    return [Text.assemble(*((s.text, s.style or "") for s in line)) for line in screen.render_lines(table, pad=False)]


def set_apart(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Of each run the fields in which they differ, as they would be written on a command line; of one whose config.yaml
    cannot be read none. A run of before a field did what SINCE says. Of runs of several recipes, what one has as its
    recipe says, or as that and data=file do, is said by `recipe`."""
    read = [_flat(config) for config in configs]
    jobs = [{**job, **SINCE, **job} if job else {} for job in read]
    first = next(filter(None, jobs), {})
    keys = dict.fromkeys(key for job in jobs for key in job if key not in NO_SETTINGS)
    apart = [key for key in keys if any(job.get(key) != first.get(key) for job in jobs if job)]
    shown = [_not_said(job, apart) if "recipe" in apart else apart for job in jobs]
    pairs = zip(jobs, shown, strict=True)
    return [" ".join(f"{key}={written(job[key])}" for key in keys if key in job) for job, keys in pairs]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for name, part in config.items() for key, value in leaves(name, part).items()}


def _not_said(job: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """The recipe, and those of the keys that the job has otherwise than its recipe, on its data or any other."""
    recipe = str(job.get("recipe"))
    by = _said_by(recipe)
    if job.get("data.path") != by.get("data.path"):
        by = _said_by(recipe, *OWN_DATA)
    return [key for key in keys if key == "recipe" or job.get(key) != by.get(key)]


@cache
def _said_by(recipe: str, *words: str) -> dict[str, Any]:
    """Every field as a recipe alone, or with these words, has it; none for one that is not here."""
    try:
        return _flat(compose([f"recipe={recipe}", *words]).resolved)
    except ConfigError:
        return {}


def state(files: RunFiles, works: bool) -> str:
    """How far a run is: at work, failed where, its last stage, or the step that it stopped after."""
    step, of = (files.metrics[-1].get(key) for key in ("step", "steps")) if files.metrics else (None, None)
    reached = f"step {step}{f' of {of}' if of else ''}" if step else ""
    if works:
        return f"running, {reached}" if reached and "train" not in files.stages else "running"
    if failed := dig(files.result, "failure.stage"):
        return f"{failed} failed"
    last = next((stage for stage in reversed(STAGES) if stage in files.stages), "")
    if last in ("", "plan") and reached:
        return f"stopped, {reached}"
    return f"{last} done" if last else "begun"


def lowest(files: dict[str, RunFiles]) -> str:
    """Which run has the lowest held-out loss; nothing where the losses are of other rows or by another measure."""
    losses = {name: number(dig(each.evaluation, "after.held_out.loss")) for name, each in files.items()}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    if len(known) < 2 or len({_measured_by(files[name]) for name in known}) > 1:
        return ""
    best = min(known, key=known.__getitem__)
    return f"lowest held-out loss: {known[best]:.4f}, {best}"


def _measured_by(files: RunFiles) -> str:
    """Equal for losses that can be compared. The loss before training tells rows apart, but not of preferences: there
    it is one number (dpo, kto) or depends on beta."""
    objective = files.job("objective")
    besides = [] if objective == "sft" else [files.job("preference"), files.job("data")]
    return repr([dig(files.evaluation, "before.held_out.loss"), objective, *besides])


def _train_loss(files: RunFiles) -> float | None:
    """Of a run that trains, so far: as in the end, over the last steps."""
    known = number(files.result.get("train_loss"))
    losses = [loss for row in files.metrics[-RECENT_STEPS:] if (loss := number(row.get("loss"))) is not None]
    return sum(losses) / len(losses) if known is None and losses else known


def _held_out(files: RunFiles) -> float | None:
    """Of the evaluate stage, of the end of training, or the last one so far."""
    said = [number(dig(files.evaluation, "after.held_out.loss")), number(files.result.get("eval_loss"))]
    said += [number(row.get("eval_loss")) for row in reversed(files.metrics)]
    return next((loss for loss in said if loss is not None), None)


def _rate(files: RunFiles) -> float | None:
    last = files.metrics[-1] if files.metrics else {}
    return number(files.result.get("tokens_per_second", last.get("tokens_per_second")))


def _share(files: RunFiles, key: str) -> str:
    return figure(number(dig(files.evaluation, key)), "{:.1%}")


def _time(files: RunFiles) -> str:
    spent = [number(seconds) for seconds in (dig(files.result, "wall_seconds") or {}).values()]
    return units.seconds(sum(each for each in spent if each)) if spent else ""


def _exports(files: RunFiles) -> str:
    rejected = dig(files.result, "rejected_exports") or {}
    failed = [f"{name} failed" for name in rejected if dig(rejected, f"{name}.passed") is False]
    return ", ".join([*published(files), *failed])


FIGURES: dict[str, Callable[[RunFiles], str]] = {
    "train loss": lambda files: figure(_train_loss(files), "{:.4f}"),
    "held-out loss": lambda files: figure(_held_out(files), "{:.4f}"),
    "preferred": lambda files: _share(files, "after.held_out.reward_accuracy"),
    "task": lambda files: _share(files, "after.task.metric"),
    "tokens/s": lambda files: figure(_rate(files), "{:,.0f}"),
    "GiB": lambda files: figure(number(files.result.get("peak_allocated_gib")), "{:.1f}"),
    "time": _time,
    "exports": _exports,
}
"""Columns after the run's name and state, by heading; one that no run has anything for is left out."""
LEAST_USEFUL = ("exports", "GiB", "tokens/s", "train loss", "time")
"""Columns that a narrow terminal goes without, the first of them first."""
