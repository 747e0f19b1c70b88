"""From a plain composed dict to a typed Job, or to every Problem in it.

pydantic reports one error a union branch (`micro_batch_size` is no integer, and it is not `auto`); a person
wants one a field: "must be an integer above 0, or auto".
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loadmaster.config.fields import (
    COUNTED,
    NONE_IS,
    branches,
    choices,
    describe,
    fields,
    hints,
    is_counted,
    leaves,
    nearest,
    nearest_key,
    sections,
    written,
)
from loadmaster.config.origins import COMMAND_LINE, DEFAULT, origin_of
from loadmaster.config.schema import DATA_SUFFIXES, MOST, ExportFormat, Job
from loadmaster.config.synonyms import ALIASES, MEANT, NO_FIELD, OTHER_QUANTITIES, UNITS, VALUES
from loadmaster.errors import Problem

MISSING = "???"
NO_VALUE = "has no value yet"
DEFAULTS = "defaults"
"""Hydra's list at the top of a file, which is no field."""
NONE_LIKE_IT = "take it out; --help lists every field"
_TRUTH = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}


@dataclass
class Checked:
    """A Job in which wrong fields are at their defaults, what was wrong, and the keys that were."""

    job: Job
    problems: list[Problem] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@cache
def _adapter() -> TypeAdapter[Job]:
    return TypeAdapter(Job)


def to_dict(job: Job) -> dict[str, Any]:
    """Plain dict of every field, as config.yaml holds it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(job))


def check(resolved: dict[str, Any], origins: dict[str, str], groups: dict[str, list[str]]) -> Checked:
    """Type-check `resolved`; `groups` are Hydra's groups with their options, for the hints."""
    problems: dict[str, Problem] = {}
    unknown: list[str] = []
    for key in _missing(resolved):
        problems[key] = Problem(key, None, origin_of(origins, key), NO_VALUE, _how_to_set(key))
    try:
        job = _adapter().validate_python(resolved)
    except ValidationError as error:
        for entry in error.errors(include_url=False, include_context=False):
            path, annotation, siblings = _locate(entry["loc"])
            key = ".".join(path)
            if key not in problems:
                value, origin = _at(resolved, path), origin_of(origins, key)
                if annotation is None:
                    unknown.append(key)
                    for name, item in _typed(key, value).items():
                        origin = origin_of(origins, name)
                        hint = _instead(name, item, origin, siblings, groups)
                        problems[name] = Problem(name, item, origin, "there is no such field", hint)
                else:
                    problems[key] = _wrong_value(key, value, origin, annotation)
        job = _adapter().validate_python(_without(resolved, [*problems, *unknown]))
    return Checked(job, list(problems.values()), list(problems))


def _typed(key: str, value: Any) -> dict[str, Any]:
    """An unknown section as the keys that were typed (`training.max_steps`), anything else as it is."""
    return leaves(key, value) if key.rpartition(".")[0] in sections() else {key: value}


def _locate(loc: tuple[int | str, ...]) -> tuple[list[str], Any, list[str]]:
    """Path of the field that a pydantic location is in, its type, and the names beside it.

    The type is None where there is no such field. What follows the field in `loc` (a union's branch, an index
    into a list) is left out.
    """
    path: list[str] = []
    names: list[str] = []
    annotation: Any = Job
    for step in map(str, loc):
        if dataclasses.is_dataclass(annotation):
            known = hints(typing.cast(type, annotation))
        elif (mapped := _mapping(annotation)) is not None:
            known = dict.fromkeys(choices(mapped[0]) or [step], mapped[1])  # any text, where no names are listed
        else:
            break
        path, names, annotation = [*path, step], list(known), known.get(step)
        if annotation is None:
            break
    return path, annotation, names


def _mapping(annotation: Any) -> tuple[Any, Any] | None:
    for branch in branches(annotation):
        if typing.get_origin(branch) is dict:
            return typing.cast(tuple[Any, Any], typing.get_args(branch))
    return None


