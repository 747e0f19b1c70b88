"""The command line around a job: every check first, then the task, inside @hydra.main where that has something to do.

Hydra reports one error at a time, as its own, and turns every failure into exit code 1. So the whole command
(all jobs of a sweep) is composed and validated before Hydra starts, and the task's code is kept beside Hydra. One job
is thereby composed already; Hydra would compose it twice more.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from loadmaster import __version__, collector
from loadmaster.config.compose import Composed, compose_with, load, open_loader, resolve_all
from loadmaster.config.fields import nearest
from loadmaster.config.hydra_sources import PRIMARY, VERSION_BASE, Loader, main_folder
from loadmaster.config.origins import COMMAND_LINE
from loadmaster.config.overrides import (
    Overrides,
    as_recipe,
    note_repeated,
    read_overrides,
    reading_order,
    sweep,
    value_behind,
)
from loadmaster.config.schema import Job
from loadmaster.config.show import show_error
from loadmaster.config.validate import NO_VALUE, instead_of_option
from loadmaster.errors import ConfigError, LoadmasterError, Problem, StoppedOnRequest
from loadmaster.streams import unheard

Task = Callable[[Composed], int]
SHELLS = ("bash", "fish", "zsh")
OF_PLAN = ("--compare", "--json", "--nodes")
"""What `loadmaster plan` takes and the other commands do not."""


def run_app(
    task: Task, arguments: list[str] | None = None, own_flags: Sequence[str] = (),
    after_sweep: Callable[[list[Job], float], None] | None = None,
) -> int:
    """Run `task` on the job that the command line describes, or on each job of a --multirun.

    arguments: as in sys.argv[1:], which is the default. own_flags: what the command takes besides, spelt right; for a
    misspelt one the nearest is named. after_sweep: called with the jobs of a --multirun that were started, and when
    the first of them was (seconds, as time.time()). Returns the exit code: 2 when the configuration is wrong
    (nothing was started), else the task's, and the highest one of a sweep's jobs.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:  # Hydra would name its own
        print(f"loadmaster {__version__}")
        return 0
    if "--dry-run" in arguments:  # of several values the last counts: nothing undoes this one
        arguments = [*(word for word in arguments if word != "--dry-run"), "launch.dry_run=true"]
    arguments = _with_what_to_show(arguments)
    try:
        flags, for_hydra, checked = check_command(arguments, own_flags)
    except ConfigError as error:
        return show_error(error)

    if checked is not None and not checked.needs_hydra:
        return _end_of(task, checked)
    codes: list[int] = []
    swept: list[Job] = []
    typed, begun, start = sys.argv, False, time.time()

    def noted(composed: Composed) -> int:
        swept.append(composed.job)
        return task(composed)

    @hydra.main(version_base=VERSION_BASE, config_path=main_folder(), config_name=PRIMARY)
    def job(config: DictConfig) -> None:
        nonlocal begun
        begun = True
        sys.argv = typed  # reports quote the command as the user wrote it
        codes.append(_run_job(noted, flags, checked))
        if codes[-1] == StoppedOnRequest.exit_code:  # the rest of a sweep is not started
            raise SystemExit(StoppedOnRequest.exit_code)

    # What goes wrong in a job is a defect, and its whole traceback belongs in the report of it.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Overrides first: --info takes what follows it as its value.
    sys.argv = [typed[0], *for_hydra, *(a for a in arguments if a not in flags.overrides)]
    looking = flags.help or flags.cfg or flags.info or flags.hydra_help or flags.shell_completion
    try:
        _show(job) if looking else job()
    except SystemExit as ended:  # --help and the like, or a stop on request
        codes.append(_code_of(ended))
    except Exception as error:
        if begun or looking:
            raise
        codes.append(_refused_by_hydra(error, arguments))
    finally:
        sys.argv = typed
    if after_sweep is not None and len(swept) > 1:
        after_sweep(swept, start)
    if flags.wrong is not None:
        codes.append(show_error(flags.wrong))
    return max(codes, default=0)


def _with_what_to_show(arguments: list[str]) -> list[str]:
    """--cfg and --info that no word of theirs follows show the usual; argparse would take any word for theirs."""
    usual = {"--cfg": "job", "-c": "job", "--info": "all", "-i": "all"}
    found = []
    for argument, after in pairwise([*arguments, ""]):
        alone = argument in usual and (not after or "=" in after or after[0] in "-~+")
        option = "--cfg" if argument in ("--cfg", "-c") else "--info"
        found.append(f"{option}={usual[argument]}" if alone else argument)
    return found


