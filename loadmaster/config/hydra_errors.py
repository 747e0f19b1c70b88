"""What stopped Hydra, as a Problem: which key, in which file and line, and what would work.

Hydra's errors are sentences for a developer; the parts that a user needs are read out of them here, and what
is not recognised is passed on in Hydra's own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from loadmaster.config.fields import nearest, nearest_key, sections
from loadmaster.config.hydra_sources import GROUP, NoSettings
from loadmaster.config.origins import COMMAND_LINE, file_of, line_of_default, lines_of
from loadmaster.config.overrides import groups_of, unknown_option
from loadmaster.config.shipped import display_path
from loadmaster.errors import Problem

_WHERE = re.compile(r"In '([^']+)'")
_KEY = re.compile(r"(?:Could not (?:override|delete|delete from config\.)|already at|The value of) '([^']+)'")


def explain(
    loader: ConfigLoaderImpl, error: Exception, config_name: str, overrides: list[str]
) -> tuple[Problem, str | None]:
    """The problem, and the override to blame for it; None where a file is to blame."""
    if isinstance(error, NoSettings):
        return _no_settings(loader, error), None
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return _bad_yaml(error), None
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        return _missing_file(loader, error, text, config_name, overrides), None
    where, key = _WHERE.search(text), _KEY.search(text)
    culprit = next((o for o in overrides if key and o.lstrip("+~").partition("=")[0] == key[1]), None)
    if culprit is None:
        culprit = next((o for o in overrides if o in text), None)
    if culprit is not None:
        return _bad_override(loader, culprit, text), culprit
    path = where[1] if where else config_name
    file = file_of(loader, path)
    origin = display_path(file) if file else path
    if key is not None and "Could not override" in text:
        groups = groups_of(loader)
        guess = nearest(key[1], groups)
        line = _line_of_group(file, key[1]) if file else None
        remedy = f"override /{guess}: ..." if guess else "the groups are " + ", ".join(groups)
        return Problem(key[1], None, f"{origin}:{line}" if line else origin, "there is no such group", remedy), None
    no_section = _no_section(loader, config_name, overrides)
    return no_section or Problem(path, None, origin, f"Hydra cannot compose it: {text}", "mend this file"), None


def explain_section(
    loader: ConfigLoaderImpl, config_name: str, overrides: list[str]
) -> tuple[Problem, str | None] | None:
    """The same where Hydra only fell over its own section: a file in which it is none, else an override of it."""
    if problem := _no_section(loader, config_name, overrides):
        return problem, None
    own = [o for o in overrides if o.lstrip("+~").startswith("hydra.")]
    if not own:
        return None
    without = {each: [other for other in overrides if other != each] for each in own}
    culprit = next((each for each in own if _composes(loader, config_name, without[each])), own[0])
    key, _, value = culprit.lstrip("+~").partition("=")
    swept = key.startswith("hydra.sweeper.params")
    remedy = "give what is swept itself: --multirun seed=1,2" if swept else "check the key and the value"
    return Problem(key, value, COMMAND_LINE, "Hydra cannot set it", remedy), culprit


def explain_circle(loader: ConfigLoaderImpl, config_name: str, overrides: list[str]) -> tuple[Problem, None]:
    """Where a recipe's defaults list leads back to the recipe: Hydra goes round until Python stops it. `- /recipe: x`
    does so by itself, for the command line's choice of the group takes the place of x."""
    paths = [*_recipes_among(overrides), config_name]
    file = next(filter(None, (file_of(loader, path) for path in paths)), None)
    line = file and next((n for n, text in _numbered(file) if re.match(rf"\s*-\s*/?{GROUP}\b", text)), None)
    origin = f"{display_path(file)}{f':{line}' if line else ''}" if file else config_name
    message = "leads back to this recipe, and so on without end"
    remedy = f"- /{GROUP}/NAME takes in another recipe, one that does not take in this one"
    return Problem("defaults", None, origin, message, remedy), None


def _composes(loader: ConfigLoaderImpl, config_name: str, overrides: list[str]) -> bool:
    try:
        loader.load_configuration(config_name, overrides, run_mode=RunMode.RUN)
    except Exception:  # of whatever kind: it is looked for what does not raise
        return False
    return True