def _wrong_value(key: str, value: Any, origin: str, annotation: Any) -> Problem:
    assign = _assignment(origin)
    if dataclasses.is_dataclass(annotation):
        section = sections().get(key, [f"{key}.{name}" for name in hints(typing.cast(type, annotation))])
        name = f"{key}.name"
        named = name in section and isinstance(value, str)
        remedy = assign(name, _ours(name, value) or value) if named else "set " + ", ".join(section)
        return Problem(key, value, origin, "is a section of several fields, not a value", remedy)
    in_list = isinstance(value, list) and "" in value
    if (value == "" or in_list) and _is_taken(["text"] if in_list else "text", annotation):
        what = "has an empty entry" if in_list else "is empty"
        remedy = f"{assign(key, fields()[key].default)} is the default" if _has_default(key) else _how_to_set(key)
        unset = ", as of a shell variable that is not set" if origin == COMMAND_LINE else ""
        return Problem(key, value, origin, f"{what}{unset}", remedy)
    wrong = value
    if isinstance(value, list) and choices(annotation):
        wrong = next((item for item in value if str(item) not in choices(annotation)), value)
    about = f"; {wrong!r} is none" if isinstance(value, list) else ""
    if isinstance(wrong, int | float) and wrong > MOST and is_counted(annotation):
        about = f"; at most {MOST:,}"
    message = f"must be {describe(annotation)}{about}"
    return Problem(key, value, origin, message, _correction(key, wrong, annotation, assign))


def _correction(key: str, wrong: Any, annotation: Any, assign: Callable[[str, Any], str]) -> str:
    """A value that would be taken: the nearest choice, the same number without its quotes, or the default."""
    if isinstance(wrong, str) and describe(annotation).startswith("a list") and wrong in choices(annotation):
        return assign(key, [wrong])
    if "true or false" in describe(annotation) and str(wrong).lower() in _TRUTH:
        return assign(key, _TRUTH[str(wrong).lower()])
    match = _ours(key, wrong) or nearest(str(wrong), choices(annotation), cutoff=0.4)
    if isinstance(match, list):
        return assign(key, match)
    if match is not None:
        listed = not any(typing.get_origin(branch) is typing.Literal for branch in branches(annotation))
        return f"{match} instead of {wrong}" if listed else assign(key, match)
    kinds = describe(annotation)
    if key in COUNTED and type(wrong) is int:
        return assign(COUNTED[key], wrong)
    if key in NONE_IS and type(wrong) in (int, float) and wrong == 0:
        return f"{assign(key, None)} {NONE_IS[key]}"
    if isinstance(wrong, str) and "a list of texts" in kinds:
        return assign(key, [wrong])
    if kinds.startswith("a mapping from text"):
        return f"{assign(f'{key}.NAME', 'VALUE')} for each, or leave it out"
    a_number = isinstance(wrong, int | float)
    if a_number and "text" in kinds and "number" not in kinds and _is_taken(str(wrong), annotation):
        quoted = assign(key, f"'{wrong}'")
        return "quote it, so that it stays text: " + (f'"{quoted}"' if "=" in quoted else quoted)
    if isinstance(wrong, str) and ("integer" in kinds or "number" in kinds):
        number = _number(wrong)
        if number is not None and _is_taken(number, annotation):
            return f"{assign(key, number)} (without the quotes)"
        number = _spelt_out(key, wrong)
        if number is not None and _is_taken(number, annotation):
            return f"{assign(key, number)}, if that is what {wrong} means"
    if isinstance(wrong, float) and wrong.is_integer() and _is_taken(int(wrong), annotation):
        return assign(key, int(wrong))
    known = fields().get(key)
    if known is not None and kinds == "a list of texts":
        return f"{assign(key, ['A', 'B'])}, or leave it out"
    if known is None or not _has_default(key):
        return f"give {kinds}"
    return f"{assign(key, known.default)} is the default"


def _has_default(key: str) -> bool:
    return key in fields() and fields()[key].default != MISSING


