"""The one training loop: LoRA, QLoRA, FP8 and full fine-tuning, on one device or many.

What differs between them is decided before the loop, in the Plan, and built into the Session: what is frozen, in which
dtype, how it is spread, under which optimizer. All ranks run this loop and agree, step by step, on when to stop.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loadmaster.config.rates import peak_rate
from loadmaster.config.schema import Job
from loadmaster.data import BatchSampler, MicroBatch, PreparedData
from loadmaster.errors import StoppedOnRequest, TrainingFailed
from loadmaster.models.compiled import CompileCache, graphs_compiled
from loadmaster.models.forward import causal_lm
from loadmaster.models.recompute import checkpoint_the_rest
from loadmaster.models.rotary import refuse_dynamic
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.prediction import Measured, held_against, sentence
from loadmaster.training.batches import longest_stretch, losses, trained_tokens, worst_rows
from loadmaster.training.checkpoint import Checkpoints
from loadmaster.training.checkpoint_folders import newest_whole
from loadmaster.training.display import Display
from loadmaster.training.metrics import (
    MetricsLog,
    Throughput,
    most,
    peak_memory,
    read_metrics,
    recent_loss,
    reset_peak,
    saving_sentence,
)
from loadmaster.training.rehearsal import Rehearsed, rehearse
from loadmaster.training.rng import seed_everything
from loadmaster.training.schedule import checkpoint_interval, evaluation_interval, learning_rate
from loadmaster.training.session import (
    Session,
    attention_kernel,
    make_session,
    own_code,
    refuse_other_world,
    refuse_unbuilt,
    try_family,
)
from loadmaster.training.stop import StopSignal
from loadmaster.training.tracker import open_tracker, refuse_missing_tracker
from loadmaster.training.watchdog import Watchdog
from loadmaster.training.world import World

HeldOut = Callable[[Session, Callable[[], bool]], dict[str, Any] | None]
"""Evaluates on the held-out rows: {"loss": ..., ...}; None when it was asked to stop on the way."""


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
    """Of the rank that needed most."""
    saves: dict[str, float | bool] | None
    """How many checkpoints, their size, how long the loop waited for them and how long they took to write."""
    recompilations: int = 0
    """Graphs that were compiled after the rehearsal; each makes a step slow, and there should be none."""
    input_share: float = 0.0
    """Of the steps' time, what went by until their batches were there."""
    attention_kernel: str = ""
    """varlen (PyTorch's own), FA3, FA4, flex_attention, or by_document (a CPU, and attention dropout)."""
    resumed_after: int = 0
    """The step whose checkpoint this process went on from: rates and times are of what came after it."""


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
    world: World | None = None,
    watch: Watchdog | None = None,
) -> tuple[Session, Outcome]:
    """Train as the plan says; resumes from the newest whole checkpoint in run_dir. All ranks of `world` call it.

    Raises StoppedOnRequest on all ranks after a signal to any (a checkpoint is saved), TrainingFailed when loss or
    gradients stay non-finite or memory runs out.
    """
    world = world or World()
    watch = watch or Watchdog(world, run_dir / "logs")
    refuse_unbuilt(plan)
    refuse_other_world(plan, world)
    refuse_missing_tracker(job)

    def stopping() -> bool:
        return world.any(stop.requested or checkpoints.failed)

    with stop.deferred(), ExitStack() as stack:
        watch.at(0, "load")
        cache = CompileCache(run_dir / "compile_cache", world.lead)
        compiles = plan.compile or plan.optimizer == "adamw_bf16"  # whose step compiles itself
        if compiles:
            stack.callback(cache.close)
            cache.open()
        session = make_session(job, plan, world, tokenizer.pad_token_id, base_folder)
        if world.rank:  # dropout differs from rank to rank; rank 0 draws what a run of one process draws
            seed_everything(job.seed + world.rank)
        rows, folder = prepared.train, run_dir / "checkpoints"
        parts = [part for part in (rows, prepared.validation) if part is not None]
        longest = max(longest_stretch(part, session.fixed_length) for part in parts)
        refuse_dynamic(causal_lm(session.model).get_decoder(), longest)
        epochs = job.epochs if job.max_steps is None else math.inf
        sampler = BatchSampler(len(rows), job.batch.global_size, job.seed, epochs, rows.fingerprint)
        steps = job.max_steps or sampler.total_steps()
        checkpoints = Checkpoints(world, session.strategy.placed)
        _stop_if(stopping(), stop.message, "before the first step")
        watch.at(0, "rehearse")
        kernel = stack.enter_context(attention_kernel(session, display.echo))
        lr = learning_rate(1, steps, job.optimizer, peak_rate(job, plan.method))
        with own_code(session):
            rehearsal = _rehearse(session, prepared, checkpoints, folder / ".rehearsal", lr, display.echo)
            try_family(session)
        display.echo(
            f"rehearsal passed in {rehearsal.seconds:.1f} s: worst step, evaluation, save and reload; "
            f"peak {rehearsal.peak_allocated_gib:.2f} GiB, predicted {predicted_allocated(plan):.2f} GiB"
        )
        watch.expect(plan.gradient_accumulation_steps * rehearsal.step_s)
        if said := sentence(held_against(plan, measured(rehearsal))):
            display.echo(f"note: {said}")
        compiled = graphs_compiled()
        if compiles:
            cache.share()
        _stop_if(stopping(), stop.message, "after the rehearsal, before the first step")

        found = newest_whole(folder, job_hash, display.echo, world)
        done, tokens, trained_total = 0, 0, 0
        if found is not None:
            watch.at(0, "load")
            state = checkpoints.load(found.folder, session.trained, session.optimizer)
            sampler.load_state_dict(state["sampler"])
            done, tokens, trained_total = state["step"], state["tokens"], state["trained_tokens"]
            display.echo(f"resuming after step {done} of {steps} from {found.folder}")
        save_every, evaluate_every = checkpoint_interval(job, steps), evaluation_interval(job, steps)
        log = MetricsLog(run_dir / "metrics.jsonl", done, world.lead)
        tracker = open_tracker(job, run_dir, job_hash, world.lead)
        tokens_at_start, trained_at_start, busy_s, input_s = tokens, trained_total, 0.0, 0.0
        eval_loss: float | None = None
        recompilations = 0

        def save(step: int, position: dict[str, Any]) -> None:
            state = {
                "step": step,
                "tokens": tokens,
                "trained_tokens": trained_total,
                "sampler": position,
                "job_hash": job_hash,
                "eval_loss": eval_loss,
            }
            keep = (job.checkpoint.keep_last, job.checkpoint.keep_best)
            watch.at(step, "save")
            checkpoints.save(folder / f"step-{step}", session.trained, session.optimizer, state, keep)
            waited_s = checkpoints.stalls_s[-1]
            logging.getLogger("loadmaster").info(f"step {step}: saving; the loop waited {waited_s:.3f} s")

        display.start(steps, done)
        position = sampler.state_dict()
        rate = Throughput()
        try:
            for step, indices in zip(range(done + 1, steps + 1), sampler, strict=False):
                before, position = position, sampler.state_dict()
                watch.at(step, "step")
                began = time.perf_counter()
                picked = [rows[i] for i in indices]
                total_trained = sum(trained_tokens(r) for r in picked)
                batches, count = session.split(picked), max(1, sum(losses(r, job.objective) for r in picked))
                input_s += time.perf_counter() - began
                lr = learning_rate(step, steps, job.optimizer, peak_rate(job, plan.method))
                loss, norm = session.gradients(batches, count, lr)
                row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
                if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
                    session.optimizer.step(lr)
                    session.skipped.clear()
                else:
                    _skip(session, row, picked, lambda at=(step - 1, before): (save(*at), checkpoints.wait()))
                    row["loss"] = row["grad_norm"] = None
                tokens += sum(map(len, picked))
                trained_total += total_trained
                busy_s += time.perf_counter() - began
                watch.worked(session.worked_s)
                row |= session.preference | {
                    "tokens": tokens,
                    "trained_tokens": trained_total,
                    "tokens_per_second": round(rate.update(sum(map(len, picked))), 2),
                }
                if world.size > 1:
                    row["step_s_by_rank"] = [round(s, 4) for s in world.gather(session.worked_s)]
                eval_loss = None
                due = evaluate_every and (step % evaluate_every == 0 or step == steps)
                if due and prepared.validation is not None:
                    watch.at(step, "evaluate")
                    figures = held_out(session, stopping)
                    session.strategy.settle(session.loss)
                    if figures is not None:
                        eval_loss = row["eval_loss"] = figures["loss"] if math.isfinite(figures["loss"]) else None
                asked = stopping()
                if asked or step % save_every == 0 or step == steps:
                    save(step, position)
                    row["save_stall_s"] = round(checkpoints.stalls_s[-1], 4)
                log.append({**row, "steps": steps})  # so that who follows a run from elsewhere knows its end
                logging.getLogger("loadmaster").info(f"step {step} of {steps}: {row}")
                figures = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
                tracker.log(figures, step)
                if row["loss"] is not None:
                    display.step(row, peak_memory(session.device)["peak_allocated_gib"])
                if plan.compile and graphs_compiled() > compiled + recompilations:
                    recompilations = graphs_compiled() - compiled
                    display.echo(f"step {step} compiled anew ({recompilations} graphs since the rehearsal)")
                if world.lead and (straggler := watch.straggler()) is not None:
                    display.echo(straggler)
                _stop_if(asked, stop.message, f"checkpoint saved after step {step} of {steps}", checkpoints)
                rate.pause()
            watch.at(steps, "save")
            checkpoints.wait()
        finally:
            display.stop()
            log.close()
            tracker.close()
    saves = checkpoints.figures()
    if saves is not None:
        display.echo(saving_sentence(saves))
    nothing = {"loss": None, "tokens_per_second": 0.0}  # metrics.jsonl was lost after the last step
    logged = read_metrics(run_dir / "metrics.jsonl") or [nothing]
    return session, Outcome(
        steps=steps,
        train_loss=recent_loss(logged),
        eval_loss=logged[-1].get("eval_loss"),
        tokens_per_second=(tokens - tokens_at_start) / busy_s if busy_s else logged[-1]["tokens_per_second"],
        trained_tokens_per_second=(trained_total - trained_at_start) / busy_s if busy_s else 0.0,
        rehearsal=rehearsal,
        peaks=most(world.gather(peak_memory(session.device))),
        saves=saves,
        recompilations=recompilations,
        input_share=input_s / busy_s if busy_s else 0.0,
        attention_kernel=kernel,
        resumed_after=done,
    )


