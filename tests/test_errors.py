"""Exceptions go between processes whole."""

from __future__ import annotations

import ast
import builtins
import pickle
from importlib import import_module
from inspect import Parameter, isclass, isfunction, signature
from pathlib import Path

import pytest

from loadmaster.errors import Problem

ROOT = Path(__file__).resolve().parents[1]
GIVEN = {
    "str": "text", "int": 7, "float | None": 1.5, "object": "folder/pipe", "Path": Path("folder"),
    "list[Problem]": [Problem("lora.rank", 0, "command line", "is none", "lora.rank=8")],
}
"""What stands for a parameter, by its annotation."""


def exceptions() -> list[str]:
    """Every exception class of the project, as module:class; handler.py is an endpoint's program, and one process."""
    classes = {}
    for file in {*(ROOT / "loadmaster").rglob("*.py")} - {ROOT / "loadmaster" / "endpoint" / "handler.py"}:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                classes[f"{module}:{node.name}"] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    known = {name for name, kind in vars(builtins).items() if isclass(kind) and issubclass(kind, BaseException)}
    found: set[str] = set()
    while more := {name for name, bases in classes.items() if bases & known} - found:
        found |= more
        known |= {name.partition(":")[2] for name in more}
    return sorted(found)


def given_to(kind: type[BaseException]) -> list[object]:
    if not isfunction(kind.__init__):
        return ["text"]
    _, *parameters = signature(kind.__init__).parameters.values()
    return [GIVEN[each.annotation] for each in parameters if each.default is Parameter.empty]


@pytest.mark.parametrize("name", exceptions())
def test_an_exception_comes_out_of_another_process_as_it_was(name: str):
    module, _, attribute = name.partition(":")
    kind = getattr(import_module(module), attribute)
    made = kind(*given_to(kind))
    made.said = True  # in a host's log
    again = pickle.loads(pickle.dumps(made))
    assert (type(again), str(again), again.__dict__) == (kind, str(made), made.__dict__)
