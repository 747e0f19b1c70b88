"""The two stages that all processes of a world run together: train and evaluate.

Plan, export and bundle are the lead's alone; it starts the others for these two, or finds them started. What a stage
gives back goes from rank 0 into result.json.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadmaster import collector, out_of_memory, packages
from loadmaster.config.jobhash import job_hash
from loadmaster.config.schema import Job
from loadmaster.errors import ConfigError, DataError, LoadmasterError, StoppedOnRequest
from loadmaster.files import publish_folder, sha256_json, storable, write_json
from loadmaster.preflight.plan import Plan
from loadmaster.training.display import Display
from loadmaster.training.stop import StopSignal
from loadmaster.words import counted

if TYPE_CHECKING:
    from loadmaster.training.watchdog import Watchdog
    from loadmaster.training.world import World


class Materials:
    """What stages need of a job besides its plan: base model, tokenizer and data, each made when first asked for."""

    def __init__(self, job: Job, echo: Callable[[str], None]):
        self.job, self._echo = job, echo

    @cached_property
    def base_folder(self) -> Path:
        from loadmaster.models.resolve import resolve_base

        return resolve_base(self.job.model)

    @cached_property
    def tokenizer(self) -> Any:
        from loadmaster.models.tokenizer import load_tokenizer

        return load_tokenizer(self.base_folder)

    @cached_property
    def prepared(self) -> Any:
        from loadmaster.data import describe, prepare

        prepared = prepare(self.job, self.tokenizer)
        self._echo(describe(prepared.summary))
        return prepared


@dataclass
class StageRun:
    """One world stage of one run, on one rank."""

    job: Job
    plan: Plan
    run_dir: Path
    world: World
    stop: StopSignal
    display: Display
    materials: Materials
    on_end: Callable[[str], None] | None = None
    """Told why the watchdog ends this process; None: it is printed."""
    settings: str = ""
    """Hash of the job that this process was started with, where that could differ from the lead's."""

    def run(self, stage: str) -> dict[str, Any]:
        """Figures of the stage. Raises LoadmasterError, or StoppedOnRequest on all ranks together."""
        import loadmaster.training.loop  # noqa: F401  with the libraries below it
        from loadmaster.models.spread import free_device_memory
        from loadmaster.training.liveness import PREPARE
        from loadmaster.training.tracker import refuse_missing_tracker
        from loadmaster.training.watchdog import Watchdog, as_they_begin

        collector.resume()
        hang_s = None if self.job.launch.hang_timeout_s == "auto" else self.job.launch.hang_timeout_s
        # Alone, a request ends what is not training at once; of several, all agree where.
        together = self.stop.deferred() if self.world.size > 1 else nullcontext()
        with ExitStack() as stack:
            stack.enter_context(together)
            with as_they_begin(self.world.rank):
                self._refuse_folder_of_its_own()
                self._refuse_another_device()
                if stage == "train":
                    self._refuse_missing_compiler()
                    exported = self.job.stop_after in ("export", "bundle")
                    packages.refuse_missing(self.plan, self.job.export.formats if exported else ())
                    refuse_missing_tracker(self.job)
                watch = Watchdog(self.world, self.run_dir / "logs", hang_s, on_end=self.on_end)
                stack.enter_context(watch)
            watch.at(0, PREPARE)
            self._make_materials()
            watch.at(0, "start")
            self._stop_if(self._stopping(), f"{stage} starts")
            self._examine(stage)
            with out_of_memory.explained(stage):
                figures = {"train": self._train, "evaluate": self._evaluate}[stage](watch)
            free_device_memory()  # models are parts of cycles, and the next stage loads its own
            if self._stopping():  # too late for this stage, which is done: whoever goes on asks again
                self.stop.requested = True
            return figures

    def _stopping(self) -> bool:
        return self.world.any(self.stop.requested)

    def _refuse_folder_of_its_own(self) -> None:
        """Checkpoints are written by all nodes into one folder, so all must see the lead's."""
        seen = self.world.gather((self.run_dir / "plan.json").is_file())
        if not all(seen):
            message = f"is not the lead's folder on rank {seen.index(False)}"
            remedy = "set run_dir to a folder on storage that all nodes share"
            raise ConfigError.of("run_dir", str(self.run_dir), message, remedy, "command line or recipe")

    def _refuse_another_device(self) -> None:
        """Processes that torchrun started met before there was a plan. Raises LoadmasterError on all ranks."""
        if self.world.size == 1:
            return
        said = ""
        try:
            device_type(self.plan, self.job.hardware.gpu)
        except LoadmasterError as error:
            said = str(error)
        seen = self.world.gather(said)
        if said := next(filter(None, seen), ""):
            raise LoadmasterError(f"rank {seen.index(said)}: {said}")

    def _refuse_missing_compiler(self) -> None:
        """Before a model is downloaded for it. Raises LoadmasterError on all ranks."""
        from loadmaster.models.compiled import missing_for_a_gpu

        remedies = {
            "decoder layers": self.plan.compile and "compile=false, which trains slower",
            "the step of optimizer.name=adamw_bf16": self.plan.optimizer == "adamw_bf16" and "another optimizer",
        }
        needed = {what: remedy for what, remedy in remedies.items() if remedy}
        on_host = self.plan.offload != "none"  # where weights are rounded, too (training/rounding.py)
        seen = self.world.gather(missing_for_a_gpu(on_host) if needed and self.world.device.type == "cuda" else None)
        if missing := next(filter(None, seen), None):
            where = f" on rank {seen.index(missing)}" if len(seen) > 1 else ""
            raise LoadmasterError(
                f"{' and '.join(needed)} cannot be compiled{where}: {missing} is not there\n"
                f"fix: install it (Debian: apt-get install gcc {'g++ ' if on_host else ''}python3-dev), or set "
                f"{' and '.join(needed.values())}"
            )

    def _make_materials(self) -> None:
        """One rank of each node first: it downloads and prepares, the others find it done."""
        for first in (True, False):
            if (self.world.local_rank == 0) == first:
                _ = self.materials.prepared
            self.world.barrier()
        self._refuse_tokens_without_embedding()

    def _refuse_tokens_without_embedding(self) -> None:
        """Of another model's tokenizer, or one that was added to. Raises DataError on all ranks."""
        summary, known = self.materials.prepared.summary, self.plan.model.vocabulary_size
        largest = max((summary[split] or {}).get("largest_id", 0) for split in ("train", "validation"))
        if largest >= known:
            token = self.materials.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"the data hold {token!r}, token {largest:,} of the tokenizer in {self.materials.base_folder}, and the "
                f"model has embeddings for {known:,}: the tokenizer is another model's, or was added to\n"
                "    fix: put the model's own tokenizer.json and tokenizer_config.json there, or take the token out of "
                "the data"
            )

    def _examine(self, stage: str) -> None:
        """Before training: is every host fit, are all alike, and can the task be asked? Raises LoadmasterError."""
        from loadmaster.evaluation import refuse_unaskable
        from loadmaster.training.doctor import examine, needs_of

        if stage == "train":
            fingerprint = self.materials.prepared.train.fingerprint
            settings = self.settings or job_hash(self.job)
            examine(self.world, settings, fingerprint, self.run_dir, needs_of(self.plan), self.display.echo)
            if self.job.stop_after != "train":
                conversations = self.materials.prepared.validation_conversations
                refuse_unaskable(self.materials.tokenizer, self.job.evaluation, conversations)

    # ------------------------------------------------------------------ train

    def _train(self, watch: Watchdog) -> dict[str, Any]:
        from loadmaster.data import judged_alone
        from loadmaster.preflight.prediction import held_against
        from loadmaster.training.loop import train
        from loadmaster.training.rehearsal import measured
        from loadmaster.training.save import write_trained

        by_row = self.plan.method == "full"
        alone = judged_alone(self.materials.prepared.summary, self.plan.micro_batch_size, by_row)
        if alone and self.job.objective == "kto" and self.world.lead:
            self.display.echo(f"  {alone}")
        rows, asked = len(self.materials.prepared.train), self.job.batch.global_size
        if rows < asked and self.world.lead:
            has = f"an epoch has {counted(rows, 'packed row')}"
            self.display.echo(f"  batch.global_size={asked}: {has}, so a step has no more")
        session, outcome = train(
            self.job, self.plan, self.materials.prepared, self.materials.tokenizer, self.materials.base_folder,
            self.run_dir, training_hash(self.job, self.plan, self.materials.prepared),
            lambda session, stopping: self._held_out(session.model, session.loss, stopping, session.fixed_length),
            self.stop, self.display, self.world, watch,
        )
        watch.at(outcome.steps, "save")
        folder = self.run_dir / self.plan.trained
        with publish_folder(folder) if self.world.lead else nullcontext():
            self.world.barrier()
            partial = folder.with_name(f".{folder.name}.partial")
            write_trained(session.model, partial, session.strategy.placed, self.world, self.materials.tokenizer)
        return {
            **outcome.peaks,
            "predicted_gib": self.plan.memory_gib.total,
            "predicted_peaks_gib": asdict(self.plan.peak_gib) if self.plan.peak_gib else None,
            "rehearsal_peak_allocated_gib": outcome.rehearsal.peak_allocated_gib,
            "prediction": held_against(self.plan, measured(outcome.rehearsal)),
            "tokens_per_second": outcome.tokens_per_second,
            "trained_tokens_per_second": outcome.trained_tokens_per_second,
            "mfu": model_flops_utilisation(self.plan, outcome.tokens_per_second),
            "checkpoints": outcome.saves,
            "steps": outcome.steps,
            "resumed_after_step": outcome.resumed_after,
            "taken_step": outcome.taken_step,
            "recompilations": outcome.recompilations,
            "kept_layers": outcome.rehearsal.kept_layers,
            "input_share": outcome.input_share,
            "attention_kernel": outcome.attention_kernel,
            "start_s": outcome.start_s,
            "compiler_cache": outcome.compiler_cache,
            "allocator": session.strategy.allocator,
            "train_loss": outcome.train_loss,
            "eval_loss": outcome.eval_loss,
            "data": self.materials.prepared.summary,
        }

    def _held_out(
        self, model: Any, loss: Any, stopping: Callable[[], bool], to_length: int | None = None
    ) -> dict[str, Any] | None:
        from loadmaster.evaluation import held_out

        return held_out(
            model, self.materials.prepared.validation, self.materials.tokenizer.pad_token_id,
            self.plan.micro_batch_size, self.world.device, loss, self.world, stopping, to_length,
        )

    # --------------------------------------------------------------- evaluate

    def _evaluate(self, watch: Watchdog) -> dict[str, Any]:
        """Writes eval.json: held-out loss and task metric before and after training."""
        from loadmaster.evaluation.held_out import before_training

        trained_folder = next(p for p in (self.run_dir / "adapter", self.run_dir / "model") if p.is_dir())
        watch.at(0, "load")
        whole = trained_folder.name == "model"
        strategy = self._strategy()
        model, loss = strategy.for_evaluation(self.materials.base_folder, None if whole else trained_folder)
        watch.at(0, "evaluate")
        with nullcontext() if whole else model.disable_adapter():
            self._ask_reference(loss)
            before = self._evaluate_model(strategy, model, loss, "before training")
        if "held_out" in before:
            before["held_out"] = before_training(before["held_out"], self.job.objective)
        if whole:
            strategy.let_go(loss)
            del model, loss
            gc.collect()
            watch.at(0, "load")
            model, loss = strategy.for_evaluation(self.materials.base_folder, trained_folder)
            watch.at(0, "evaluate")
        after = self._evaluate_model(strategy, model, loss, "after training")
        if self.world.lead:
            write_json(self.run_dir / "eval.json", storable({"before": before, "after": after}))
            samples = after.pop("samples", None)
            for part in after:
                self.display.echo(f"  {part}: {_headline(before[part])} before, {_headline(after[part])} after")
            if samples:
                answered = counted(len(samples), "held-out prompt")
                self.display.echo(f"  answers to {answered} before and after, to be read: in report.html and eval.json")
        return storable({"eval_loss": after.get("held_out", {}).get("loss")})

    def _ask_reference(self, loss: Any) -> None:
        """What the training before it left in the run directory, or else of the model that is there now."""
        from loadmaster.training.batches import micro_batches
        from loadmaster.training.reference import Reference, asked_once

        prepared, world, size = self.materials.prepared, self.world, self.plan.micro_batch_size
        if not asked_once(self.job, self.plan.method) or prepared.validation is None:
            return
        identity = training_hash(self.job, self.plan, prepared)
        reference = Reference(self.run_dir, identity, prepared, world, self.job.objective)
        pad = self.materials.tokenizer.pad_token_id
        reference.ask(
            loss, lambda rows: micro_batches(rows, size, world.rank, world.size, pad, None), size, self.display.asked,
            self._stopping,
        )
        self._stop_if(self._stopping())

    def _strategy(self) -> Any:
        from loadmaster.training.session import refuse_other_world
        from loadmaster.training.sharding import STRATEGIES

        refuse_other_world(self.plan, self.world)
        return STRATEGIES[self.plan.sharding](self.job, self.plan, self.world)

    def _evaluate_model(self, strategy: Any, model: Any, loss: Any, when: str) -> dict[str, Any]:
        from loadmaster.evaluation import run_task, some_answers

        figures: dict[str, Any] = {}
        if self.materials.prepared.validation is not None:
            figures["held_out"] = self._held_out(model, loss, self._stopping)
        asked = (
            model, self.materials.tokenizer, self.materials.prepared.validation_conversations, self.job.evaluation,
            lambda done, wanted: self._answered(done, wanted, when), self.world,
        )
        if self.job.evaluation.task != "none":
            with strategy.generating(loss):
                figures["task"] = run_task(*asked)
        elif samples := some_answers(*asked):
            figures["samples"] = samples
        self._stop_if(self._stopping())
        return figures

    def _answered(self, done: int, wanted: int, when: str) -> None:
        self._stop_if(self._stopping())
        self.display.answers(done, wanted, when)

    def _stop_if(self, asked: bool, what: str = "the evaluation starts") -> None:
        if asked:
            raise StoppedOnRequest(f"{self.stop.message} ({what} anew)", agreed=True)