def _show(look: Callable[[], None]) -> None:
    """What starts nothing ends with its reader (| head); logging would print a traceback for each line unread."""
    logging.raiseExceptions = False
    try:
        try:
            look()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        unheard(sys.stdout.fileno())
    finally:
        logging.raiseExceptions = True


def check_command(
    arguments: list[str], own_flags: Sequence[str] = ()
) -> tuple[argparse.Namespace, list[str], Composed | None]:
    """Hydra's own flags, the overrides as Hydra is to get them, and the job where there is one and not a sweep.

    flags.wrong: the problems of a job that is only looked at, which is shown all the same.
    Raises ConfigError with every problem.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False  # --config, which other tools have, would be said to stand for any of three
    flags, rest = parser.parse_known_intermixed_args(arguments)
    unknown = _unknown(arguments, rest)
    words = [a for place, a in enumerate(arguments) if not unknown.get(place - 1)]
    # argparse gives up on what follows an option that it does not know; an override is one wherever it stands.
    flags.overrides = [a for a in words if a in flags.overrides or (a in rest and not a.startswith("-"))]
    flags.wrong = None
    problem = _of_no_shell(flags.overrides) if flags.shell_completion else None if flags.hydra_help else _refused(flags)
    if problem is not None:
        raise ConfigError([problem])
    if flags.hydra_help or flags.shell_completion:
        return flags, flags.overrides, None
    loader = open_loader(flags.config_dir)
    multirun = flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides
    if multirun:
        collector.resume()  # what composing a job leaves would stay until the last one
    given = read_overrides(loader, flags.overrides, multirun)
    note_repeated(flags.overrides)
    given.problems += [_unknown_flag(arguments[place], word, own_flags) for place, word in unknown.items()]
    config_name = flags.config_name or PRIMARY
    if flags.help or flags.cfg or flags.info:  # only looking
        config, origins, problems = load(loader, given, config_name)
        if flags.resolve and config is not None:
            problems += resolve_all(config, origins | dict.fromkeys(given.values, COMMAND_LINE), job_number=0)[1]
        if problems:
            raise ConfigError(reading_order(problems, arguments))
        flags.wrong = None if flags.help or multirun else _wrong(loader, given, config_name)
        return flags, given.for_hydra, None
    if not multirun:
        return flags, given.for_hydra, compose_with(loader, given, config_name)
    if problems := given.problems + _wrong_in_sweep(loader, given, config_name):
        raise ConfigError(reading_order(problems, arguments))
    return flags, given.for_hydra, None


def _wrong_in_sweep(loader: Loader, given: Overrides, config_name: str) -> list[Problem]:
    """What is wrong with the jobs of a --multirun, each problem once."""
    found: list[Problem] = []
    run_dirs: list[str] = []
    for number, overrides in enumerate(sweep(loader, given.for_hydra)):
        try:
            run_dirs.append(compose_with(loader, read_overrides(loader, overrides), config_name, number).job.run_dir)
        except ConfigError as error:
            found += [problem for problem in error.problems if problem not in (*given.problems, *found)]
    if clash := next((d for d in run_dirs if d != "auto" and run_dirs.count(d) > 1), None):
        message = "several jobs of the sweep would write into this one folder"
        found.append(Problem("run_dir", clash, COMMAND_LINE, message, "run_dir=auto: each job then gets its own"))
    return found


def _wrong(loader: Loader, given: Overrides, config_name: str) -> ConfigError | None:
    """Why the job could not be started, but for values that are still missing."""
    try:
        compose_with(loader, given, config_name)
    except ConfigError as error:
        found = [problem for problem in error.problems if problem.message != NO_VALUE]
        return ConfigError(found) if found else None
    return None


def _run_job(task: Task, flags: argparse.Namespace, checked: Composed | None) -> int:
    settings = HydraConfig.get()
    swept = settings.mode == RunMode.MULTIRUN
    number = settings.job.num if swept else 0
    overrides = list(settings.overrides.task)
    if swept:
        print(f"\njob {number}: {' '.join(o.removeprefix('++') for o in overrides)}", flush=True)
    try:
        if checked is None or swept:
            loader = open_loader(flags.config_dir)
            checked = compose_with(loader, read_overrides(loader, overrides), flags.config_name or PRIMARY, number)
    except LoadmasterError as error:
        return show_error(error)
    return _end_of(task, checked)


def _end_of(task: Task, composed: Composed) -> int:
    try:
        return task(composed)
    except (LoadmasterError, StoppedOnRequest) as error:
        return show_error(error)


def _code_of(ended: SystemExit) -> int:
    """As Python itself takes it: anything but a number is a text for stderr."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _refused_by_hydra(error: Exception, arguments: list[str]) -> int:
    """Before a job begins Hydra works on its own settings alone, which loadmaster does not judge."""
    if isinstance(error, OSError):
        message = f"the record of a sweep cannot be written there: {error.filename}: {(error.strerror or '').lower()}"
        remedy = "start it in a folder that can be written, or hydra.sweep.dir=FOLDER"
        return show_error(ConfigError.of("hydra.sweep.dir", None, message, remedy, "default"))
    lines = str(error).splitlines() or [type(error).__name__]
    found = re.search(r"full_key: (\S+)", str(error))
    key = found[1] if found else "hydra"
    typed = found and any(a.lstrip("+").startswith(key) for a in arguments)
    origin = COMMAND_LINE if typed else "the recipe or command line"
    message = f"Hydra stops at it: {lines[0].partition(', set env var')[0]}"
    return show_error(ConfigError.of(key, None, message, "mend this setting of Hydra's own, or leave it out", origin))