def measured(rehearsal: Rehearsed) -> Measured:
    return Measured(
        rehearsal.peak_allocated_gib, rehearsal.peak_reserved_gib, rehearsal.peak_device_gib,
        rehearsal.loaded_gib, rehearsal.resting_gib,
    )  # fmt: skip


def predicted_allocated(plan: Plan) -> float:
    """What `peak_allocated_gib` counts: on a CPU the whole process."""
    on_gpu = plan.peak_gib is not None and plan.hardware.gpu != "cpu"
    return plan.peak_gib.allocated if on_gpu else plan.memory_gib.total


def _stop_if(asked: bool, message: str, where: str, checkpoints: Checkpoints | None = None) -> None:
    """Raise StoppedOnRequest, on all ranks together, once what was being saved is there."""
    if not asked:
        return
    if checkpoints is not None:
        checkpoints.wait()
    raise StoppedOnRequest(f"{message} ({where})", agreed=True)


def _rehearse(
    session: Session, prepared: PreparedData, checkpoints: Checkpoints, scratch: Path, lr: float,
    echo: Callable[[str], None],
) -> Rehearsed:  # fmt: skip
    """The rehearsal, at the learning rate of step 1: what the warm-up would have saved is not refused.

    Where memory runs out with layers that keep their activations for speed alone, once more with all checkpointed.
    """
    rows, plan = prepared.train, session.plan
    picked = worst_rows(rows, plan.micro_batch_size * session.world.size)
    worst = session.split(picked)[:1] * min(2, plan.gradient_accumulation_steps)

    def step(batches: list[MicroBatch]) -> torch.Tensor:
        count = max(1, sum(losses(row, session.job.objective) for row in picked))
        _, norm = session.gradients(batches, count, lr)
        session.optimizer.step(lr)
        return norm

    def evaluate() -> None:
        if prepared.validation is None:
            return
        session.model.eval()
        with torch.no_grad():
            session.loss(session.split(worst_rows(prepared.validation, plan.micro_batch_size))[0])
        session.strategy.settle(session.loss)

    in_fp8 = plan.precision == "fp8"
    arguments = (step, evaluate, worst, session.trained, session.optimizer, checkpoints, scratch, in_fp8)
    try:
        return replace(rehearse(*arguments), kept_layers=plan.kept_layers)
    except TrainingFailed as error:
        chosen = plan.kept_layers and session.job.checkpointed_layers == "auto"  # what was written is not replaced
        if not chosen or session.world.size > 1 or not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
    echo(
        f"note: out of GPU memory in the rehearsal with the activations of {plan.kept_layers} layers kept; "
        f"all {plan.model.layers} are checkpointed instead, which is slower"
    )
    checkpoint_the_rest(session.model)
    reset_peak(session.device)
    return rehearse(*arguments)


def _skip(session: Session, row: dict[str, Any], picked: list, save: Callable[[], Any]) -> None:
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
    weights = "weights are those before it"
    if session.plan.optimizer_in_backward:
        weights = "layers whose own gradients were finite were stepped (optimizer.in_backward); the weights are"
    raise TrainingFailed(
        f"the {what} was not finite in {len(session.skipped)} steps in a row, from step {first['step']} on; "
        f"{weights}, saved in checkpoints/step-{row['step'] - 1}. "
        f"Rows of that step: {', '.join(first['rows'][:8])}{' ...' if len(first['rows']) > 8 else ''}.\n"
        "fix: look at these rows, lower optimizer.lr, or raise optimizer.warmup_ratio"
    )
