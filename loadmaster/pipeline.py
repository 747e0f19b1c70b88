"""The five stages in order: plan, train, evaluate, export, bundle.

`pipeline.py` alone knows every stage. Each writes its output into the run directory and is skipped on a
re-run when what it was made from has not changed. report.html is written anew after each stage.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from loadmaster import collector, out_of_memory, packages, processors
from loadmaster.ahead import read_ahead
from loadmaster.config.compose import Composed
from loadmaster.config.jobhash import differing, job_hash, stage_inputs_hash
from loadmaster.config.schema import STAGES, Job
from loadmaster.config.shipped import resolve_path
from loadmaster.config.show import show_error
from loadmaster.config.validate import check
from loadmaster.data.first_rows import refuse_unfit
from loadmaster.dataset_size import dataset_tokens
from loadmaster.errors import ConfigError, DataError, DoesNotFit, LoadmasterError, StoppedOnRequest
from loadmaster.files import disk_error, is_full_disk, read_text, sha256_json, sha256_of_model, storable, write_text
from loadmaster.preflight import make_plan, print_plan
from loadmaster.preflight.config_json import find_config
from loadmaster.preflight.families import full_config
from loadmaster.preflight.hardware import detect_local
from loadmaster.preflight.plan import Plan
from loadmaster.rundir import RECORD, RunDir, file_fingerprint, is_at_work, object_in
from loadmaster.starting import number_cards_as_the_driver
from loadmaster.streams import Output
from loadmaster.tables import print_table
from loadmaster.team import Team
from loadmaster.training.display import Display
from loadmaster.training.stop import STARTED, StopSignal, deadline
from loadmaster.world_stages import Materials, chosen


def run(composed: Composed, console: Console | None = None) -> int:
    """Run the job up to `stop_after`; returns the exit code (loadmaster.errors says what each means)."""
    # OpenMP's threads otherwise spin while they wait: on a shared machine two of them ran a step 5 to 10 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    processors.settle()
    number_cards_as_the_driver()
    console = console or Output()
    if composed.job.launch.name != "local":
        return run_elsewhere(composed, console)
    os.environ[STARTED] = str(time.time())
    stop = StopSignal(grace_s=composed.job.launch.grace_s).install()
    team = Team()  # of this process alone, until it has joined others
    try:
        team = Team.gather(composed.job)
        if team.follows:
            collector.resume()
            return team.follow(stop)
        with composed.located():
            Pipeline(composed, console, stop, team).run()
    except (LoadmasterError, StoppedOnRequest) as error:
        stop.requested = stop.requested or isinstance(error, StoppedOnRequest)
        return team.end(show_error(error))
    except Exception as error:
        said = packages.explained(error) if isinstance(error, ModuleNotFoundError) else disk_error(error)
        if said is None:
            raise
        return team.end(show_error(said))
    finally:
        stop.leave_word()
        stop.uninstall()
    return team.end(0)


def run_elsewhere(composed: Composed, console: Console) -> int:
    """The same on a rented machine; returns the job's exit code."""
    from loadmaster.launch.job import launch_job

    collector.resume()
    try:
        with composed.located():
            return launch_job(composed, console, tokens=dataset_tokens(composed.job))
    except (LoadmasterError, StoppedOnRequest) as error:
        return show_error(error)
    except OSError as error:  # of a file here: the log and the record of a launch lie in runs/
        if error.filename is None and not is_full_disk(error):
            raise
        return show_error(LoadmasterError(f"{error}; start it in a folder that can be written, on a disk with room"))


