"""The five stages in order: plan, train, evaluate, export, bundle.

`pipeline.py` alone knows every stage. Each writes its output into the run directory and is skipped on a
re-run when what it was made from has not changed. report.html is written anew after each stage.
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from loadmaster.config.compose import Composed
from loadmaster.config.jobhash import job_hash, stage_inputs_hash
from loadmaster.config.schema import STAGES, Job
from loadmaster.config.shipped import resolve_path
from loadmaster.config.show import show_error
from loadmaster.errors import ConfigError, DoesNotFit, LoadmasterError, Problem, StoppedOnRequest
from loadmaster.files import publish_folder, sha256_json, write_json, write_text
from loadmaster.preflight import estimate_tokens, make_plan, print_plan
from loadmaster.preflight.hardware import detect_local
from loadmaster.preflight.plan import Plan
from loadmaster.rundir import RunDir, file_fingerprint
from loadmaster.training.stop import StopSignal

if TYPE_CHECKING:
    from torch import nn


def run(composed: Composed, console: Console | None = None) -> int:
    """Run the job up to `stop_after`; returns the exit code (loadmaster.errors says what each means)."""
    # OpenMP's threads otherwise spin while they wait: on a shared machine two of them ran a step 5 to 10 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    console = console or Console()
    if composed.job.launch.name != "local":
        return run_elsewhere(composed, console)
    stop = StopSignal().install()
    try:
        Pipeline(composed, console, stop).run()
    except LoadmasterError as error:
        show_error(error)
        return error.exit_code
    except OSError as error:  # a full or read-only disk, a folder that is a file
        show_error(LoadmasterError(f"{error}; set run_dir to a folder that can be written, on a disk with room"))
        return LoadmasterError.exit_code
    finally:
        stop.uninstall()
    return 0


def run_elsewhere(composed: Composed, console: Console) -> int:
    """The same on a rented machine; returns the job's exit code."""
    from loadmaster.launch import launch_job

    try:
        return launch_job(composed, console, tokens=dataset_tokens(composed.job))
    except LoadmasterError as error:
        show_error(error)
        return error.exit_code