def training_hash(job: Job, plan: Plan, prepared: Any) -> str:
    """What a checkpoint must agree on to be gone on from: not how the work is spread, but what the plan chose."""
    return sha256_json([job_hash(job), chosen(plan), prepared.train.fingerprint])


def chosen(plan: Plan) -> list[Any]:
    """What a plan chose that shapes the trained weights."""
    return [plan.method, plan.precision, plan.optimizer, plan.master_weights]


def model_flops_utilisation(plan: Plan, tokens_per_second: float) -> float | None:
    """Share of the GPUs' dense peak that the model's own FLOPs take; None on a CPU."""
    from loadmaster.preflight.speed import peak_flops

    if plan.hardware.gpu == "cpu":
        return None
    return tokens_per_second * plan.model.flops_per_token / (peak_flops(plan) * plan.world_size)


def device_type(plan: Plan, asked: str) -> str:
    """Where this plan runs here, of a job whose hardware.gpu is `asked`. Raises LoadmasterError for a GPU that PyTorch
    cannot use, or that the plan did not see: the processors would take its place without a word."""
    import torch

    from loadmaster.preflight.hardware import local_gpus
    from loadmaster.preflight.nvml import NVML

    if plan.hardware.gpu == "cpu":
        if asked == "local" and torch.cuda.is_available() and not local_gpus():
            raise LoadmasterError(
                f"PyTorch sees a GPU ({torch.cuda.get_device_name()}) and the plan is for the processors: the driver's "
                f"library that tells of GPUs, {NVML}, was not found or does not answer. It lies beside libcuda.so.1: "
                "put that folder into LD_LIBRARY_PATH, or set hardware=cpu"
            )
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if cards := local_gpus():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for processors alone"
        raise LoadmasterError(
            f"this machine has a GPU ({cards[0][0]}) that PyTorch cannot use: torch {torch.__version__} is built "
            f"{build}. Install the build that its driver runs (nvidia-smi says up to which CUDA), or set hardware=cpu"
        )
    return "cpu"


REWARDS = ("reward_desirable", "reward_undesirable")


def _headline(figures: dict[str, Any]) -> str:
    from loadmaster.report.evaluation import are_ties

    if "reward_accuracy" in figures:
        share = f"{figures['reward_accuracy']:.1%} of the chosen answers preferred"
        return f"loss {figures['loss']:.4f}, {'neither answer preferred' if are_ties(figures) else share}"
    if "answers" in figures:
        rewards = [f"{figures[name]:+.3f} {name.removeprefix('reward_')}" for name in REWARDS if name in figures]
        return f"loss {figures['loss']:.4f}, reward {' and '.join(rewards)}"
    if "perplexity" in figures:
        perplexity = figures["perplexity"]
        return f"loss {figures['loss']:.4f}, perplexity {perplexity:{'.2f' if perplexity < 1e6 else '.3g'}}"
    return f"{figures['metric']:.1%} right"