def _no_section(loader: ConfigLoaderImpl, config_name: str, overrides: list[str]) -> Problem | None:
    """The file that gives `hydra` a value."""
    for file in _files(loader, config_name, overrides):
        whole = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(whole, dict) and not isinstance(whole.get("hydra", {}), dict):
            line = dict(lines_of(file))["hydra"]
            message, remedy = "is Hydra's own section and no value", "leave it out, or hydra: {run: {dir: FOLDER}}"
            return Problem("hydra", None, f"{display_path(file)}:{line}", message, remedy)
    return None


def _files(loader: ConfigLoaderImpl, config_name: str, overrides: list[str]) -> list[Path]:
    """Of the defaults list, as far as there is one."""
    try:
        defaults = loader.compute_defaults_list(config_name, overrides, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, ValueError):
        return []
    return [file for default in defaults if (file := file_of(loader, default.config_path or ""))]


def _bad_yaml(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark
    assert mark is not None
    file = display_path(Path(mark.name))
    what = " ".join(part for part in (error.context, error.problem) if part)
    remedy = "check the indentation, the quotes and the colons there and just above"
    if "duplicate key" in what:
        remedy = "keep one of the two"
    return Problem(file, None, f"{file}:{mark.line + 1}", f"is not valid YAML: {what}", remedy)


def _no_settings(loader: ConfigLoaderImpl, error: NoSettings) -> Problem:
    file = file_of(loader, error.config_path)
    name = display_path(file) if file else error.config_path
    remedy = "a file of settings is YAML, with a line key: value for each"
    return Problem(name, None, name, f"cannot be read: {error.why}", remedy)


def _missing_file(
    loader: ConfigLoaderImpl, error: MissingConfigException, text: str, config_name: str, overrides: list[str]
) -> Problem:
    group, _, option = (error.missing_cfg_file or config_name).rpartition("/")
    where = _WHERE.search(text)
    if not group and not where:
        known = [name for name in loader.repository.get_group_options("") if file_of(loader, name)]
        return Problem("--config-name", option, COMMAND_LINE, "there is no such file", "one of " + ", ".join(known))
    # Hydra blames the primary file for what a recipe's `override /group: option` asked for.
    origin = where[1] if where else config_name
    for path in [*_recipes_among(overrides), origin]:
        file = file_of(loader, path)
        line = line_of_default(file, option) if file else None
        if file and line:
            origin = f"{display_path(file)}:{line}"
            break
    if group and not loader.repository.group_exists(group):
        groups = groups_of(loader)
        guess = nearest(group, groups)
        remedy = (f"{guess}/{option}; " if guess else "") + "the groups are " + ", ".join(groups)
        return Problem(f"{group}/{option}", None, origin, f"there is no group {group}", remedy)
    return unknown_option(group, option, loader.repository.get_group_options(group) if group else [], origin)


def _recipes_among(overrides: list[str]) -> list[str]:
    """Config paths of the recipes that the command line picks."""
    return [o.replace("=", "/", 1) for o in overrides if o.startswith(f"{GROUP}=")]


def _bad_override(loader: ConfigLoaderImpl, culprit: str, text: str) -> Problem:
    key, _, value = culprit.lstrip("+~").partition("=")
    if "already at" in text:
        return Problem(key, value, COMMAND_LINE, "+ adds what is not there yet, and this field is", f"{key}={value}")
    if culprit.startswith("~"):
        actual = re.search(r"The value of '[^']+' is (.+) and not", text)
        if actual:
            return Problem(key, value, COMMAND_LINE, f"is {actual[1]} and not {value}, so ~ leaves it", f"~{key}")
        guess = nearest_key(key, groups_of(loader))
        remedy = f"~{guess}" if guess and guess != key else f"leave out ~{key}"
        return Problem(key, None, COMMAND_LINE, "there is nothing of this name to take away", remedy)
    if key in sections():
        remedy = "set " + ", ".join(sections()[key])
        return Problem(key, value, COMMAND_LINE, "is a section of several fields, not a list", remedy)
    return Problem(key, value, COMMAND_LINE, f"Hydra cannot set it: {text}", "check the key and the value")


def _line_of_group(file: Path, group: str) -> int | None:
    for number, line in _numbered(file):
        if re.match(rf"\s*-\s*(override\s+)?/?{re.escape(group)}\s*:", line):
            return number
    return None


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    return enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
