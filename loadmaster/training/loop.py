"""The one training loop: LoRA, QLoRA and full fine-tuning, on one device or several.

What differs between them is decided before the loop, in the Plan, and built in `_prepare`: what is frozen,
in which dtype, under which optimizer. The loss of a step is the sum of its trained tokens' cross-entropies
over their number, over all micro-batches and ranks, so however a batch is split its gradient is the same.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from loadmaster.config.schema import Job
from loadmaster.data import BatchSampler, MicroBatch, PreparedData
from loadmaster.errors import ConfigError, Problem, StoppedOnRequest, TrainingFailed
from loadmaster.models.adapters import checkpoint_activations, make_trainable, trainable
from loadmaster.models.forward import SummedLoss
from loadmaster.models.load import DTYPES, load_base
from loadmaster.preflight.plan import Plan
from loadmaster.training import checkpoint
from loadmaster.training.batches import micro_batches, trained_tokens, worst_rows
from loadmaster.training.display import Display
from loadmaster.training.metrics import MetricsLog, Throughput, peak_memory, read_metrics
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.rehearsal import Rehearsed, rehearse
from loadmaster.training.rng import seed_everything
from loadmaster.training.schedule import checkpoint_interval, evaluation_interval, learning_rate
from loadmaster.training.stop import MESSAGE, StopSignal

HeldOut = Callable[[nn.Module], dict[str, float]]
"""Evaluates the model on the held-out rows: {"loss": ..., "perplexity": ...}."""


@dataclass
class Outcome:
    """What training reports; goes into result.json."""

    steps: int
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float
    trained_tokens_per_second: float
    rehearsal: Rehearsed
    peaks: dict[str, float]


@dataclass
class Session:
    """Everything the loop works on, built once from job and plan."""

    job: Job
    plan: Plan
    model: nn.Module
    loss: nn.Module
    trained: list[tuple[str, nn.Parameter]]
    optimizer: TrainingOptimizer
    accelerator: Accelerator
    pad_token_id: int
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def split(self, rows: list) -> list[MicroBatch]:
        fixed = self.job.sequence_length if self.device.type == "cuda" else None
        return micro_batches(
            rows,
            self.plan.micro_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.pad_token_id,
            fixed,
        )

    def backward(self, batches: list[MicroBatch], total_trained: int) -> torch.Tensor:
        """Accumulate the step's gradients; returns the step's mean loss, fp32 scalar, over all ranks."""
        self.model.train()
        ranks = self.accelerator.num_processes
        mean = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.loss):
                loss = self.loss(batch) / total_trained
                (loss * ranks).backward()  # data parallelism averages over ranks what is to be summed
            mean += loss.detach()
        return self.accelerator.reduce(mean, reduction="sum")


def train(
    job: Job,
    plan: Plan,
    prepared: PreparedData,
    tokenizer: Any,
    base_folder: Path,
    run_dir: Path,
    job_hash: str,
    held_out: HeldOut,
    stop: StopSignal,
    display: Display,
) -> tuple[nn.Module, Outcome]:
    """Train as the plan says and return the model; resumes from the newest whole checkpoint in run_dir.

    Raises StoppedOnRequest after a signal (a checkpoint is saved), TrainingFailed when loss or gradients
    stay non-finite or memory runs out.
    """
    refuse_unbuilt(plan)
    seed_everything(job.seed)
    accelerator = make_accelerator(job, plan, run_dir)
    _refuse_other_world(plan, accelerator.num_processes)
    base = load_base(base_folder, DTYPES[plan.precision], accelerator.device, nf4=plan.method == "qlora")
    session = make_session(job, plan, base, accelerator, tokenizer.pad_token_id)
    rows, checkpoints = prepared.train, run_dir / "checkpoints"
    epochs = job.epochs if job.max_steps is None else math.inf
    sampler = BatchSampler(len(rows), job.batch.global_size, job.seed, epochs, rows.fingerprint)
    steps = job.max_steps or sampler.total_steps()
    rehearsal = _rehearse(session, prepared, checkpoints / ".rehearsal", learning_rate(1, steps, job.optimizer))
    display.echo(
        f"rehearsal passed in {rehearsal.seconds:.1f} s: worst step, evaluation, save and reload; "
        f"peak {rehearsal.peak_allocated_gib:.2f} GiB, predicted {plan.memory_gib.total:.2f} GiB"
    )

    found = checkpoint.newest_whole(checkpoints, job_hash, display.echo)
    done, tokens, trained_total = 0, 0, 0
    if found is not None:
        state = checkpoint.load(found.folder, session.trained, session.optimizer)
        sampler.load_state_dict(state["sampler"])
        done, tokens, trained_total = state["step"], state["tokens"], state["trained_tokens"]
        display.echo(f"resuming after step {done} of {steps} from {found.folder}")
    save_every, evaluate_every = checkpoint_interval(job, steps), evaluation_interval(job, steps)
    log, rate = MetricsLog(run_dir / "metrics.jsonl", done), Throughput()
    session.accelerator.init_trackers(job.tracker.project, config={"recipe": job.recipe, "job_hash": job_hash})
    tokens_at_start, trained_at_start, busy_s = tokens, trained_total, 0.0
    eval_loss: float | None = None

    def save(step: int) -> None:
        checkpoint.save(
            checkpoints / f"step-{step}",
            session.trained,
            session.optimizer,
            {
                "step": step,
                "tokens": tokens,
                "trained_tokens": trained_total,
                "sampler": sampler.state_dict(),
                "job_hash": job_hash,
                "eval_loss": eval_loss,
            },
        )
        checkpoint.prune(checkpoints, job.checkpoint.keep_last, job.checkpoint.keep_best)

    display.start(steps, done)
    try:
        with stop.deferred():
            for step, indices in zip(range(done + 1, steps + 1), sampler, strict=False):
                began = time.perf_counter()
                picked = [rows[i] for i in indices]
                total_trained = sum(trained_tokens(r) for r in picked)
                batches = session.split(picked)
                loss = session.backward(batches, max(1, total_trained))
                norm = session.optimizer.clip(job.optimizer.max_grad_norm)
                row = {
                    "step": step,
                    "loss": loss.item(),
                    "grad_norm": norm.item(),
                    "lr": learning_rate(step, steps, job.optimizer),
                }
                if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
                    session.optimizer.step(row["lr"])
                    session.skipped.clear()
                else:
                    _skip(session, row, picked, lambda before=step - 1: save(before))
                    row["loss"] = row["grad_norm"] = None
                tokens += sum(map(len, picked))
                trained_total += total_trained
                busy_s += time.perf_counter() - began
                row |= {
                    "tokens": tokens,
                    "trained_tokens": trained_total,
                    "tokens_per_second": round(rate.update(sum(map(len, picked))), 2),
                }
                eval_loss = None
                if evaluate_every and prepared.validation is not None and (step % evaluate_every == 0 or step == steps):
                    eval_loss = row["eval_loss"] = held_out(session.model)["loss"]
                log.append(row)
                session.accelerator.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=step)
                if row["loss"] is not None:
                    display.step(row, peak_memory(session.device)["peak_allocated_gib"])
                if stop.requested or step % save_every == 0 or step == steps:
                    save(step)
                    if stop.requested:
                        raise StoppedOnRequest(f"{MESSAGE} after step {step} of {steps} (checkpoint saved)")
                rate.pause()
    finally:
        display.stop()
        log.close()
        session.accelerator.end_training()
    nothing = {"loss": None, "tokens_per_second": 0.0}  # metrics.jsonl was lost after the last step
    logged = read_metrics(run_dir / "metrics.jsonl") or [nothing]
    return session.model, Outcome(
        steps=steps,
        train_loss=logged[-1]["loss"],
        eval_loss=logged[-1].get("eval_loss"),
        tokens_per_second=(tokens - tokens_at_start) / busy_s if busy_s else logged[-1]["tokens_per_second"],
        trained_tokens_per_second=(trained_total - trained_at_start) / busy_s if busy_s else 0.0,
        rehearsal=rehearsal,
        peaks=peak_memory(session.device),
    )


def make_accelerator(job: Job, plan: Plan, run_dir: Path) -> Accelerator:
    """Device and tracker. Raises ConfigError for a tracker that is not installed (accelerate would leave it out)."""
    tracker = None if job.tracker.name == "none" else job.tracker.name
    if tracker is not None and importlib.util.find_spec(tracker) is None:
        remedy = f"pip install {tracker}, or tracker=tensorboard (metrics.jsonl is written in any case)"
        raise ConfigError([Problem("tracker.name", tracker, "recipe or command line", "is not installed", remedy)])
    return Accelerator(cpu=plan.hardware.gpu == "cpu", log_with=tracker, project_dir=str(run_dir / "tracker"))


def make_session(job: Job, plan: Plan, base: nn.Module, accelerator: Accelerator, pad_token_id: int) -> Session:
    """Freeze, checkpoint, wrap and check, in this order; the optimizer comes last, over what is left to train."""
    model = make_trainable(base, plan.method, job.lora)
    checkpoint_activations(model, plan.activation_checkpointing)
    trained = trainable(model)
    optimizer = TrainingOptimizer(trained, job.optimizer, plan.optimizer, plan.master_weights)
    loss = SummedLoss(model)
    if accelerator.num_processes > 1:
        loss = accelerator.prepare_model(loss)
        if not isinstance(loss, nn.parallel.DistributedDataParallel):
            raise TrainingFailed(
                f"{accelerator.num_processes} processes were started, but the model was not wrapped for them"
            )
    return Session(job, plan, model, loss, trained, optimizer, accelerator, pad_token_id)


def _refuse_other_world(plan: Plan, processes: int) -> None:
    """A plan for several GPUs is not trained on one of them in silence."""
    if processes != plan.world_size:
        message = f"the plan is for {plan.world_size} GPUs and this is a run of {processes} process"
        remedy = "hardware.count=1; training over several processes is planned, not built"
        raise ConfigError([Problem("hardware.count", plan.world_size, "the plan (plan.json)", message, remedy)])


def refuse_unbuilt(plan: Plan) -> None:
    """Raise ConfigError for what a plan may say and this loop does not do; nothing is silently replaced."""
    unbuilt = {
        "sharding": (plan.sharding, ("none", "ddp")),
        "offload": (plan.offload, ("none",)),
        "activation_checkpointing": (plan.activation_checkpointing, ("none", "full")),
        "precision": (plan.precision, ("bf16", "fp32")),
    }
    problems = [
        Problem(
            key,
            value,
            "the plan (plan.json)",
            f"training does not do {key}={value}; it is planned, not built",
            f"{key}={' or '.join(built)}",
        )
        for key, (value, built) in unbuilt.items()
        if value not in built
    ]
    if problems:
        raise ConfigError(problems)


def _rehearse(session: Session, prepared: PreparedData, scratch: Path, lr: float) -> Rehearsed:
    """The rehearsal, at the learning rate of step 1: what the warm-up would have saved is not refused."""
    rows, plan = prepared.train, session.plan
    picked = worst_rows(rows, plan.micro_batch_size * session.accelerator.num_processes)
    worst = session.split(picked)[:1] * min(2, plan.gradient_accumulation_steps)

    def step(batches: list[MicroBatch]) -> None:
        session.backward(batches, max(1, sum(map(trained_tokens, picked))))
        session.optimizer.clip(session.job.optimizer.max_grad_norm)
        session.optimizer.step(lr)

    def evaluate() -> None:
        if prepared.validation is None:
            return
        session.model.eval()
        with torch.no_grad():
            SummedLoss(session.model)(session.split(worst_rows(prepared.validation, plan.micro_batch_size))[0])

    return rehearse(step, evaluate, worst, session.trained, session.optimizer, scratch, session.device)


def _skip(session: Session, row: dict[str, Any], picked: list, save: Callable[[], None]) -> None:
    """Leave a step with a non-finite loss or gradient out; give up after too many in a row."""
    session.optimizer.zero_grad()
    names = [name for r in picked for name in r.document_ids]
    session.skipped.append({"step": row["step"], "rows": names})
    limit = session.job.optimizer.max_skipped_steps
    if len(session.skipped) <= limit:
        return
    save()
    first = session.skipped[0]
    what = "loss" if not math.isfinite(row["loss"]) else "gradient norm"
    raise TrainingFailed(
        f"the {what} was not finite in {len(session.skipped)} steps in a row, from step {first['step']} on; "
        f"weights are those before it, saved in checkpoints/step-{row['step'] - 1}. "
        f"Rows of that step: {', '.join(first['rows'][:8])}{' ...' if len(first['rows']) > 8 else ''}.\n"
        "fix: look at these rows, lower optimizer.lr, or raise optimizer.warmup_ratio"
    )
