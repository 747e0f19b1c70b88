"""The command line's overrides, read one by one, so that every mistake among them is reported at once.

Hydra stops at the first override that it does not know. Here each is parsed by Hydra's grammar on its own:
what is wrong becomes a Problem, and what is a plain `key=value` becomes a forced one (`++key=value`), which
Hydra takes without a question, so that the closed schema judges it together with the files.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from loadmaster import catalog
from loadmaster.config.fields import (
    NOT_APPLES,
    OF_APPLES,
    describe,
    fields,
    is_apples,
    leaves,
    nearest,
    nearest_card,
    nearest_key,
)
from loadmaster.config.hydra_sources import GROUP
from loadmaster.config.model_folder import run_of
from loadmaster.config.origins import COMMAND_LINE
from loadmaster.config.schema import DATA_SUFFIXES
from loadmaster.config.shipped import local_path, shipped_folder
from loadmaster.config.validate import instead_of_option
from loadmaster.errors import Problem

PINNED = re.compile(r"([\w.@+]+)=([\w.-]+==[\w.+]+)", re.ASCII)
"""`endpoint.server=vllm==0.27.1`: Hydra's grammar wants such a value in quotes, which nobody would guess."""
_FROM_HOME = re.compile(r"([=,\[]\s*)(~(?:[^\"',\[\]{}]*[^\"',\[\]{}\s])?)")
"""`model.path=~/models/mine`, or in a list: a shell leaves the ~ of a word that does not begin with it as it is."""
FIELDS_SUFFIXES = (".yaml", ".yml")
_QUOTES = " '\""
_MACHINE = re.compile(r"((?P<first>[1-9]\d?)x[_-]?)?(?P<card>.+?)([_-]?x(?P<count>[1-9]\d?)(_?n(?P<nodes>[1-9]\d*))?)?")
"""`l40s_x4`, `h100_80gb_x8_n2`, and as plans name them, `8xh100_80gb`."""


@dataclass
class Overrides:
    """What Hydra is given, which keys the command line sets, and what was refused."""

    arguments: list[str] = field(default_factory=list)
    for_hydra: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value of every field set here; a sweep's keys are in it too, with no one value."""
    problems: list[Problem] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    """Groups whose choice was refused."""


def groups_of(loader: ConfigLoaderImpl) -> list[str]:
    # Of the repository itself: the loader's own methods of these names copy all of it first, 25 ms each.
    return [group for group in loader.repository.get_group_options("", ObjectType.GROUP) if group != "hydra"]


def read_overrides(loader: ConfigLoaderImpl, arguments: list[str], multirun: bool = False) -> Overrides:
    """Sort `arguments` into what Hydra can compose and what is wrong with the rest."""
    result = Overrides(arguments=arguments)
    parser = OverridesParser.create(config_loader=loader)
    offered = not {"-m", "--multirun"} & set(arguments)  # a command that has it does not pass it on
    for argument in _with_their_values(arguments):
        try:
            override = parser.parse_override(_quoted(argument))
        except (HydraException, RecursionError) as error:
            text = _as_text(argument)
            if text is None:
                result.problems.append(_unreadable(loader, argument, error))
                continue
            override = parser.parse_override(text)
        override.config_loader = loader
        problem = _problem(loader, override, multirun, offered)
        key = override.key_or_group
        if problem is not None:
            result.problems.append(problem)
            result.groups += [key] if loader.repository.group_exists(key) else []
            continue
        result.for_hydra.append(_forced(loader, override))
        if not override.is_delete() and not _is_group_choice(loader, override) and not override.is_hydra_override():
            result.values |= leaves(key, None if override.is_sweep_override() else override.value())
    return result


def _with_their_values(arguments: list[str]) -> list[str]:
    """The command line with each option and the word behind it that is its value as one."""
    words: list[str] = []
    for argument in arguments:
        if words and words[-1].startswith("-") and value_behind(words[-1], argument):
            words[-1] += f" {argument}"
        else:
            words.append(argument)
    return words


def value_behind(option: str, after: str) -> str:
    """The word behind an option, where it is the option's value; else nothing."""
    return "" if set("= ") & set(option) or "=" in after or after[:1] in ("", *"-~+") else after