class Pipeline:
    """One job's way through the stages. What several stages need is made once, when first asked for."""

    def __init__(self, composed: Composed, console: Console, stop: StopSignal):
        self.composed = composed
        self.job: Job = composed.job
        self.console = console
        self.stop = stop
        identity = sha256_json([job_hash(self.job), data_identity(self.job)])
        self.run_dir = RunDir.choose(self.job.run_dir, self.job.recipe, identity)

    def run(self) -> None:
        with self.run_dir.locked():
            self.run_dir.claim()
            write_text(self.run_dir.path / "config.yaml", yaml.safe_dump(self.composed.resolved, sort_keys=False))
            self.echo(f"run directory: {self.run_dir.path}")
            inputs = self.run_dir.identity
            for stage in STAGES:
                inputs = sha256_json([inputs, self._stage_inputs(stage)])
                self._stage(stage, inputs)
                if stage == self.job.stop_after:
                    break

    def _stage_inputs(self, stage: str) -> Any:
        hardware = str(detect_local()) if stage == "plan" and self.job.hardware.gpu == "local" else None
        return [stage_inputs_hash(self.job, stage), hardware]

    def _stage(self, stage: str, inputs: str) -> None:
        if self.run_dir.is_done(stage, inputs) and self._is_whole(stage):
            self.echo(f"{stage}: unchanged, skipped")
            return
        self.echo(f"{stage}: started")
        start = time.perf_counter()
        stages: dict[str, Callable[[], None]] = {
            "plan": self.make_plan,
            "train": self.train,
            "evaluate": self.evaluate,
            "export": self.export,
            "bundle": self.bundle,
        }
        try:
            stages[stage]()
            seconds = time.perf_counter() - start
            self.run_dir.mark_done(stage, inputs, seconds)
            self.run_dir.update_result(failure=None)
            self.echo(f"{stage}: done in {seconds:.1f} s")
        except StoppedOnRequest:
            raise
        except LoadmasterError as error:
            self.run_dir.update_result(failure={"stage": stage, "message": str(error)})
            raise
        finally:
            self.run_dir.update_result(wall_seconds=self.run_dir.seconds_by_stage())
            self._write_report()

    def _is_whole(self, stage: str) -> bool:
        """Whether what the stage wrote is still there; exports are compared with their manifests."""
        folder = self.run_dir.path
        if stage == "export":
            from loadmaster.export.manifest import verify_manifest

            try:
                return not any(verify_manifest(folder / "export" / name) for name in self.job.export.formats)
            except LoadmasterError:
                return False
        if stage == "train":
            return self.run_dir.trained is not None and any(self.run_dir.trained.glob("*.safetensors"))
        return (
            folder / {"plan": "plan.json", "evaluate": "eval.json", "bundle": "bundle/manifest.json"}[stage]
        ).is_file()

    def echo(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    # ------------------------------------------------------------------ stages

    def make_plan(self) -> None:
        plan = make_plan(self.job, dataset_tokens(self.job))
        if self.job.plan.trace:
            from loadmaster.training.trace import trace_plan

            plan = replace(plan, trace=trace_plan(self.job, plan))
        plan.write(self.run_dir.path / "plan.json")
        print_plan(plan, self.console)
        if not plan.fits:
            raise DoesNotFit(
                f"nothing fits; what came nearest, and what would fit, is in {self.run_dir.path / 'plan.json'}"
            )

    def train(self) -> None:
        from loadmaster.models.adapters import save_trained
        from loadmaster.training.display import Display
        from loadmaster.training.loop import train

        self._refuse_other_hardware()
        model, outcome = train(
            self.job,
            self.plan,
            self.prepared,
            self.tokenizer,
            self.base_folder,
            self.run_dir.path,
            self._training_hash(),
            self._held_out,
            self.stop,
            Display(self.console),
        )
        name = "model" if self.plan.method == "full" else "adapter"
        with publish_folder(self.run_dir.path / name) as partial:
            save_trained(model, partial)
            if name == "model":
                self.tokenizer.save_pretrained(partial)
        self.run_dir.update_result(
            **outcome.peaks,
            predicted_gib=self.plan.memory_gib.total,
            predicted_peaks_gib=asdict(self.plan.peak_gib) if self.plan.peak_gib else None,
            rehearsal_peak_allocated_gib=outcome.rehearsal.peak_allocated_gib,
            tokens_per_second=outcome.tokens_per_second,
            trained_tokens_per_second=outcome.trained_tokens_per_second,
            mfu=model_flops_utilisation(self.plan, outcome.tokens_per_second),
            steps=outcome.steps,
            train_loss=outcome.train_loss,
            eval_loss=outcome.eval_loss,
            data=self.prepared.summary,
        )

    def evaluate(self) -> None:
        from loadmaster.models.load import load_base, load_trained

        trained = self._load(load_trained, self.base_folder, self.run_dir.trained)
        after = self._evaluate_model(trained)
        if hasattr(trained, "disable_adapter"):
            with trained.disable_adapter():
                before = self._evaluate_model(trained)
        else:
            del trained
            gc.collect()
            before = self._evaluate_model(self._load(load_base, self.base_folder))
        write_json(self.run_dir.path / "eval.json", {"before": before, "after": after})
        for part in after:
            self.echo(f"  {part}: {_headline(before[part])} before, {_headline(after[part])} after")
        self.run_dir.update_result(eval_loss=after.get("held_out", {}).get("loss", None))

    def export(self) -> None:
        from loadmaster.export import export_all, report_table

        exports = export_all(
            self.job, self.plan, self.run_dir.path, self.base_folder, self.prepared, self.tokenizer, self.echo
        )
        self.run_dir.update_result(exports=exports)
        self.console.print(report_table(exports))

    def bundle(self) -> None:
        from loadmaster.endpoint.bundle import write_bundle

        self.echo(f"  {write_bundle(self.run_dir.path, self.job)}")

    # ------------------------------------------------- what several stages need

    @cached_property
    def plan(self) -> Plan:
        return Plan.read(self.run_dir.path / "plan.json")

    @cached_property
    def base_folder(self) -> Path:
        from loadmaster.models.resolve import resolve_base

        return resolve_base(self.job.model)

    @cached_property
    def tokenizer(self) -> Any:
        from loadmaster.models.load import load_tokenizer

        return load_tokenizer(self.base_folder)

    @cached_property
    def prepared(self) -> Any:
        from loadmaster.data import describe, prepare

        prepared = prepare(self.job, self.tokenizer)
        self.echo(describe(prepared.summary))
        return prepared

    def _training_hash(self) -> str:
        return sha256_json([job_hash(self.job), self.prepared.train.fingerprint])

    def _load(self, loader: Callable[..., nn.Module], *folders: Path) -> nn.Module:
        from loadmaster.models.load import DTYPES

        device = "cpu" if self.plan.hardware.gpu == "cpu" else "cuda"
        return loader(*folders, DTYPES[self.plan.precision], device, nf4=self.plan.method == "qlora")

    def _held_out(self, model: nn.Module) -> dict[str, float]:
        from loadmaster.evaluation import held_out

        device = next(model.parameters()).device
        return held_out(
            model, self.prepared.validation, self.tokenizer.pad_token_id, self.plan.micro_batch_size, device
        )

    def _evaluate_model(self, model: nn.Module) -> dict[str, Any]:
        from loadmaster.evaluation import run_task

        figures: dict[str, Any] = {}
        if self.prepared.validation is not None:
            figures["held_out"] = self._held_out(model)
        if self.job.evaluation.task != "none":
            figures["task"] = run_task(
                model, self.tokenizer, self.prepared.validation_conversations, self.job.evaluation
            )
        return figures

    def _refuse_other_hardware(self) -> None:
        """A plan for rented hardware is not trained on whatever this machine happens to have."""
        if self.job.hardware.gpu in ("local", "cpu"):
            return
        here = detect_local()
        if here.gpu != self.plan.hardware.gpu or here.count < self.plan.hardware.count:
            wanted = f"{self.plan.hardware.count}x {self.plan.hardware.gpu}"
            raise ConfigError(
                [
                    Problem(
                        "hardware",
                        wanted,
                        "recipe or command line",
                        f"this machine has {here.count}x {here.gpu}",
                        "hardware=local to train here, or stop_after=plan to plan only",
                    )
                ]
            )

    def _write_report(self) -> None:
        from loadmaster.report import write_report

        write_report(self.run_dir.path, command=command_line(sys.argv))


def command_line(argv: list[str]) -> str:
    """The command as a person would type it again."""
    name = Path(argv[0]).name
    return shlex.join([*(["python"] if name.endswith(".py") else []), name, *argv[1:]])


def data_identity(job: Job) -> list[str]:
    """What pins the training data: contents of local files, or the name of a Hub dataset."""
    paths = [job.data.path] if isinstance(job.data.path, str) else list(job.data.path)
    if isinstance(job.data.validation, str):
        paths.append(job.data.validation)
    resolved = [os.path.expanduser(resolve_path(path)) for path in paths]
    return [file_fingerprint(Path(p)) if Path(p).exists() else f"hub:{p}" for p in resolved]


def dataset_tokens(job: Job) -> int | None:
    """Tokens of an epoch, estimated from the size of the files; None for a Hub dataset."""
    paths = [job.data.path] if isinstance(job.data.path, str) else list(job.data.path)
    found = [Path(resolve_path(path)).expanduser() for path in paths]
    if not all(path.exists() for path in found):
        return None
    files = [file for path in found for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return estimate_tokens({file.name: file.stat().st_size for file in files})


def model_flops_utilisation(plan: Plan, tokens_per_second: float) -> float | None:
    """Share of the GPUs' dense peak that the model's own FLOPs take; None on a CPU."""
    from loadmaster.preflight.speed import model_flops_per_token, peak_flops

    if plan.hardware.gpu == "cpu":
        return None
    return tokens_per_second * model_flops_per_token(plan) / (peak_flops(plan) * plan.world_size)


def _headline(figures: dict[str, Any]) -> str:
    if "perplexity" in figures:
        return f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}"
    return f"{figures['metric']:.1%} right"
