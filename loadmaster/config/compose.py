"""Files and command line -> one validated Job, or every problem at once.

Hydra composes (conf/train.yaml's defaults list, then the command line), the schema closes, the rules cross-check.
Nothing here imports torch; the whole takes a fraction of a second in a cold process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, SearchPathException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loadmaster.config.fields import fields
from loadmaster.config.hydra_sources import GROUP, PRIMARY, config_loader
from loadmaster.config.origins import (
    COMMAND_LINE,
    DEFAULT,
    file_of,
    line_of_default,
    origin_of,
    origins_of_files,
)
from loadmaster.config.overrides import Overrides, groups_of, read_overrides, unknown_option
from loadmaster.config.rules import broken_rules
from loadmaster.config.schema import Job
from loadmaster.config.shipped import display_path
from loadmaster.config.validate import check, to_dict
from loadmaster.errors import ConfigError, Problem


@dataclass(frozen=True)
class Composed:
    job: Job
    resolved: dict[str, Any]
    """Plain dict of every field of the job; what config.yaml holds."""
    origins: dict[str, str]
    """Dotted key of every field -> `recipes/smoke.yaml:12`, `command line` or `default`."""


def compose(overrides: list[str], config_dir: str | None = None, config_name: str = PRIMARY, job_number: int = 0) -> Composed:
    """Compose and validate one job.

    overrides: as on the command line (`recipe=lora_8b`, `lora.rank=8`, `+a=b`, `~tracker`).
    config_dir, config_name: Hydra's --config-dir and --config-name.
    job_number: position in a --multirun, for `${hydra:job.num}`.
    Raises ConfigError with all problems of the files and the command line together.
    """
    try:
        loader = config_loader(config_dir)
    except SearchPathException as error:
        raise ConfigError([Problem("--config-dir", config_dir, COMMAND_LINE, str(error), "name a folder")]) from error
    return compose_with(loader, read_overrides(loader, overrides), config_name, job_number)


def compose_with(loader: ConfigLoaderImpl, given: Overrides, config_name: str, job_number: int = 0) -> Composed:
    problems = list(given.problems)
    unsure = list(given.groups)  # what was refused so far: rules about it would mislead
    resolved: dict[str, Any] = {}
    origins: dict[str, str] = {}
    choices: dict[str, Any] = {}
    try:
        config = loader.load_configuration(config_name, given.for_hydra, run_mode=RunMode.RUN)
        defaults = loader.compute_defaults_list(config_name, given.for_hydra, RunMode.RUN).defaults
        origins = origins_of_files(loader, defaults)
        choices = dict(config.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        problems.append(_composition_problem(loader, error, config_name, choices))
        unsure.append(GROUP)
        config = _command_line_only(given)
    origins |= {key: COMMAND_LINE for key in given.keys}
    resolved, unresolved = _plain(config, origins, job_number)
    problems += unresolved
    resolved.setdefault("recipe", choices.get(GROUP) or "custom")
    if "schema_defaults" and resolved.get("recipe") == "custom":
        resolved["recipe"] = choices.get(GROUP) or "custom"

    options = {group: loader.get_group_options(group) for group in groups_of(loader)}
    checked = check(resolved, origins, options)
    problems += checked.problems
    if GROUP not in unsure:
        suspect = unsure + checked.keys + [p.key for p in unresolved]
        problems += broken_rules(checked.job, origins, suspect)
    if problems:
        raise ConfigError(problems)
    every = {key: origin_of(origins, key) for key in fields()}
    return Composed(checked.job, to_dict(checked.job), every | {k: v for k, v in origins.items() if k not in every})