def note_repeated(arguments: list[str]) -> None:
    """Say of each key that a person gave several values that the last one counts, which Hydra takes without a word."""
    given: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not key.startswith("~"):
            given.setdefault(key.lstrip("+"), []).append(value)
    for key, values in given.items():
        if len(set(values)) > 1 and os.environ.get("RANK", "0") == "0":
            over = f"; {key}=[{','.join(dict.fromkeys(values))}] lays each over those before it" if key == GROUP else ""
            print(f"note: {key} is given as {' and '.join(values)}: the last one counts{over}", file=sys.stderr)


def _quoted(argument: str) -> str:
    pinned = PINNED.fullmatch(argument)
    if pinned:
        return f'{pinned[1]}="{pinned[2]}"'
    return argument if '"' in argument or "'" in argument else _FROM_HOME.sub(r'\1"\2"', argument)


def _as_text(argument: str) -> str | None:
    """`data.path=Übung (1).jsonl`, `data.split=train[:20%]` with the quotes that Hydra's grammar wants; None for what
    is no plain text."""
    key, _, value = argument.partition("=")
    known = fields().get(key.lstrip("+"))
    is_text = known is not None and "text" in describe(known.annotation)
    if not is_text or not value or value[0] in "[]" or set(value) & set("\"'\\${},"):
        return None
    return f'{key}="{value}"'


def assigned(key: str, text: str) -> str:
    """`key=text` as a word of a command line, quoted for Hydra where its grammar would read something else."""
    if re.fullmatch(r"[\w./:@%+-]+", text):
        return f"{key}={text}"
    # A backslash is itself, but for those in front of a quote.
    inside = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"{key}='{inside}'"


def reading_order(problems: list[Problem], arguments: list[str]) -> list[Problem]:
    """The command line's problems as they were typed, then the files' from top to bottom."""

    def place(problem: Problem) -> tuple[int, str, int]:
        if problem.origin == COMMAND_LINE:
            typed = (number for number, argument in enumerate(arguments) if problem.key.partition(" ")[0] in argument)
            return 0, "", next(typed, len(arguments))
        file, _, line = problem.origin.rpartition(":")
        return 1, file, int(line) if line.isdigit() else 0

    return sorted(problems, key=place)


def sweep(loader: ConfigLoaderImpl, for_hydra: list[str]) -> list[list[str]]:
    """The overrides of each job of a --multirun, in the basic sweeper's order."""
    axes = []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(for_hydra):
        if override.is_sweep_override() and override.is_discrete_sweep():
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            axes.append([override.input_line or ""])
    return [list(job) for job in itertools.product(*axes)]


def _is_group_choice(loader: ConfigLoaderImpl, override: Override) -> bool:
    is_group = loader.repository.group_exists(override.key_or_group)
    return is_group and not (not override.is_sweep_override() and isinstance(override.value(), dict))


def _forced(loader: ConfigLoaderImpl, override: Override) -> str:
    plain = override.type == OverrideType.CHANGE and not override.is_hydra_override()
    line = override.input_line or ""
    return f"++{line}" if plain and not _is_group_choice(loader, override) else line