class Pipeline:
    """One job's way through the stages. What several stages need is made once, when first asked for."""

    def __init__(self, composed: Composed, console: Console, stop: StopSignal, team: Team):
        self.composed = composed
        self.job: Job = composed.job
        self.console = console
        self.stop, self.team = stop, team
        self.materials = Materials(self.job, self.echo)
        identity = sha256_json([job_hash(self.job), data_identity(self.job)])
        self.run_dir = RunDir.choose(self.job.run_dir, self.job.recipe, identity, differing=self._differing)

    def _differing(self, path: Path) -> list[str] | None:
        """In what the job of another run is not this one; None where its config.yaml cannot be read."""
        try:
            resolved = yaml.safe_load(read_text(path / "config.yaml"))
            return differing(self.job, check(resolved, {}, {}).job)
        except (OSError, ValueError, yaml.YAMLError, LoadmasterError):
            return None

    def run(self) -> None:
        if self.job.stop_after == "plan" and is_at_work(self.run_dir.path):
            self._show_plan(planned(self.job), f"this plan is not kept: another process works in {self.run_dir.path}")
            return
        if self._is_another_plan():
            kept = f"this plan is not kept: what {self.run_dir.path} holds is trained by the plan that is there"
            self._show_plan(planned(self.job), kept)
            return
        with self.run_dir.locked():
            if self.run_dir.is_damaged:
                file = self.run_dir.path / RECORD
                self.echo(f"{file} is damaged: all stages run again, training from its checkpoint")
            self.run_dir.claim()
            write_text(self.run_dir.path / "config.yaml", yaml.safe_dump(self.composed.resolved, sort_keys=False))
            if mended := self.run_dir.mend_result():
                self.echo(f"warning: {mended}")
            inputs = self.run_dir.identity
            for stage in STAGES:
                stage_inputs = sha256_json([inputs, self._stage_inputs(stage)])
                self._stage(stage, stage_inputs)
                if stage == self.job.stop_after:
                    break
                if stage == "plan":
                    self.stop.limit(self._deadline())
                if self.stop.requested:
                    raise StoppedOnRequest(f"{self.stop.message} (after the stage {stage})")
                # What the plan chose counts from here on, and not on how many GPUs of which kind it did.
                inputs = sha256_json([inputs, chosen(self.plan)]) if stage == "plan" else stage_inputs
            if self.job.stop_after != "plan" and "LOADMASTER_NODE" not in os.environ:  # a launch goes on at home
                self._say_what_is_next()

    def _is_another_plan(self) -> bool:
        """Whether a plan alone is asked for, with other settings than those by which this run was trained."""
        if self.job.stop_after != "plan" or not self.run_dir.begun or not self._is_whole("plan"):
            return False
        return not self.run_dir.is_done("plan", sha256_json([self.run_dir.identity, self._stage_inputs("plan")]))

    def _stage_inputs(self, stage: str) -> Any:
        hardware = str(detect_local()) if stage == "plan" and self.job.hardware.gpu == "local" else None
        return [stage_inputs_hash(self.job, stage), hardware]

    def _stage(self, stage: str, inputs: str) -> None:
        asked = stage == self.job.stop_after == "plan" and not self.run_dir.begun  # prices and models of cost change
        if self.run_dir.is_done(stage, inputs) and self._is_whole(stage) and not asked:
            if stage == "plan":
                self._say_where()
            self.echo(f"{stage}: unchanged, skipped")
            if stage == self.job.stop_after:
                self._write_report()
            if stage == self.job.stop_after == "plan":
                print_plan(self.plan, self.console)
            return
        if stage == "train":
            self._refuse_other_hardware()
            self.team.refuse_too_few(self.plan)
        if stage != "plan":
            self.echo(f"{stage}: started")
        self.run_dir.forget(stage)
        start = time.perf_counter()
        stages: dict[str, Callable[[], None]] = {
            "plan": self.make_plan,
            "train": self.train,
            "evaluate": lambda: self.in_world("evaluate"),
            "export": self.export,
            "bundle": self.bundle,
        }
        try:
            with self.composed.located(begun=True):
                stages[stage]()
            seconds = time.perf_counter() - start
            self.run_dir.mark_done(stage, inputs, seconds)
            self.echo(f"{stage}: done in {seconds:.1f} s")
        except BaseException as error:
            figures: dict[str, Any] = {}
            if isinstance(error, LoadmasterError):
                planned = stage != "plan" or self._is_whole("plan")
                if isinstance(error, ConfigError | DataError) and not planned and self.run_dir.discard():
                    error.begun = False
                else:
                    figures = {"failure": {"stage": stage, "message": str(error)}}
            with suppress(OSError):  # on a disk that is full; the error itself says what could not be kept
                if self.run_dir.path.is_dir():
                    self.run_dir.mark_unfinished(stage, time.perf_counter() - start)
                self._sum_up(**figures)
            raise
        self._sum_up(failure=None)

    def _sum_up(self, **figures: Any) -> None:
        """result.json and report.html as the stages that are done leave them."""
        if self.run_dir.path.is_dir():
            self.run_dir.update_result(**figures, wall_seconds=self.run_dir.seconds_by_stage())
            self._write_report()

    def _is_whole(self, stage: str) -> bool:
        """Whether what the stage wrote is still there; exports are compared with their manifests, files of
        trained weights are as long as they say, and the others are read."""
        folder = self.run_dir.path
        try:
            if stage == "plan":
                return bool(Plan.read(folder / "plan.json"))
            if stage == "export":
                from loadmaster.export.manifest import verify_manifest

                return not any(verify_manifest(folder / "export" / name) for name in self.job.export.formats)
        except LoadmasterError:
            return False
        if stage == "train":
            return self.run_dir.holds_trained()
        return bool(object_in(folder / {"evaluate": "eval.json", "bundle": "bundle/manifest.json"}[stage]))

    def echo(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _say_where(self) -> None:
        """Once the job can be planned: a refusal leaves no new folder behind."""
        self.echo(f"run directory: {self.run_dir.path}")

    def _say_what_is_next(self) -> None:
        folder = self.run_dir.path
        self.echo(f"report: {folder / 'report.html'}")
        if self.job.stop_after != "bundle":
            run, left = shlex.quote(str(folder)), STAGES[STAGES.index(self.job.stop_after) + 1 :]
            self.echo(f"next: loadmaster chat {run} (talks to what was trained)")
            self.echo(f"next: loadmaster bundle {run} (goes on with {', '.join(left)}: what an endpoint needs)")
            return
        from loadmaster.endpoint.bundle import next_step

        self.echo(next_step(folder))

    # ------------------------------------------------------------------ stages

    def make_plan(self) -> None:
        plan = planned(self.job)
        self._say_where()
        plan.write(self.run_dir.path / "plan.json")
        near = "what came nearest, and what would fit, is" if plan.alternatives else "what came nearest is"
        if not plan.has_figures:
            near = "what would fit is" if plan.alternatives else "this is"
        self._show_plan(plan, "" if plan.fits else f"{near} in {self.run_dir.path / 'plan.json'}")
        free = shutil.disk_usage(self.run_dir.path).free / 2**30
        if self.job.stop_after != "plan" and free < plan.disk_gib:
            self.echo(
                f"warning: {free:.1f} GiB are free in {self.run_dir.path}, and base model, checkpoints and exports of "
                f"this run take up to {plan.disk_gib:.1f}; set run_dir to a larger disk, or checkpoint.keep_last=1"
            )

    def _show_plan(self, plan: Plan, kept: str) -> None:
        """kept: where it is, if that is to be said. Raises DoesNotFit, which says it then."""
        print_plan(plan, self.console)
        if not plan.fits:
            without = self.job.hardware.gpu == "local" and plan.hardware.gpu == "cpu"
            here = " on this machine, which has no GPU, or no driver that shows it" if without else ""
            why = self.composed.sourced(plan.refused) if plan.refused else f"nothing fits{here}"
            raise DoesNotFit(f"{why}; {kept}")
        if kept:
            self.echo(kept)

    def train(self) -> None:
        self._refuse_another_model()
        read_ahead(self.materials.base_folder)  # before what takes long to import
        from loadmaster.export import refuse_unholdable

        refuse_unholdable(self.job, self.materials.base_folder, self.plan.method)
        self.in_world("train")
        trained = self.run_dir.path / self.plan.trained
        self.run_dir.update_result(trained_sha256=sha256_of_model(trained))

    def in_world(self, stage: str) -> None:
        """Run a stage on every process of the plan: here, in workers of our own, or in those that torchrun started."""
        figures = self.team.run(
            stage, self.job, self.plan, self.run_dir.path, self.stop, Display(self.console), self.materials
        )
        self.run_dir.update_result(**figures)

    def export(self) -> None:
        from loadmaster.errors import ExportRejected
        from loadmaster.export import report_table, stage

        made = self.materials
        try:
            with out_of_memory.explained("export"):
                exports = stage.export_all(
                    self.job, self.plan, self.run_dir.path, made.base_folder, made.prepared, made.tokenizer, self.echo
                )
        except ExportRejected as error:
            # "exports" stays: an earlier export is still in its place.
            self.run_dir.update_result(rejected_exports=storable(error.figures))
            if error.figures:
                print_table(report_table(error.figures), self.console)
            raise
        self.run_dir.update_result(exports=exports, rejected_exports=None)
        print_table(report_table(exports), self.console)

    def bundle(self) -> None:
        from loadmaster.endpoint.bundle import write_bundle

        self.echo(f"  {write_bundle(self.run_dir.path, self.job)}")

    # ------------------------------------------------- what several stages need

    @cached_property
    def plan(self) -> Plan:
        return Plan.read(self.run_dir.path / "plan.json")

    def _refuse_other_hardware(self) -> None:
        """A plan for rented hardware is not trained on whatever this machine happens to have."""
        if self.job.hardware.gpu in ("local", "cpu"):
            return
        here = detect_local()
        if here.gpu != self.plan.hardware.gpu or here.count < self.plan.hardware.count:
            wanted = f"{self.plan.hardware.count}x {self.plan.hardware.gpu}"
            message = f"the plan is for it, and this machine has {'no GPU' if here.is_cpu else here.label}"
            remedy = "hardware=local to train here, launch=runpod, ssh or slurm to train where there is one, or "
            raise ConfigError.of("hardware", wanted, message, f"{remedy}stop_after=plan to plan only")

    def _refuse_another_model(self) -> None:
        """What is trained is what was planned: a repository may have changed, a package may carry something else."""
        folder, planned = self.materials.base_folder, self.plan.model
        config, _ = find_config(replace(self.job.model, path=str(folder)))
        sizes = {"num_hidden_layers": planned.layers, "hidden_size": planned.hidden_size}
        held = {key: full_config(config)[0].get(key) for key in sizes}
        if held != sizes:
            message = f"the model in {folder} has {_said(held)}, and the plan was made for {_said(sizes)}"
            remedy = "model.name of the model that is meant, and model.path=null model.package=null unless they hold it"
            raise ConfigError.of("model.name", self.job.model.name, message, remedy)

    def _deadline(self) -> float | None:
        """When the limits of time and money are reached. Raises ConfigError for one that cannot be watched."""
        price = self.plan.price
        if self.job.launch.max_usd is not None and price is None:
            message = f"nobody knows what an hour of {self.plan.hardware.gpu} costs here"
            remedy = "plan.prices_usd_per_hour={GPU: DOLLARS} with your price, or launch.max_hours"
            remedy = "launch.max_hours" if self.plan.hardware.gpu == "cpu" else remedy
            raise ConfigError.of("launch.max_usd", self.job.launch.max_usd, message, remedy)
        return deadline(self.job, None if price is None else price["usd_per_hour"])

    def _write_report(self) -> None:
        from loadmaster.report import write_report

        write_report(self.run_dir.path, command=command_line(sys.argv))


def _said(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sizes.items())


def planned(job: Job) -> Plan:
    """The job's plan, with the trace of a step where plan.trace asks for it.

    Raises DataError where the data cannot be what the job trains on, as far as that is soon seen.
    """
    tokens = dataset_tokens(job)
    refuse_unfit(job)
    if not job.plan.trace:
        return make_plan(job, tokens, with_elsewhere=True)
    from loadmaster.training.traced_plan import traced

    return traced(job, lambda share: make_plan(job, tokens, with_elsewhere=True, card_share=share))


def command_line(argv: list[str]) -> str:
    """The command as a person would type it again."""
    name = Path(argv[0]).name
    return shlex.join([*(["python"] if name.endswith(".py") else []), name, *argv[1:]])


def data_identity(job: Job) -> list[str]:
    """What pins the training data: contents of local files, or the name of a Hub dataset, and those of a template."""
    paths = job.data.paths
    paths += [path for path in (job.data.validation, job.model.chat_template) if isinstance(path, str)]
    resolved = [resolve_path(path) for path in paths]
    return [file_fingerprint(Path(p)) if os.path.exists(p) else f"hub:{p}" for p in resolved]
