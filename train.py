"""loadmaster's front door: `python train.py recipe=NAME key=value ...`.

Hydra composes conf/, recipes/ and the command line; the closed schema and the rules judge the result before
torch is imported; then the stages run: plan, train, evaluate, export, bundle. `--help` lists recipes and
fields, `--cfg job` prints the composed job, `--multirun` sweeps.

Exit codes: 0 done, 2 the configuration is wrong, 3 nothing fits, 4 training failed, 5 an export did not pass
verification, 75 stopped on request with a checkpoint saved (the same command resumes).
"""

from __future__ import annotations

import sys

from loadmaster import starting

if __name__ == "__main__":  # before what takes long to import
    starting.listen()
    starting.refuse_another_python()

from loadmaster import collector, hub

if __name__ == "__main__":
    collector.pause()
    hub.quieten()

from loadmaster.config.compose import Composed
from loadmaster.config.hydra_app import run_app
from loadmaster.config.schema import Job
from loadmaster.ending import ended
from loadmaster.streams import settle_streams


def train(composed: Composed) -> int:
    hub.settle_for(composed.job)
    from loadmaster.pipeline import run  # brings torch, so only once the job is known to be right

    return run(composed)


def compare(jobs: list[Job], start: float) -> None:
    from loadmaster.report.side_by_side import show_sweep

    show_sweep(jobs, start)


if __name__ == "__main__":
    settle_streams()
    sys.exit(ended(run_app(train, after_sweep=compare)))
