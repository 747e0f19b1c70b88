"""Workers of this machine: the lead starts one process for each local rank, watches them, and ends them.

Torch's elastic agent starts and watches them, in this process (loadmaster.training.agent); how each ended it leaves in
a file, so that the user reads the error itself and gets its exit code.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadmaster.errors import ConfigError, DataError, LoadmasterError, StoppedOnRequest, TrainingFailed
from loadmaster.files import read_json
from loadmaster.training.agent import WorkerKilled, Workers, run_workers
from loadmaster.training.stop import MESSAGE, STARTED, StopSignal

LAST_LINES = 15


@dataclass
class Outcome:
    """How a rank's stage ended: an exit code of loadmaster.errors, its message, and the figures of a good end."""

    code: int
    message: str
    figures: dict[str, Any] = field(default_factory=dict)
    stop: bool = False
    """A stop was asked for, and not every rank could agree on it in time, or the stage was done already."""


def outcome_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.json"


def run_stage(stage: str, run_dir: Path, count: int, stop: StopSignal) -> dict[str, Any]:
    """Run a stage in `count` processes of this machine; returns rank 0's figures.

    Sets stop.requested where a stop was asked for when there was nothing left to stop.

    Raises what ended it: the workers' own LoadmasterError, StoppedOnRequest when all stopped together, or
    TrainingFailed with the last lines of the log of a worker that broke.
    """
    if stop.requested:  # asked before there was a worker to pass it on to
        raise StoppedOnRequest(stop.message)
    for rank in range(count):
        outcome_file(run_dir, rank).unlink(missing_ok=True)
    environment = {"LOADMASTER_LEAD": str(os.getpid()), STARTED: os.environ[STARTED]}
    failure: LoadmasterError | StoppedOnRequest | None = None
    asked = threading.Event()
    command = ["-m", "loadmaster.worker", stage, str(run_dir)]
    try:
        first = run_workers(Workers(count, command, environment=environment, on_request=asked.set))
    except (LoadmasterError, StoppedOnRequest) as error:
        failure, first = error, error.exit_code
    figures = _judge(run_dir, count, first, failure, stop)
    stop.requested = stop.requested or asked.is_set()  # the workers were done, and heard of it no more
    return figures


def _judge(
    run_dir: Path, count: int, first: int, failure: LoadmasterError | StoppedOnRequest | None, stop: StopSignal
) -> dict[str, Any]:
    """What became of a stage, from what its ranks left.

    first: exit code of the first that failed, who has the others ended; failure: what the agent says of a killed one.
    """
    outcomes: dict[int, Outcome] = {}
    for rank in range(count):
        if outcome_file(run_dir, rank).is_file():
            outcomes[rank] = Outcome(**read_json(outcome_file(run_dir, rank)))
    codes = {o.code for o in outcomes.values()}
    if len(outcomes) == count and codes == {0}:
        stop.requested = stop.requested or any(o.stop for o in outcomes.values())
        return outcomes[0].figures
    if first == StoppedOnRequest.exit_code:  # who was asked ended alone, and the others only miss it
        alone = [o.message for o in outcomes.values() if o.code == first and o.stop]
        raise StoppedOnRequest(next(iter(alone), str(failure or MESSAGE)).replace(MESSAGE, stop.message))
    failed = [o for o in outcomes.values() if o.code not in (0, StoppedOnRequest.exit_code)]
    if failed and not isinstance(failure, WorkerKilled):  # else the others only miss the one that was killed
        raise _error(failed[0])
    stopped = [o for o in outcomes.values() if o.code == StoppedOnRequest.exit_code]
    if stopped and len(outcomes) == count:
        raise StoppedOnRequest(stopped[0].message.replace(MESSAGE, stop.message))  # the limits are this process's
    silent = min(set(range(count)) - set(outcomes), default=0)
    broken = failure.rank if isinstance(failure, WorkerKilled) else silent
    log = run_dir / "logs" / f"rank-{broken}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
    what = str(failure) if failure else f"rank {broken} broke"
    raise TrainingFailed("\n".join([f"{what}; its log is {log}", *lines]))


def _error(outcome: Outcome) -> LoadmasterError:
    """The worker's error again, with the same message and exit code."""
    kinds = {ConfigError.exit_code: DataError, TrainingFailed.exit_code: TrainingFailed}
    return kinds.get(outcome.code, LoadmasterError)(outcome.message)
