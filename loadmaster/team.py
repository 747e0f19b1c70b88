"""Who runs a world stage: this process, workers that it starts, or the ranks that torchrun started beside it.

The lead, rank 0, goes through the pipeline; other ranks of a torchrun follow: they wait to be told of a stage, run it
with everybody, and end with the lead's exit code. The lead tells, so nobody waits for a lead that has failed.
"""

from __future__ import annotations

import atexit
import math
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadmaster import collector
from loadmaster.config.jobhash import job_hash
from loadmaster.config.schema import Job
from loadmaster.config.show import show_error
from loadmaster.errors import ConfigError, LoadmasterError, StoppedOnRequest
from loadmaster.preflight.plan import Plan
from loadmaster.training.display import Display
from loadmaster.training.logs import log_to
from loadmaster.training.ranks import is_member, torchrun_variables
from loadmaster.training.stop import StopSignal
from loadmaster.training.workers import run_stage
from loadmaster.world_stages import Materials, StageRun, device_type

if TYPE_CHECKING:
    from loadmaster.training.world import World

PATIENCE_S = 30 * 24 * 3600.0
"""How long followers wait for the lead, which exports meanwhile; a lead that is gone is noticed, see SILENCE_S."""
SILENCE_S = 60.0
"""A lead that shows no sign of life for so long, between stages, is gone."""


class Team:
    """The processes of this job as its lead, or a follower, sees them."""

    def __init__(self, world: World | None = None):
        self.world = world
        self._watching = ExitStack()
        if world is not None:
            import torch.distributed as dist

            from loadmaster.training.watchdog import Watchdog
            from loadmaster.training.world import JOIN_S, first_limit, wait_at_most

            self._line = dist.new_group(backend="gloo", timeout=first_limit(JOIN_S, PATIENCE_S))
            wait_at_most(PATIENCE_S, self._line)
            # Followers end with a lead that falls silent; the lead needs nobody for what it does alone.
            self._watch = self._watching.enter_context(Watchdog(world, None, math.inf, SILENCE_S, of=[0]))
            self._watch.resting = world.lead
            atexit.register(self._watching.close)  # also after an error of ours: its threads must not outlive Python
        self.settings = ""
        """Hash of the job that this very process was started with; the lead's is the one that is run."""
        self._together = True
        """False from the beginning of a stage to its end: whom it fails, it fails on every rank."""

    @classmethod
    def gather(cls, job: Job) -> Team:
        """Join the world that torchrun, Slurm or an MPI launcher made, if one did."""
        os.environ.update(torchrun_variables(os.environ))
        if not is_member():
            return cls()
        if "LOADMASTER_LEAD" in os.environ:
            from loadmaster.worker import die_with_the_lead

            die_with_the_lead()
        import torch

        from loadmaster.training.world import join

        team = cls(join("cpu" if job.hardware.gpu == "cpu" or not torch.cuda.is_available() else "cuda"))
        team.settings = job_hash(job)
        return team

    @property
    def follows(self) -> bool:
        return self.world is not None and not self.world.lead

    def run(
        self, stage: str, job: Job, plan: Plan, run_dir: Path, stop: StopSignal, display: Display, materials: Materials
    ) -> dict[str, Any]:
        """Run a stage in as many processes as the plan says; returns its figures."""
        self.refuse_too_few(plan)
        if self.world is None and plan.world_size > 1:
            collector.resume()
            return run_stage(stage, run_dir, plan.world_size, stop)
        import torch

        from loadmaster.training.world import World

        world = self.world or World(device=torch.device(device_type(plan, job.hardware.gpu)))
        if self.world is not None:
            self._tell((stage, job, plan, run_dir.resolve()))
            log_to(run_dir, world.rank)
        self._together = False
        figures = StageRun(job, plan, run_dir, world, stop, display, materials, settings=self.settings).run(stage)
        self._together = True
        return figures

    def refuse_too_few(self, plan: Plan) -> None:
        """Raises ConfigError for one process where the plan is for several machines."""
        if self.world is None and plan.hardware.nodes > 1:
            message = f"the plan is for {plan.hardware.nodes} machines and this is one process on one of them"
            remedy = "start it on every machine: python launch/torchrun.py train.py ... (docs/multi-gpu.md)"
            raise ConfigError.of("hardware.nodes", plan.hardware.nodes, message, remedy, "the plan (plan.json)")

    def follow(self, stop: StopSignal) -> int:
        """Run what the lead tells of, until it tells the exit code."""
        try:
            while True:
                stage, *told = self._tell(None)
                if stage == "end":
                    self._leave()
                    return told[0]
                job, plan, run_dir = told
                display = Display(None)
                log_to(run_dir, self.world.rank)
                materials = Materials(job, display.echo)
                self._watch.resting = True  # the stage has its own
                StageRun(job, plan, run_dir, self.world, stop, display, materials, settings=self.settings).run(stage)
                self._watch.resting = False
        except (LoadmasterError, StoppedOnRequest) as error:
            stop.requested = stop.requested or isinstance(error, StoppedOnRequest)
            return show_error(error)
        except RuntimeError as error:  # the line to the lead is cut: the watchdog finds out, and says, who is gone
            try:
                with self._watching:
                    raise error
            except LoadmasterError as explained:
                return explained.exit_code
        finally:
            self._watching.close()

    def end(self, code: int) -> int:
        """The lead's last word to its followers; returns `code`."""
        if self.world is not None and self._together:
            with suppress(RuntimeError):  # one that is gone by now has been missed by nobody
                self._tell(("end", code))
            self._leave()
        self._watching.close()
        return code

    def _leave(self) -> None:
        from loadmaster.training.world import leave

        self._watching.close()
        leave(self.world)

    def _tell(self, value: Any) -> Any:
        import torch
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._line, device=torch.device("cpu"))
        return box[0]
