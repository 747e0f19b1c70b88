"""docs/troubleshooting.md quotes messages as they are printed, and names settings and headings that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from loadmaster.config.compose import compose
from loadmaster.config.fields import leaves
from tests.runs import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `")]
MESSAGES = [quoted for row in ROWS for quoted in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module but its docstrings, with a tab in the place of what is filled in."""
    told = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if node in told:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\t" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def printed() -> str:
    files = sorted((ROOT / "loadmaster").rglob("*.py"))
    found = (text for file in files for text in texts(ast.parse(file.read_text(encoding="utf-8"))))
    return "\n".join(text.replace("\n", " ") for text in found)


@pytest.mark.parametrize("quoted", MESSAGES)
def test_a_message_is_quoted_as_it_is_printed(quoted: str) -> None:
    pattern = ".*".join(re.escape(part.strip(" ")) for part in quoted.split("..."))
    assert re.search(pattern, printed()), quoted


def test_every_setting_that_is_named_exists() -> None:
    job = compose(["recipe=smoke"]).resolved
    fields = {key for name, part in job.items() for key in leaves(name, part)} | {"launch", "hardware", "data"}
    spans = [quoted for quoted in re.findall(r"`([^`]+)`", PAGE) if quoted not in MESSAGES]
    named = {found for span in spans for found in re.findall(r"(?<![\w.-])([a-z_.]+)(?=[.A-Z_]*=)", span)}
    files = {"plan.json", "report.html", "config.yaml"}
    named |= {span for span in spans if re.fullmatch(r"[a-z]+\.[a-z_]+", span)} - files
    assert named >= {"plan.reserve", "launch.grace_s", "objective", "hardware"}
    assert {name.rstrip(".") for name in named} <= fields | {"launch.secrets", "export.thresholds"}


def test_the_page_is_short_and_has_the_messages_that_matter() -> None:
    assert len(PAGE.splitlines()) <= 150 and len(MESSAGES) >= 35
