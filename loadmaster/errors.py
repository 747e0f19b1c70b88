"""Errors that a user can act on, each with the exit code that scripts rely on.

Every error raised for a user's mistake or a broken environment derives from `LoadmasterError`;
`pipeline.py` and `cli.py` print its message without a traceback and exit with its code.
A traceback therefore always means a defect in loadmaster itself.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from loadmaster.words import counted

IN_THE_JOB = "the job"
"""Origin of what is wrong with a field, where only the job is known and not what it was composed from."""


class LoadmasterError(Exception):
    """A sentence that says what is wrong, where it was set, and what would work."""

    exit_code = 4
    said = False
    """It is in this host's log already."""

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is: what __init__ was given is not what the sentence is, and it would be called with that."""
        return _as_it_was, (type(self), self.args, self.__dict__)


def _as_it_was(kind: type[LoadmasterError], args: tuple[Any, ...], state: dict[str, Any]) -> LoadmasterError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the configuration.

    key: dotted path of the field (`lora.rank`).
    value: what was given, or None when the key itself is the problem.
    origin: where it was set (`recipes/qlora_8b.yaml:12`, `command line`, `default`).
    message: what is wrong.
    remedy: what would work (nearest valid key, allowed values, the number that fits).
    """

    key: str
    value: object
    origin: str
    message: str
    remedy: str

    def __str__(self) -> str:
        given = "" if self.value is None else f" = {self.value!r}"
        return f"{self.key}{given}  ({self.origin})\n    {self.message}\n    fix: {self.remedy}"


class ConfigError(LoadmasterError):
    """The configuration is wrong; carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: list[Problem], begun: bool = False):
        """begun: found by a stage of a run, which has a directory by then."""
        self.problems, self.begun = problems, begun
        body = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        super().__init__(f"the configuration has {counted(len(problems), 'problem')}:\n{body}")

    @classmethod
    def of(cls, key: str, value: object, message: str, remedy: str, origin: str = IN_THE_JOB) -> ConfigError:
        """For one problem; see Problem."""
        return cls([Problem(key, value, origin, message, remedy)])


class DataError(LoadmasterError):
    """The data cannot be trained on as given; names file and line of every bad row."""

    exit_code = 2


class NotAFile(LoadmasterError, OSError):
    """A pipe, a device or a folder stands where a file is read."""

    def __init__(self, path: object):
        super().__init__(errno.EINVAL, "is no regular file", str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return NotAFile, (self.filename,), self.__dict__

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


class UsageError(LoadmasterError):
    """An option or a word of a command is wrong; nothing was asked of anybody."""

    exit_code = 2


class DoesNotFit(LoadmasterError):
    """No plan fits the hardware; plan.json with the alternatives has been written."""

    exit_code = 3


class TrainingFailed(LoadmasterError):
    exit_code = 4


class ExportRejected(LoadmasterError):
    """An export did not pass verification; nothing was published.

    figures: of each format that was scored, as `loadmaster.export.stage.export_all` returns them; {} where none was.
    """

    exit_code = 5

    def __init__(self, message: str, figures: dict[str, dict] | None = None):
        super().__init__(message)
        self.figures = figures or {}


class NotChecked(ExportRejected):
    """No server could be asked about an export here, which says nothing of the export."""

    exit_code = 4

    def __init__(self, why: str):
        super().__init__(f"not checked: {why}")


class StoppedOnRequest(BaseException):
    """SIGTERM, SIGINT or SIGHUP: a checkpoint is saved, the same command resumes.

    No Exception: it is raised wherever a signal finds the program, and a library must not take it for a failure of its
    own and go on.
    """

    exit_code = 75
    said = False

    def __init__(self, message: str, agreed: bool = False):
        """agreed: all ranks of the run stop here together."""
        super().__init__(message)
        self.agreed = agreed


class ProviderError(LoadmasterError):
    """The cloud provider refused, or could not be reached; says what was asked and what would work."""

    exit_code = 4
