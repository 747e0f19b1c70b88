"""A run directory among the words of a stage command: with its settings the command goes on, words behind it change
them."""

from __future__ import annotations

import os
import shlex
from itertools import pairwise
from pathlib import Path

from loadmaster.config.compose import read_settings
from loadmaster.config.hydra_sources import GROUP
from loadmaster.config.overrides import assigned, note_repeated
from loadmaster.config.shipped import local_path, shipped_folder
from loadmaster.errors import UsageError
from loadmaster.rundir import LAUNCH_RECORD, RECORD, newest_in

SETTINGS = "config"
"""Name of the file in a run directory that holds its settings, as Hydra's --config-name has it."""
SUCH_AS = "such as runs/smoke/<date-time>"
WITH_A_WORD = ("--config-dir", "-cd", "--config-name", "-cn", "--cfg", "-c", "--info", "-i", "--package", "-p")
"""Options of train.py that the next word is the value of."""
ITS_OWN = WITH_A_WORD[:4]
"""Of those, the ones that say which settings are laid over which; a run's are."""
PATHS = ("data.path", "data.validation", "model.path", "model.chat_template")
"""Fields of paths, which in a run count from where it was started, and on a command line from where that is typed."""


def run_and_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """(the run directory among the words, the overrides over its settings); None, and the words, where there is none.

    Raises UsageError where it is none to go on in, or where a word does not go with it.
    """
    place = place_of_run(words)
    if place is None:
        return None, words
    typed, others = words[place], words[:place] + words[place + 1 :]
    run = checked_run(Path(typed).expanduser()).resolve()
    for word in others:
        key, _, value = word.lstrip("+").partition("=")
        if key == GROUP or key in ITS_OWN:
            raise UsageError(f"{typed} {word}: a run has its own settings; give one of the two")
        if key in ("launch", "launch.name") and value != "local":
            raise UsageError(
                f"{typed} {word}: a run goes on where it lies; leave {word} out, or begin one on other machines with "
                f"recipe=NAME and {word}"
            )
    read_settings(run / f"{SETTINGS}.yaml")
    note_repeated([word for word in others if is_group_choice(word)])
    return run, over_run([assigned("run_dir", str(run)), *others])


def place_of_run(words: list[str]) -> int | None:
    """Where among the words a run directory stands: a folder's name, no setting, no option and no value of one."""
    for place, (before, word) in enumerate(pairwise(["", *words])):
        is_setting = word[:1] in ("", *"-+") or (word.startswith("~") and not word.startswith("~/"))
        if "=" in word:
            is_setting |= "/" not in word.partition("=")[0] or not os.path.isdir(word)
        if not is_setting and before not in WITH_A_WORD and ("/" in word or os.path.isdir(word)):
            return place
    return None


def checked_run(run: Path) -> Path:
    """`run`. Raises UsageError where it is no run directory, or its run lies elsewhere."""
    if os.path.isfile(run / LAUNCH_RECORD):
        raise UsageError(
            f"{run} is the folder of a launch, whose run lies where it ran: the command of the launch, given again, "
            "goes on there"
        )
    if os.path.isfile(run / f"{SETTINGS}.yaml"):
        return run
    for whole in run.resolve().parents[:2]:
        if os.path.lexists(run) and all(os.path.isfile(whole / name) for name in (RECORD, f"{SETTINGS}.yaml")):
            raise UsageError(f"{run} is a part of a run: give the run directory, {whole}")
    if not os.path.isdir(run):
        what = "is a file" if os.path.exists(run) else "there is no such folder"
        raise UsageError(f"{run}: {what}; give a run directory, {SUCH_AS}, or settings as key=value")
    newest = newest_in(run, launched=False)
    give = f"one of those in it, the newest is {newest}" if newest else f"one, {SUCH_AS}"
    raise UsageError(f"{run} is no run directory: give {give}")


def nothing_given(stage: str, newest: Path | None) -> str:
    """What to give, where nothing was; newest: a run that is here."""
    run = f"loadmaster {stage} {shlex.quote(str(newest)) if newest else 'RUN'}"
    what = "the newest run here" if newest else f"a run directory, {SUCH_AS}"
    return f"{stage} what? {run} goes on with {what}; loadmaster {stage} recipe=smoke begins the small job"


def is_group_choice(word: str) -> bool:
    key, _, value = word.lstrip("+").partition("=")
    return key not in ("", GROUP) and (shipped_folder("conf") / key).is_dir() and value[:1] not in ("", "{")


def over_run(words: list[str]) -> list[str]:
    """Words that follow a run: a group's file is laid over its settings, which no file of that group is behind. The
    last of each group: of two files Hydra takes neither there."""
    last = {word.lstrip("+").partition("=")[0]: place for place, word in enumerate(words) if is_group_choice(word)}
    chosen = {place: f"+{words[place].lstrip('+')}" for place in last.values()}
    return [chosen.get(place, word) for place, word in enumerate(words) if place in chosen or not is_group_choice(word)]


def from_elsewhere(word: str, here: Path, folder: Path) -> str:
    """A word typed in `here` for a run whose paths count from `folder`: what it names in `here` by a relative path is
    named by the whole one."""
    key, _, value = word.lstrip("+").partition("=")
    if key not in PATHS or not value or set(value) & set("\"'\\${},"):
        return word
    named, there = here / local_path(value), folder / local_path(value)
    if not os.path.exists(named) or (os.path.exists(there) and os.path.samefile(named, there)):
        return word
    return assigned(key, os.path.abspath(named))
