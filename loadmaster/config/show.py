"""Errors as a person sees them: numbered, one block each, coloured on a terminal and plain in a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from rich.text import Text

from loadmaster.config.fields import written
from loadmaster.errors import ConfigError, LoadmasterError, Problem, StoppedOnRequest
from loadmaster.streams import Output
from loadmaster.words import counted, visible


def show_error(error: LoadmasterError | StoppedOnRequest, stream: TextIO | None = None) -> int:
    """Print `error` without a traceback, on stderr unless told otherwise; under torchrun once on each host.

    Returns its exit code.

    Not by rank 0 alone: what is wrong on one host only, a file that it does not have, rank 0 never hears of.
    """
    if not (error.said or another_speaks(os.environ)):
        _print(error, stream or sys.stderr)
    return error.exit_code


def _print(error: LoadmasterError | StoppedOnRequest, stream: TextIO) -> None:
    console = Output(file=stream, highlight=False, soft_wrap=True)
    if not isinstance(error, ConfigError):
        word = ("", "") if isinstance(error, StoppedOnRequest) else ("error: ", "bold red")
        console.print(Text.assemble(word, visible(str(error))))  # which may show a row, or a log's last lines
        return
    so_far = ".\n" if error.begun else "; nothing was started.\n"
    heading = counted(len(error.problems), "problem")
    console.print(Text.assemble((f"{heading} in the configuration", "bold red"), so_far))
    for number, problem in enumerate(error.problems, 1):
        console.print(_block(number, problem))


def another_speaks(env: Mapping[str, str]) -> bool:
    """Whether a launcher started this process beside others on its host, of which the first says what is wrong.

    Variables that are left over, and launch nothing, silence nobody.
    """
    rank, size = env.get("RANK", ""), env.get("WORLD_SIZE", "")
    local = env.get("LOCAL_RANK", rank)
    launched = all(map(str.isdecimal, (rank, size, local))) and {"MASTER_ADDR", "MASTER_PORT"} <= env.keys()
    return launched and int(rank) < int(size) and int(local) > 0


def _block(number: int, problem: Problem) -> Text:
    value = "" if problem.value is None else f" = {_shown(problem.value)}"
    where = "on the command line" if problem.origin == "command line" else f"in {problem.origin}"
    return Text.assemble(
        f"{number:3}. ",
        (visible(f"{problem.key}{value}"), "bold"),
        (visible(f"   {where}\n"), "dim"),
        visible(f"     {problem.message}\n"),
        ("     fix: ", "green"),
        visible(f"{problem.remedy}\n"),
    )


def _shown(value: object) -> str:
    text = "{" + ", ".join(map(str, value)) + "}" if isinstance(value, dict) else written(value)
    if isinstance(value, str) and (not value or value != value.strip() or value.replace(".", "").isdigit()):
        text = repr(value)  # text that would otherwise look like a number, or like nothing
    return text if len(text) <= 80 else text[:77] + "..."
