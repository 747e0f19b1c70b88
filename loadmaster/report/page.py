"""From a run directory to report.html. The report is a view: whatever is wrong with it, the run goes on."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from loadmaster import __version__
from loadmaster.files import write_text
from loadmaster.packages import versions
from loadmaster.report import curves, data, evaluation, exports, overview, plan, units
from loadmaster.report.inputs import RunFiles, read_run
from loadmaster.words import visible

NAME = "report.html"
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors",
    "compressed-tensors", "llmcompressor",
)
SECTIONS: dict[str, Callable[[RunFiles], Any]] = {
    "header": overview.header,
    "stages": overview.stages,
    "headlines": overview.headlines,
    "data": data.data_section,
    "plan": plan.plan_section,
    "memory": plan.memory_section,
    "curves": curves.curves_section,
    "evaluation": evaluation.evaluation_section,
    "exports": exports.exports_section,
    "exports_chart": exports.exports_chart,
    "samples": evaluation.samples_section,
}


def write_report(run_dir: Path, command: str) -> Path:
    """Write run_dir/report.html from whatever the run has left so far, and return its path.

    command: the command line as a person would type it again.
    Raises nothing for missing, torn or odd files: the page says what it could not show. Where the page itself
    cannot be written (a full disk), a line on stderr says so and an earlier report stays.
    """
    path = run_dir / NAME
    try:
        write_text(path, render(run_dir, command))
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr)
    return path


def render(run_dir: Path, command: str) -> str:
    """The page as text; the only thing in it that differs from one call to the next is inside <time> elements."""
    files = read_run(run_dir)
    problems = list(files.problems)
    content = {name: _built(name, build, files, problems) for name, build in SECTIONS.items()}
    html = _environment().get_template("report.html.j2").render(
        **content, order=order(files), problems=problems, command=command, files=files,
        versions={"loadmaster": __version__, "Python": platform.python_version(), **versions(LIBRARIES)},
        written=datetime.now(UTC),
    )
    return html.encode("utf-8", errors="replace").decode("utf-8")  # generated text may hold half a surrogate pair


def order(files: RunFiles) -> tuple[str, ...]:
    """The sections, what matters most first: the proof once there is one, else the curves, else the plan."""
    proof, making = ("evaluation", "exports", "samples"), ("training", "plan")
    if files.evaluation:
        return (*proof, *making)
    return (*(making if files.metrics else reversed(making)), *proof)


def _built(name: str, build: Callable[[RunFiles], Any], files: RunFiles, problems: list[str]) -> Any:
    try:
        return build(files)
    except Exception as error:  # files may hold anything; the rest of the page still stands
        problems.append(f"The part on {name} could not be shown ({type(error).__name__}: {error}).")
        return None


def breakable(text: str) -> Markup:
    """Text that may be broken into lines after commas, as JSON without spaces needs; a copy of it is the text alone."""
    return Markup(escape(visible(text)).replace(",", Markup(",<wbr>")))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loadmaster.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        optimized=False,  # each template is compiled and rendered once or a few times
    )
    environment.globals["units"] = units
    environment.filters["breakable"] = breakable
    return environment