def _refused(flags: argparse.Namespace) -> Problem | None:
    """Flags of Hydra's that are not taken here, or that it would itself refuse with a traceback."""
    if flags.config_path is not None:
        message, remedy = "would take the place of all that loadmaster ships", "--config-dir adds to it"
        return Problem("--config-path", flags.config_path, COMMAND_LINE, message, remedy)
    if flags.experimental_rerun is not None:
        message, remedy = "would start an earlier job over", "the same command goes on where its run stopped"
        return Problem("--experimental-rerun", flags.experimental_rerun, COMMAND_LINE, message, remedy)
    modes = [name for name in ("run", "multirun", "cfg", "info") if getattr(flags, name)]
    if len(modes) > 1:
        return Problem(f"--{modes[1]}", None, COMMAND_LINE, f"does not go with --{modes[0]}", "give one of the two")
    if flags.resolve and not (flags.cfg or flags.help):
        return Problem("--resolve", None, COMMAND_LINE, "is for --cfg and --help", "--cfg job --resolve")
    return None


def _of_no_shell(words: list[str]) -> Problem | None:
    """Hydra wants one of install, uninstall and query (the shell's own question), with a shell that it knows."""
    asked = [word.split("=") for word in words if word.partition("=")[0] in ("install", "uninstall", "query")]
    if len(asked) == 1 and asked[0][-1] in SHELLS and (asked[0][0] != "query" or "COMP_LINE" in os.environ):
        return None
    remedy = 'eval "$(python train.py --shell-completion install=bash)"; the shells are ' + ", ".join(SHELLS)
    message = "wants install=SHELL, or uninstall=SHELL"
    return Problem("--shell-completion", None, COMMAND_LINE, message, remedy)


def _unknown(arguments: list[str], rest: list[str]) -> dict[int, str]:
    """Places of the options that are not known, and the word behind each that is its value; empty where none is."""
    found = {}
    for place, (argument, after) in enumerate(pairwise([*arguments, ""])):
        if argument.startswith("-") and argument in rest:
            found[place] = value_behind(argument, after)
    return found


def _unknown_flag(argument: str, word: str, own_flags: Sequence[str]) -> Problem:
    """What to give in the place of an option `--name=value`, or `--name word`."""
    name, _, value = argument.lstrip("-").partition("=")
    value, typed = value or word, f"{argument} {word}".rstrip()
    known = [a for action in get_args_parser()._actions for a in action.option_strings if a.startswith("--")]
    flag = nearest(argument.partition("=")[0], ["--dry-run", *own_flags, *known], cutoff=0.75)
    remedy = flag or instead_of_option(name.replace("-", "_"), value)
    if re.fullmatch("conf(ig)?s?([-_]file)?", name):
        remedy = as_recipe(value) if value else "recipe=NAME"
    if f"--{name}" in OF_PLAN:
        remedy = f"loadmaster plan ... {typed}; no other command has it"
    return Problem(typed, None, COMMAND_LINE, "there is no such option", remedy)
