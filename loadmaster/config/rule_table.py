"""What a rule between fields is, the table of them all, and what a job breaks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadmaster.config.origins import origin_of
from loadmaster.config.schema import Job
from loadmaster.errors import Problem

Origins = dict[str, str]
Found = Iterator[tuple[str, object, str, str]]
"""Key to blame, its value, what is wrong, what would work."""

@dataclass(frozen=True)
class Rule:
    name: str
    keys: tuple[str, ...]
    explanation: str
    check: Callable[[Job, Origins], Found]


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Callable[[Job, Origins], Found]], Callable[[Job, Origins], Found]]:
    """Enter a check into the table; its docstring is the explanation, the first key the one to blame."""

    def enter(check: Callable[[Job, Origins], Found]) -> Callable[[Job, Origins], Found]:
        RULES.append(Rule(check.__name__, keys, " ".join((check.__doc__ or "").split()), check))
        return check

    return enter


def broken_rules(job: Job, origins: Origins, doubtful: list[str]) -> list[Problem]:
    """Problems of every rule but those about a `doubtful` key, whose value in `job` is not the user's."""
    problems = []
    for entry in RULES:
        if any(_touches(key, wrong) for key in entry.keys for wrong in doubtful):
            continue
        for key, value, message, remedy in entry.check(job, origins):
            if key not in doubtful:
                problems.append(Problem(key, value, origin_of(origins, key), message, remedy))
    return problems


def _touches(key: str, wrong: str) -> bool:
    return key == wrong or key.startswith(f"{wrong}.") or wrong.startswith(f"{key}.")
