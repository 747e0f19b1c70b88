"""Files and command line -> one validated Job, or every problem at once.

Hydra composes (conf/train.yaml's defaults list, then the command line), the schema closes, the rules cross-check.
Nothing here imports torch; the whole takes a fraction of a second in a cold process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, SearchPathException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from loadmaster.config.fields import fields
from loadmaster.config.hydra_errors import explain, explain_circle, explain_section
from loadmaster.config.hydra_sources import GROUP, PRIMARY, Loader, config_loader
from loadmaster.config.jobhash import SINCE
from loadmaster.config.origins import COMMAND_LINE, lines_of, origin_of, origins_of_files
from loadmaster.config.overrides import Overrides, groups_of, read_overrides, reading_order
from loadmaster.config.rules import broken_rules
from loadmaster.config.schema import Job
from loadmaster.config.shipped import refuse_gone_folder
from loadmaster.config.validate import MISSING, check, to_dict
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.files import read_text

NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
"""Hydra's own `none`."""
OUTPUT_FOLDER = "hydra:runtime.output_dir"


@dataclass(frozen=True)
class Composed:
    job: Job
    resolved: dict[str, Any]
    """Plain dict of every field of the job; what config.yaml holds."""
    origins: dict[str, str]
    """Dotted key of every field -> `recipes/smoke.yaml:12`, `command line` or `default`."""
    needs_hydra: bool = False
    """Something of Hydra's own is set (a callback, a folder, logging): Hydra has to run the job itself."""

    @contextmanager
    def located(self, begun: bool = False) -> Iterator[None]:
        """Say of problems that are found in the job later, by the plan, where each field was set. begun: see there."""
        try:
            yield
        except ConfigError as error:
            found = [
                replace(p, origin=origin_of(self.origins, p.key)) if p.origin == IN_THE_JOB else p
                for p in error.problems
            ]
            raise ConfigError(found, begun or error.begun) from error

    def sourced(self, refused: dict[str, Any]) -> str:
        """A plan's refusal with the file and line of the field that is why, unless that was typed. refused: its
        `reason`, which begins with the `field` and its `value` if it is one's."""
        field = refused.get("field")
        if field is None or (origin := origin_of(self.origins, field)) == COMMAND_LINE:
            return refused["reason"]
        begins = f"{field}={refused['value']}"
        return f"{begins} ({origin}){refused['reason'].removeprefix(begins)}"


def compose(
    overrides: list[str], config_dir: str | None = None, config_name: str = PRIMARY, job_number: int = 0
) -> Composed:
    """Compose and validate one job.

    overrides: as on the command line (`recipe=lora_8b`, `lora.rank=8`, `+a=b`, `~tracker`).
    config_dir, config_name: Hydra's --config-dir and --config-name.
    job_number: position in a --multirun, for `${hydra:job.num}`.
    Raises ConfigError with the problems of the files and of the command line together.
    """
    loader = open_loader(config_dir)
    return compose_with(loader, read_overrides(loader, overrides), config_name, job_number)


def open_loader(config_dir: str | None = None) -> Loader:
    refuse_gone_folder()
    try:
        return config_loader(config_dir)
    except SearchPathException as error:
        message, remedy = "there is no such folder", "name one that exists"
        raise ConfigError.of("--config-dir", config_dir, message, remedy, COMMAND_LINE) from error


def compose_with(
    loader: Loader, given: Overrides, config_name: str = PRIMARY, job_number: int = 0
) -> Composed:
    """compose() on overrides that are read already, and on a loader that is open already."""
    config, origins, problems = load(loader, given, config_name)
    whole = config is not None
    if config is None:  # files that do not compose: what the command line says can be judged all the same
        config = _command_line_alone(given)
    origins |= dict.fromkeys(given.values, COMMAND_LINE)
    resolved, unresolved = resolve_all(config, origins, job_number)
    checked = check(resolved, origins, {})
    if checked.problems:  # once more, with what the hints name: listing it takes longer than the check
        options = {group: loader.repository.get_group_options(group) for group in groups_of(loader)}
        checked = check(resolved, origins, options)
    found = unresolved + checked.problems
    if whole and GROUP not in given.groups:
        doubtful = given.groups + checked.keys + [problem.key for problem in unresolved]
        found += broken_rules(checked.job, origins, doubtful)
    unread = {problem.key for problem in given.problems}  # of these it is said already that they have no value
    problems += [p for p in found if (whole or p.origin == COMMAND_LINE) and not (p.value is None and p.key in unread)]
    if problems:
        raise ConfigError(reading_order(problems, given.arguments))
    return replace(composed(checked.job, origins), needs_hydra=whole and _needs_hydra(config))


def _needs_hydra(config: DictConfig) -> bool:
    """Whether Hydra would do more with one job than compose it, which is all it does as shipped (conf/train.yaml)."""
    hydra = OmegaConf.to_container(config.hydra, resolve=False)
    as_shipped = (
        hydra["run"] == {"dir": "."} and hydra["mode"] in (None, RunMode.RUN, "RUN")
        and hydra["job_logging"] == hydra["hydra_logging"] == NO_LOGGING
    )
    job = hydra["job"]
    more = (hydra["callbacks"], job["env_set"], job["chdir"], hydra["output_subdir"], hydra["verbose"])
    return not as_shipped or any(more)