def _unreadable(loader: ConfigLoaderImpl, argument: str, error: Exception) -> Problem:
    if argument.startswith("-"):
        option, text = re.fullmatch(r"-*([^= ]*)[= ]?(.*)", argument, re.DOTALL).groups()
        name = option.replace("-", "_")
        remedy = instead_of_option(name, text) if text and nearest_key(name) else "leave it out"
        return Problem(argument, None, COMMAND_LINE, "there is no such option here", remedy)
    if "=" not in argument and not argument.startswith("~"):
        message = "is not of the form key=value"
        if argument.lower().endswith(DATA_SUFFIXES):
            return Problem(argument, None, COMMAND_LINE, message, f"data=file data.path={argument}")
        if argument.lower().endswith(FIELDS_SUFFIXES):
            return Problem(argument, None, COMMAND_LINE, message, as_recipe(argument))
        if os.path.isdir(folder := local_path(argument)) and (run := run_of(folder)):
            return Problem(argument, None, COMMAND_LINE, message, _goes_on(run))
        recipe = nearest(argument, loader.repository.get_group_options(GROUP))
        remedy = f"{GROUP}={recipe}" if recipe else "write key=value, for example lora.rank=16"
        return Problem(argument, None, COMMAND_LINE, message, remedy)
    key, _, value = argument.partition("=")
    if not key:
        return _nameless(argument)
    if key != key.strip():
        remedy = f"{key.strip()}={value.strip()}"
        return Problem(argument, None, COMMAND_LINE, "has a space before the =", remedy)
    if value.startswith("=") and key in fields():
        return Problem(key, value, COMMAND_LINE, "stands behind two =", f"{key}={value.lstrip('=')}")
    if value.endswith(",") and value.count("[") > value.count("]"):
        remedy = f"no space behind a comma, {key}={value}..., or all of it in quotes"
        return Problem(key, value, COMMAND_LINE, "is cut off by a space in the list", remedy)
    if value.endswith(","):
        return Problem(key, value, COMMAND_LINE, "ends with a comma", f"{key}={value.rstrip(',')}")
    reason = str(error).splitlines()[0]
    known = fields().get(key)
    itself = re.sub(r"(?<!\\)\$\{", r"\\${", value)  # or it would stand for another field's value
    remedy = _quoted_twice(key, itself)
    if known and "list" in describe(known.annotation) and value.startswith("[") and value.endswith("]"):
        items = ",".join(f"'{item.strip(_QUOTES)}'" for item in value[1:-1].split(",") if item.strip())
        remedy = f'quote each entry, and all of it for the shell: "{key}=[{items}]"'
    return Problem(key, value, COMMAND_LINE, f"Hydra cannot read it: {reason}", remedy)


def _quoted_twice(key: str, value: str) -> str:
    for_hydra = value.replace('"', r"\"")
    word = shlex.quote(f'{key}="{for_hydra}"')
    return f"quote the value twice, once for the shell and once for Hydra: {word}"


def as_recipe(given: str) -> str:
    """How a file of fields is given to a job."""
    file = local_path(given)
    folder = file.parent if file.name == "config.yaml" else file
    if os.path.isdir(folder) and (run := run_of(folder)):
        return _goes_on(run)
    if os.path.isdir(file):
        return f"{GROUP}=NAME"
    name, there, folders = file.stem, file.absolute(), (Path("recipes").absolute(), shipped_folder("recipes"))
    for each in folders:
        if there.is_relative_to(each) and os.path.isfile(file):
            return f"{GROUP}={there.relative_to(each).with_suffix('').as_posix()}"
    is_taken = any(os.path.isfile(each / f"{name}.yaml") for each in folders)
    if is_taken and not os.path.isfile(file):
        return f"{GROUP}={name}"
    name = f"my_{name}" if is_taken else name  # recipe=NAME would be the other one
    return f"put it into recipes/ here as {name}.yaml, then {GROUP}={name}"


def _goes_on(run_dir: Path) -> str:
    return f"loadmaster train {shlex.quote(str(run_dir))} goes on with the run in it"


def _nameless(argument: str) -> Problem:
    message = "sets nothing: there is no key before the ="
    return Problem(argument, None, COMMAND_LINE, message, "write key=value, for example lora.rank=16")


def _problem(loader: ConfigLoaderImpl, override: Override, multirun: bool, offered: bool) -> Problem | None:
    key, line = override.key_or_group, override.input_line or ""
    if override.is_hydra_override():
        return None
    value = line.partition("=")[2]
    if not key:
        return _nameless(line)
    if override.is_sweep_override() and not multirun:
        known = fields().get(key)
        a_list = f"{key}=[{value}] for a list, or " if known and "list" in describe(known.annotation) else ""
        remedy = a_list + ("add --multirun for one run each" if offered else "give one of them here")
        if os.path.exists(local_path(value)):
            return Problem(key, value, COMMAND_LINE, "is one file's name and reads as several values, for its comma",
                           _quoted_twice(key, value))  # fmt: skip
        return Problem(key, value, COMMAND_LINE, "several values, but this is a single run", remedy)
    if override.is_sweep_override() and not override.is_discrete_sweep():
        message = "is a range to search in, and a sweep here runs every one of the values that are listed"
        return Problem(key, value, COMMAND_LINE, message, f"{key}=A,B,C, or {key}=range(START,STOP,STEP)")
    if override.package is not None and not loader.repository.group_exists(key):
        return Problem(f"{key}@{override.package}", value, COMMAND_LINE, f"there is no group {key}", _groups(loader))
    if not _is_group_choice(loader, override):
        return None
    if override.is_force_add():
        return Problem(key, value, COMMAND_LINE, "a group cannot be forced with ++", f"{key}={value}")
    if override.is_delete():
        return None
    options, wanted = loader.repository.get_group_options(key), _wanted(override)
    inside = [option for option in wanted if "/" in option and ".." not in option]  # recipes/team/mine.yaml
    options += [option for option in inside if loader.repository.config_exists(f"{key}/{option}")]
    wrong = next((option for option in wanted if option not in options), None)
    if wrong is not None:
        return unknown_option(key, wrong, options, COMMAND_LINE)
    if isinstance(override.value(), list) and key != GROUP:  # recipes lie over each other; of the rest, one is meant
        return Problem(key, value, COMMAND_LINE, "takes one option", f"{key}={wanted[-1]}")
    return None


