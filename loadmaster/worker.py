"""One rank of a world stage: `python -m loadmaster.worker STAGE RUN_DIR`, started by the lead for each local device.

The job and the plan are those of the run directory. What the stage gave, or the error that ended it, is left in
RUN_DIR/logs/rank-N.json for the lead; everything that ranks other than 0 print goes to RUN_DIR/logs/rank-N.log.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from loadmaster import collector

if __name__ == "__main__":  # before what takes long to import
    collector.pause()

from loadmaster.config.schema import Job
from loadmaster.config.validate import check
from loadmaster.ending import end_with, heed_no_more_requests
from loadmaster.errors import LoadmasterError, StoppedOnRequest, TrainingFailed
from loadmaster.files import disk_error, read_text, write_json
from loadmaster.preflight.plan import Plan
from loadmaster.streams import Output, settle_streams
from loadmaster.training.display import Display
from loadmaster.training.logs import log_to
from loadmaster.training.stop import StopSignal
from loadmaster.training.workers import Outcome, outcome_file
from loadmaster.training.world import join, leave
from loadmaster.world_stages import Materials, StageRun, device_type


def main(stage: str, run_dir: Path) -> int:
    settle_streams()
    die_with_the_lead()
    rank = int(os.environ["RANK"])
    stop = StopSignal()
    stop.last_words = lambda message: leave_word(run_dir, rank, Outcome(StoppedOnRequest.exit_code, message, stop=True))
    agreed = False
    try:
        stop.install()
        job, plan = read_job(run_dir), Plan.read(run_dir / "plan.json")
        stop.grace_s = job.launch.grace_s
        log_to(run_dir, rank, everything=rank > 0)
        outcome = _run(stage, job, plan, run_dir, stop)
    except StoppedOnRequest as error:
        agreed = error.agreed
        outcome = Outcome(error.exit_code, str(error), stop=not agreed)
    except LoadmasterError as error:
        outcome = Outcome(error.exit_code, str(error))
    except Exception as error:
        said = disk_error(error)
        if said is None:
            raise
        outcome = Outcome(said.exit_code, f"rank {rank}: {said}")
    heed_no_more_requests()  # the lead keeps them in mind
    leave_word(run_dir, rank, outcome)
    # What all agreed on is no failure of this process; else the first to go would take the others with it.
    return 0 if outcome.code == 0 or agreed else outcome.code


def _run(stage: str, job: Job, plan: Plan, run_dir: Path, stop: StopSignal) -> Outcome:
    world = join(device_type(plan, job.hardware.gpu))
    display = Display(Output() if world.lead else None)
    materials = Materials(job, display.echo)

    def ended(message: str) -> None:
        write_json(outcome_file(run_dir, world.rank), vars(Outcome(TrainingFailed.exit_code, message)))

    figures = StageRun(job, plan, run_dir, world, stop, display, materials, ended).run(stage)
    leave(world)
    return Outcome(0, "", figures, stop=stop.requested)


def leave_word(run_dir: Path, rank: int, outcome: Outcome) -> None:
    """For the lead; where even that cannot be written, for whoever reads the log."""
    try:
        write_json(outcome_file(run_dir, rank), vars(outcome))
    except OSError as error:
        print(f"{outcome.message} ({error})", file=sys.stderr, flush=True)


def read_job(run_dir: Path) -> Job:
    """The job that config.yaml of a run directory holds, which was checked when it was written."""
    resolved = yaml.safe_load(read_text(run_dir / "config.yaml"))
    return check(resolved, {}, {}).job


def die_with_the_lead() -> None:
    """Also where it was killed, and could tell nobody."""
    end_with(int(os.environ["LOADMASTER_LEAD"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
