"""What a run directory holds, read so that nothing missing, torn or oddly shaped can stop the report.

The report is written after every stage and after failures, so any file may be absent or half there.
Absent is normal and is no problem; unreadable is a problem, and the page names it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loadmaster.files import as_object, read_text


@dataclass(frozen=True)
class RunFiles:
    """The files of a run. What is absent or unreadable is empty."""

    name: str
    config_text: str
    config: dict[str, Any]
    plan: dict[str, Any]
    result: dict[str, Any]
    stages: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    manifests: dict[str, dict[str, Any]]
    """manifest.json of each exported format."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    def job(self, key: str) -> Any:
        """A field of the job by its dotted key, or None."""
        return dig(self.config, key)


def read_run(run_dir: Path) -> RunFiles:
    """Read everything the report shows from `run_dir`. Raises nothing for what a run may have left there."""
    problems: list[str] = []
    config_text = _text(run_dir / "config.yaml", problems)
    return RunFiles(
        name=run_dir.resolve().name,
        config_text=config_text,
        config=_parsed("config.yaml", config_text, yaml.safe_load, problems),
        plan=_json(run_dir, "plan.json", problems),
        result=_json(run_dir, "result.json", problems),
        stages=as_object(_json(run_dir, "stages.json", problems).get("stages")),
        evaluation=_json(run_dir, "eval.json", problems),
        metrics=_metrics(run_dir / "metrics.jsonl", problems),
        manifests={
            path.parent.name: _json(run_dir, path.relative_to(run_dir).as_posix(), problems)
            for path in sorted(run_dir.glob("export/*/manifest.json"))
            if not path.parent.name.startswith(".")
        },
        problems=problems,
    )


def dig(value: Any, key: str) -> Any:
    """The value at a dotted key of nested dicts, or None where the path ends early."""
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def number(value: Any) -> float | None:
    """`value` where it is a number (infinite ones too), else None; so is an integer beyond a float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    with suppress(OverflowError):
        return float(value) if is_number else None
    return None


def rows(value: Any) -> list[dict[str, Any]]:
    """The dicts of a list, or nothing."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(path: Path, problems: list[str]) -> str:
    try:
        return read_text(path, errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} could not be read ({error.strerror}).")
        return ""


def _json(run_dir: Path, name: str, problems: list[str]) -> dict[str, Any]:
    return _parsed(name, _text(run_dir / name, problems), json.loads, problems)


def _parsed(name: str, text: str, parse: Any, problems: list[str]) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = str(error).splitlines()[0]
        problems.append(f"{name} is torn or not in its format ({why}); what it says is not shown.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} holds a {type(value).__name__} where an object belongs; what it says is not shown.")
        return {}
    return value


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The logged steps in order; a later line for the same step (after a resume) replaces the earlier one."""
    found: dict[int, dict[str, Any]] = {}
    torn = []
    for line_number, line in enumerate(_text(path, problems).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[int(row["step"])] = row
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # Python's JSON has Infinity
            torn.append(line_number)
    if torn:
        where = f"line {torn[0]}" if len(torn) == 1 else f"{len(torn)} lines, the first of them line {torn[0]},"
        problems.append(f"{path.name}: {where} could not be read and was left out of the curves.")
    return [found[step] for step in sorted(found)]