def _is_taken(value: Any, annotation: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _spelt_out(key: str, text: str) -> int | float | None:
    """The number that 4k, 10M, 5% or 2h stands for in this field."""
    found = re.fullmatch(r"(\d+\.?\d*) ?(%|[a-z]+)", text.strip().lower())
    units = next(units for end, units in UNITS.items() if key.endswith(end))
    if found is None or found[2] not in units:
        return None
    number = round(float(found[1]) * units[found[2]], 9)
    return int(number) if number.is_integer() else number


def _instead(key: str, value: Any, origin: str, siblings: list[str], groups: dict[str, list[str]]) -> str:
    """What a key that does not exist was most likely meant to be."""
    section, _, name = key.rpartition(".")
    if any(section == field or section.startswith(f"{field}.") for field in fields()):  # a mapping: export.thresholds
        if value in siblings:  # the other way round, as datasets' rename_columns takes them
            return f"our name first: '{section}={{{value}: {name}}}'"
        beside = nearest(name, siblings)
        return f"{section}.{beside}" if beside else f"{section} has " + ", ".join(siblings)
    if owner := _mapping_called(section):
        return _assignment(origin)(f"{owner}.{name}", value)
    if not section and isinstance(value, list) and origin != COMMAND_LINE and nearest(name, [DEFAULTS], cutoff=0.75):
        return f"{DEFAULTS}, if it is the list of what the file builds on"
    if name.lower() in NO_FIELD:
        return NO_FIELD[name.lower()]
    guess = nearest_key(key, groups)
    if type(value) is int and guess in COUNTED:
        guess = COUNTED[guess]
    if guess == "model.path" and str(value).lower().endswith(DATA_SUFFIXES):
        guess = "data.path"
    if guess is None:
        parent = section.partition(".")[0]
        return f"{parent} has " + ", ".join(siblings) if parent and parent in sections() else NONE_LIKE_IT
    if guess in groups and isinstance(value, str):
        option = nearest(value, groups[guess])
        return f"{guess}={option}" if option else f"{guess}=..., one of " + ", ".join(groups[guess])
    if guess in sections():
        return f"{guess} has " + ", ".join(field.rpartition(".")[2] for field in sections()[guess])
    if guess not in fields() or isinstance(value, dict):
        return guess
    said = _carried_over(guess, name.lower(), value, _assignment(origin)) or _how_to_set(guess)
    is_typed = guess == "data.path" and origin == COMMAND_LINE
    return f"data=file {said}" if is_typed else said  # beside a recipe's own data it would be refused


def _mapping_called(section: str) -> str | None:
    """The field that `columns` or `column_map` is, where it takes names with a value each."""
    meant = [ALIASES.get(section.lower()), *(key for key in fields() if key.rpartition(".")[2] == section)]
    return next((key for key in meant if key in fields() and "mapping" in describe(fields()[key].annotation)), None)


def instead_of_option(name: str, text: str) -> str:
    """What sets the field that an option `--name=text` was most likely meant to be."""
    if name.lower() in NO_FIELD:
        return NO_FIELD[name.lower()]
    if name == "format" and text in typing.get_args(ExportFormat):  # as chat, push and serve-check take it
        return f"fields are set without dashes: export.formats=[{text}]"
    guess, number = nearest_key(name) or name, _number(text)
    value = _TRUTH.get(text.lower(), text) if number is None else number
    known = text and guess in fields() and guess != name
    right = _instead(name, value, COMMAND_LINE, [], {}) if known else f"{guess}={text or '...'}"
    return f"fields are set without dashes: {right}"


def _carried_over(key: str, name: str, value: Any, assign: Callable[[str, Any], str]) -> str | None:
    """`key` set to what another tool's `name` was given; None where that says nothing of our field."""
    if name in OTHER_QUANTITIES:
        return None
    if meant := _ours(key, value):
        return assign(key, meant)
    if _is_taken(value, fields()[key].annotation):
        return assign(key, value)
    if name in MEANT and value:
        return assign(key, MEANT[name])
    return f"{assign(key, None)} {NONE_IS[key]}" if key in NONE_IS and value == 0 else None


def _ours(key: str, value: Any) -> Any:
    """What a field calls a value that another tool has another word for; None where it has none."""
    if key == "data.path" and isinstance(value, list):  # Axolotl's datasets: a path and a type each
        paths = [each.get("path") for each in value if isinstance(each, dict)]
        return paths if len(paths) == len(value) and all(isinstance(path, str) for path in paths) else None
    return VALUES.get(key, {}).get(str(value).lower())


def _assignment(origin: str) -> Callable[[str, Any], str]:
    """How a value is written where this one was: key=value in a shell, key: value in a file."""
    separator = "=" if origin in (COMMAND_LINE, DEFAULT) else ": "
    return lambda key, value: f"{key}{separator}{written(value)}"


def _how_to_set(key: str) -> str:
    known = fields().get(key)
    if known is None:
        return f"give {key} a value"
    words = describe(known.annotation)
    return f"{key}=...{', ' + words if words.startswith('one of ') else ''}; {known.help}"


def _missing(value: Any, prefix: str = "") -> list[str]:
    if isinstance(value, dict):
        return [key for name, item in value.items() for key in _missing(item, f"{prefix}{name}.")]
    return [prefix[:-1]] if value == MISSING else []


def _at(value: Any, path: list[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _without(resolved: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """A copy of `resolved` without `keys`, which then take their defaults."""

    def keep(value: Any, prefix: str) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: keep(v, f"{prefix}{k}.") for k, v in value.items() if f"{prefix}{k}" not in keys}

    return keep(resolved, "")