def composed(job: Job, origins: dict[str, str]) -> Composed:
    return Composed(job, to_dict(job), {key: origin_of(origins, key) for key in fields()})


def read_job(path: Path, to_run: bool = True) -> Composed:
    """The job that a run directory's config.yaml holds, validated again.

    to_run: what it names (data, a model's folder) has to be here; else it is only told of, and may be gone.
    Raises ConfigError where the file was edited into something wrong, or comes from another version.
    """
    resolved = read_settings(path)
    origins = {key: f"{path}:{line}" for key, line in lines_of(path)}
    checked = check(resolved, origins, {})
    problems = checked.problems + (broken_rules(checked.job, origins, checked.keys) if to_run else [])
    if problems:
        raise ConfigError(problems)
    return composed(checked.job, origins)


def read_settings(path: Path) -> dict[str, Any]:
    """What a run directory's config.yaml holds: fields of a job, of which only later versions' may be missing.

    Raises ConfigError where it is damaged, or cut off: a run would go on by the defaults of what it lacks.
    """
    try:
        held = yaml.safe_load(read_text(path))
        if not isinstance(held, dict):
            raise ValueError("it holds no fields")
        if lacking := [field.name for field in dataclasses.fields(Job) if field.name not in {*held, *SINCE}]:
            raise ValueError(f"it ends early, without {', '.join(lacking)}")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        message, remedy = f"cannot be read: {' '.join(str(error).split())}", "the command that began the run writes it"
        raise ConfigError.of(path.name, None, message, remedy, str(path)) from error
    return held


def load(
    loader: Loader, given: Overrides, config_name: str = PRIMARY
) -> tuple[DictConfig | None, dict[str, str], list[Problem]]:
    """Hydra's composition, where each key was set in the files, and what stopped it.

    Hydra stops at its first error. Where that was an override, it is set aside and Hydra asked again, so that
    the next one is found too; where it was a file, there is no composition, and None comes back.
    """
    problems = list(given.problems)
    overrides = list(given.for_hydra)
    while True:
        try:
            config = loader.load_configuration(config_name, overrides, run_mode=RunMode.RUN)
            defaults = loader.composed_of
            break
        except (AttributeError, AssertionError, TypeError):  # Hydra's, of a hydra section that it did not expect
            found = explain_section(loader, config_name, overrides)
            if found is None:
                raise
        except RecursionError:
            found = explain_circle(loader, config_name, overrides)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            found = explain(loader, error, config_name, overrides)
        problem, culprit = found
        problems.append(problem)
        if culprit is None:
            return None, {}, problems
        overrides.remove(culprit)
    _name_recipe(config, [default.config_path or "" for default in defaults])
    return config, origins_of_files(loader, defaults), problems


def _name_recipe(config: DictConfig, paths: list[str]) -> None:
    """Job.recipe is the name in recipe=NAME (NAME+NAME for recipe=[NAME,NAME]), unless a file sets another."""
    names = [path.removeprefix(f"{GROUP}/") for path in paths if path.startswith(f"{GROUP}/")]
    with open_dict(config):
        config.setdefault("recipe", "+".join(names) or "custom")


def _command_line_alone(given: Overrides) -> DictConfig:
    config = OmegaConf.create(dataclasses.asdict(Job()))
    for key, value in given.values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


def resolve_all(config: DictConfig, origins: dict[str, str], job_number: int) -> tuple[dict[str, Any], list[Problem]]:
    """Plain dict with every interpolation resolved, and a problem for each one that cannot be."""
    problems: list[Problem] = []

    def walk(node: DictConfig, prefix: str) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        written = OmegaConf.to_container(node, resolve=False)
        assert isinstance(written, dict)
        for name in node:
            key = f"{prefix}{name}"
            if key == "hydra":
                continue
            if OmegaConf.is_missing(node, name):
                plain[str(name)] = MISSING
                continue
            try:
                value = node[name]
                if isinstance(value, DictConfig):
                    value = walk(value, f"{key}.")
                elif isinstance(value, Container):
                    value = OmegaConf.to_container(value, resolve=True)
                plain[str(name)] = value
                if not isinstance(value, dict) and OUTPUT_FOLDER in str(written[name]):
                    message = "names a folder that Hydra makes only after the job was judged"
                    remedy = "write the folder itself; ${hydra:run.dir} is what hydra.run.dir says"
                    problems.append(Problem(key, written[name], origin_of(origins, key), message, remedy))
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0].partition("interpolation: ")
                message = f"cannot be resolved: {reason[2] or reason[0]}"
                remedy = r"write the value itself, or mend the ${...}; for a name that holds ${, write \${"
                problems.append(Problem(key, written[name], origin_of(origins, key), message, remedy))
        return plain

    with _hydra_config(config, job_number):
        return walk(config, ""), problems


@contextmanager
def _hydra_config(config: DictConfig, job_number: int) -> Iterator[None]:
    """`${hydra:...}` as it would be inside the job."""
    holder = HydraConfig.instance()
    before = holder.cfg
    if "hydra" in config:
        with open_dict(config.hydra.job):
            config.hydra.job.num = job_number
        holder.set_config(config)
    try:
        yield
    finally:
        holder.cfg = before