def unknown_option(group: str, wrong: str, options: list[str], origin: str) -> Problem:
    is_file = wrong.endswith(FIELDS_SUFFIXES)
    named = Path(wrong).stem if is_file else wrong
    if group == "hardware" and is_apples(named):
        return Problem(group, wrong, origin, OF_APPLES, NOT_APPLES)
    beginnings = dict.fromkeys(option[: len(named) + 1] for option in options)  # lama is llama, of whatever size
    begun = nearest(named, beginnings, cutoff=0.75)
    alike = [option for option in options if begun and option.startswith(begun)]
    guess = min(alike, key=_size) if alike else nearest(named, options)
    meant = _machine(named, options) if group == "hardware" else f"{group}={guess}" if guess else ""
    remedy = (f"{meant}; " if meant else "") + "the options are " + ", ".join(options)
    is_model = "/" in wrong or os.path.isfile(local_path(wrong) / "config.json")
    if (group == "model" and is_model) or (group == "data" and wrong.lower().endswith(DATA_SUFFIXES)):
        remedy = f"{_meant(group, wrong)}; {remedy}"
    others = {
        "model": "model by model.name=HUB-ID or model.path=FOLDER",
        "data": "data by data=file data.path=FILE-OR-FOLDER-OR-HUB-ID",
        "hardware": "card by hardware.gpu=NAME",
        "launch": "machine that ssh reaches by launch=ssh launch.hosts=[USER@HOST] (docs/launch.md); a job of another "
        "scheduler, such as Kubernetes, starts python train.py itself (docs/multi-gpu.md)",
    }
    remedy += f"; any other {others[group]}" if group in others else ""
    if is_file or ("/" in wrong and group != "data"):
        remedy += f"; a file of your own goes into {'recipes' if group == GROUP else 'conf/' + group}/ here"
    return Problem(group, wrong, origin, f"there is no {group} of this name", remedy)


def _machine(named: str, options: list[str]) -> str:
    """What sets the hardware that was probably meant: an option, or the fields of a machine without one."""
    read = _MACHINE.fullmatch(named.lower())
    said = {"count": read["count"] or read["first"], "nodes": read["nodes"]} if read else {}
    size = {key: value for key, value in said.items() if value}
    card = nearest_card(read["card"] if read else named, catalog.gpus())
    if card is None:
        guess = nearest(named, options, cutoff=0.75)
        return f"hardware={guess}" if guess else ""
    option = f"{card}_x{size.get('count', 1)}" + (f"_n{size['nodes']}" if "nodes" in size else "")
    fields_of_it = [f"hardware.gpu={card}", *(f"hardware.{key}={value}" for key, value in size.items())]
    return f"hardware={option}" if option in options else " ".join(fields_of_it)


def _meant(group: str, wrong: str) -> str:
    """What was probably meant by a model or data given in the place of a group's option."""
    if group == "data":
        return f"data=file data.path={wrong}"
    is_folder = wrong.startswith(("/", ".", "~")) or os.path.isdir(local_path(wrong))
    return f"model.path={wrong}" if is_folder else f"model.name={wrong}"


def _size(option: str) -> list[int]:
    """Of options that are alike but for it: llama3_1_8b comes before llama3_1_70b."""
    return [int(number) for number in re.findall(r"\d+", option)]


def _wanted(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(v) for v in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    value = override.value()
    return [str(v) for v in value] if isinstance(value, list) else ["null" if value is None else str(value)]


def _groups(loader: ConfigLoaderImpl) -> str:
    return "the groups are " + ", ".join(groups_of(loader))
