"""Outer gates: lm-evaluation-harness tasks by name, asked of the served base before, and of each served export after.

The figures of verification say that an export is the model that was trained. Whether training cost the model something
that nobody looked at (arithmetic, another language, following instructions) is told by tasks from outside, and only
against the base: lm-evaluation-harness 0.4.13 in an environment of its own asks them, over the OpenAI API, of the
server that serve-check has started (its `local-completions` model, so that log-likelihood tasks can be asked too).

    drop    before - after, where more is better; (after - before) / before, where less is better (perplexity)
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loadmaster.errors import ExportRejected, LoadmasterError, NotChecked
from loadmaster.export.process import clean_environment, run_script
from loadmaster.export.served.environment import HARNESS, environment_python
from loadmaster.export.served.server import HOST

RUNNER = Path(__file__).with_name("harness_runner.py")
MAX_DROP = 0.05
CONCURRENT = 4
LONGEST = 4096
"""Tokens of the context that tasks are asked in, where the model has as many: examples in the prompt take room."""
TIMEOUT_S = 6 * 3600.0

Figures = dict[str, dict[str, dict[str, Any]]]
"""Task -> "metric,filter" -> value, stderr (or None), higher_is_better, answers."""


@dataclass(frozen=True)
class Harness:
    """Which tasks are asked, and how."""

    tasks: tuple[str, ...]
    include_path: Path | None = None
    """Folder of task files of one's own, beside those that the harness knows."""
    limit: int | None = None
    """Of each task, the first so many questions."""
    apply_chat_template: bool = False
    max_drop: float = MAX_DROP
    """How much less than the base an export may score."""


class Asked:
    """A harness that is installed, and whose tasks and their data are there."""

    def __init__(self, harness: Harness, scratch: Path, echo: Callable[[str], None]):
        """Raises LoadmasterError for a task that there is not, or whose data cannot be had."""
        self.harness, self.scratch = harness, scratch
        self.python = environment_python(HARNESS, echo)
        echo(f"loading {', '.join(harness.tasks)}")
        unknown = self._run(None).get("unknown")
        if unknown:
            where = f" nor in {harness.include_path}" if harness.include_path else ""
            raise LoadmasterError(
                f"lm-evaluation-harness 0.4.13 has no task {', '.join(unknown)}{where}.\n"
                "fix: take a name that `lm-eval ls tasks` prints, or give --task-path the folder of your task's YAML"
            )

    def of(self, port: int, served_as: str, tokenizer: Path, max_model_len: int) -> Figures:
        """Figures of one served model. Raises ExportRejected when it cannot be asked, NotChecked when it is slow.

        tokenizer: folder of the served model's own; the harness counts and renders with it.
        """
        try:
            found = self._run(
                {
                    "model": served_as, "base_url": f"http://{HOST}:{port}/v1/completions", "tokenizer": str(tokenizer),
                    "tokenizer_backend": "huggingface", "num_concurrent": CONCURRENT, "max_length": max_model_len,
                }
            )
        except NotChecked:
            raise
        except LoadmasterError as error:
            raise ExportRejected(str(error)) from None
        if not found["tasks"]:
            raise ExportRejected(f"{', '.join(self.harness.tasks)} gave no figure, so there is nothing to compare")
        return found["tasks"]

    def _run(self, model_args: dict[str, Any] | None) -> dict[str, Any]:
        path = self.harness.include_path
        told = {
            "tasks": list(self.harness.tasks), "include_path": str(path.absolute()) if path else None,
            "limit": self.harness.limit, "apply_chat_template": self.harness.apply_chat_template,
            "model_args": model_args,
        }
        # Task files name data relative to themselves, or on the Hub; a proxy must not stand before this machine.
        environment = {**clean_environment(), "no_proxy": HOST, "NO_PROXY": HOST, "TOKENIZERS_PARALLELISM": "false"}
        try:
            done, result = run_script(
                self.python, RUNNER, told, self.scratch, timeout=TIMEOUT_S, env=environment,
                cwd=path or self.scratch,
            )
        except subprocess.TimeoutExpired:
            hours = TIMEOUT_S / 3600
            raise NotChecked(f"the tasks did not end within {hours:.0f} h: ask fewer (--limit)") from None
        if result is None:
            said = (done.stderr.strip().splitlines() or [""])[-1]
            raise LoadmasterError(
                f"lm-evaluation-harness could not ask {', '.join(self.harness.tasks)} (exit code {done.returncode}). "
                f"A task's data are read from where its YAML says, most often the Hub.\n{said}"
            )
        return result


def failures(before: Figures, after: Figures, max_drop: float) -> list[str]:
    """Every figure that fell by more than `max_drop`, a sentence each. One that is no number any more fails."""
    found = []
    for task, metrics in before.items():
        for metric, base in metrics.items():
            own = after.get(task, {}).get(metric)
            name = f"{task} {metric.partition(',')[0]}"
            if own is None:
                found.append(f"task: {name} was not measured")
            elif not _drop(base, own) <= max_drop:
                found.append(
                    f"task: {name} is {own['value']:.4g}, the base has {base['value']:.4g}: it may be worse by "
                    f"{max_drop:g} at most (--max-drop)"
                )
    return found


def _drop(before: dict[str, Any], after: dict[str, Any]) -> float:
    if before["higher_is_better"]:
        return before["value"] - after["value"]
    return (after["value"] - before["value"]) / max(abs(before["value"]), 1e-9)


def table(before: Figures, after: dict[str, Figures]) -> Table:
    """Tasks by rows; the base and each format by columns, with standard errors. after: format -> its figures."""
    shown = Table(title="tasks of lm-evaluation-harness, as served: before and after")
    for column, justify in (("task", "left"), ("metric", "left"), ("of", "right"), ("base", "right")):
        shown.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name in after:
        shown.add_column(name, justify="right")
    for task, metrics in before.items():
        for metric, base in metrics.items():
            own = [figures.get(task, {}).get(metric) for figures in after.values()]
            count = "" if base["answers"] is None else str(base["answers"])
            shown.add_row(task, metric.removesuffix(",none"), count, _cell(base), *map(_cell, own))
    return shown


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return ""
    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.3f}"
    return f"{figure['value']:.3f}{error}"
