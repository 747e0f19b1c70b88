"""The one training loop: LoRA, QLoRA, FP8 and full fine-tuning, on one device or many.

What differs between them is decided before the loop, in the Plan, and built into the Session: what is frozen, in which
dtype, how it is spread, under which optimizer. All ranks run this loop and agree, step by step, on when to stop.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadmaster.config.rates import peak_rate
from loadmaster.config.schema import Job
from loadmaster.data import BatchSampler, PreparedData
from loadmaster.errors import StoppedOnRequest
from loadmaster.models.compiled import CompileCache, cache_counts, graphs_compiled, wake_compilers
from loadmaster.models.forward import causal_lm
from loadmaster.models.rotary import refuse_dynamic
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.prediction import sentence_of_steps
from loadmaster.training.batches import longest_stretch, losses, trained_tokens
from loadmaster.training.checkpoint import Checkpoints
from loadmaster.training.checkpoint_folders import best_whole, clear, newest_whole
from loadmaster.training.display import Display
from loadmaster.training.metrics import (
    MetricsLog,
    Throughput,
    most,
    peak_memory,
    read_metrics,
    recent_loss,
    saving_sentence,
)
from loadmaster.training.outcome import Outcome
from loadmaster.training.reference import Reference, asked_once
from loadmaster.training.rehearsal import Rehearsed, rehearse_run, told
from loadmaster.training.rng import seed_everything
from loadmaster.training.schedule import HeldOutLosses, checkpoint_interval, evaluation_interval, learning_rate
from loadmaster.training.session import (
    Session,
    attention_kernel,
    compiles_some,
    make_session,
    own_code,
    skip,
    try_family,
)
from loadmaster.training.start import Start
from loadmaster.training.stop import StopSignal
from loadmaster.training.tracker import open_tracker
from loadmaster.training.watchdog import Watchdog
from loadmaster.training.world import World
from loadmaster.words import counted

HeldOut = Callable[[Session, Callable[[], bool]], dict[str, Any] | None]
"""Evaluates on the held-out rows: {"loss": ..., ...}; None when it was asked to stop on the way."""


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
    start = Start()
    with stop.deferred(), ExitStack() as stack:
        watch.at(0, "load")
        display.echo("loading the model")
        cache = CompileCache(run_dir / "compile_cache", world.lead)
        if compiles := compiles_some(plan, base_folder, world.device):
            stack.callback(cache.close)
            cache.open()
        start.compiles = compiles
        if plan.compile and world.device.type == "cuda" and not cache.is_filled:
            wake_compilers()
        session = make_session(job, plan, world, tokenizer.pad_token_id, base_folder)
        if world.rank:  # dropout differs from rank to rank; rank 0 draws what a run of one process draws
            seed_everything(job.seed + world.rank)
        parts = [part for part in (prepared.train, prepared.validation) if part is not None]
        longest = max(longest_stretch(part, session.fixed_length) for part in parts)
        refuse_dynamic(causal_lm(session.model).get_decoder(), longest)
        asked = asked_once(job, plan.method)
        reference = Reference(run_dir, job_hash, prepared, world, job.objective) if asked else None
        training = Training(session, prepared, run_dir, job_hash, held_out, stop, display, watch, start)
        if said := sentence_of_steps(plan, training.steps):
            display.echo(f"note: {said}")
        training.stop_if(training.stopping(), "before the first step")
        if world.lead:
            clear(training.folder)
        start.ended("load")
        watch.at(0, "rehearse")
        display.echo("rehearsing; layers are compiled meanwhile" if plan.compile else "rehearsing")
        kernel = stack.enter_context(attention_kernel(session, display.echo))
        scratch = training.folder / ".rehearsal"
        with own_code(session):
            rehearsal = rehearse_run(
                session, prepared, training.checkpoints, scratch, training.learning_rate(1), display.echo
            )
            try_family(session)
        for line in told(rehearsal, plan):
            display.echo(line)
        watch.expect(plan.gradient_accumulation_steps * rehearsal.step_s)
        if compiles:
            cache.share()
        start.rehearsal = rehearsal.parts_s
        start.ended("rehearsal")
        training.stop_if(training.stopping(), "after the rehearsal, before the first step")
        if reference is not None:
            watch.at(0, "reference")
            trained_on = training.sampler.order(0)[: training.steps * job.batch.global_size]
            done = reference.ask(
                session.loss, session.split, plan.micro_batch_size, display.asked, training.stopping, trained_on
            )
            session.strategy.settle(session.loss)
            start.ended("reference")
            training.stop_if(not done, "before the first step; what the model said so far is kept")
        training.resume()
        start.ended("resume")
        training.run()
        if job.checkpoint.load_best:
            training.load_best()
    return session, training.outcome(rehearsal, kernel)


class Training:
    """The steps of a run, from where its newest whole checkpoint leaves off."""

    def __init__(
        self, session: Session, prepared: PreparedData, run_dir: Path, job_hash: str, held_out: HeldOut,
        stop: StopSignal, display: Display, watch: Watchdog, start: Start,
    ):
        self.start = start
        self.session, self.prepared, self.run_dir, self.job_hash = session, prepared, run_dir, job_hash
        self.held_out, self.stop, self.display, self.watch = held_out, stop, display, watch
        job, rows = session.job, prepared.train
        epochs = job.epochs if job.max_steps is None else math.inf
        self.sampler = BatchSampler(len(rows), job.batch.global_size, job.seed, epochs, rows.fingerprint)
        self.steps = job.max_steps or self.sampler.total_steps()
        self.save_every = checkpoint_interval(job, self.steps)
        self.evaluate_every = evaluation_interval(job, self.steps)
        self.folder = run_dir / "checkpoints"
        self.checkpoints = Checkpoints(session.world, session.strategy.placed)
        self.resumed_after = self.tokens = self.trained_tokens = 0
        self.resumed_row: dict[str, Any] | None = None
        """Of that step: it is logged after its checkpoint is begun, and may be lost between the two."""
        self.resumed_tokens = self.resumed_trained_tokens = 0
        self.busy_s = self.input_s = 0.0
        self.eval_loss: float | None = None
        self.losses = HeldOutLosses()
        self.left_out = False
        """A request to stop came before the last evaluation that was due: it is made up for when the run goes on."""
        self.recompilations = 0
        self.graphs_before = cache_counts()
        """Of what else this process compiled, as another run."""
        self.taken: dict[str, Any] | None = None
        """What the checkpoint says whose weights load_best took."""

    def learning_rate(self, step: int) -> float:
        job = self.session.job
        return learning_rate(step, self.steps, job.optimizer, peak_rate(job, self.session.plan.method))

    def stopping(self) -> bool:
        """Whether any rank was asked to stop, or could not write its part of a checkpoint."""
        return self.session.world.any(self.stop.requested or self.checkpoints.failed)

    def stop_if(self, asked: bool, where: str) -> None:
        """Raise StoppedOnRequest, on all ranks together, once what was being saved is there."""
        if asked:
            self.checkpoints.wait()
            raise StoppedOnRequest(f"{self.stop.message} ({where})", agreed=True)

    def resume(self) -> None:
        """From the newest whole checkpoint, if there is one."""
        found = newest_whole(self.folder, self.job_hash, self.display.echo, self.session.world)
        if found is None:
            return
        self.watch.at(0, "load")
        state = self.checkpoints.load(found.folder, self.session.trained, self.session.optimizer)
        self.sampler.load_state_dict(state["sampler"])
        self.losses = HeldOutLosses(**state.get("held_out", {}))  # of checkpoints before 2026-12 there is none
        self.left_out = state.get("evaluation_left_out", False)
        self.resumed_after, self.resumed_row = state["step"], state.get("row")
        self.tokens = self.resumed_tokens = state["tokens"]
        self.trained_tokens = self.resumed_trained_tokens = state["trained_tokens"]
        self.display.echo(f"resuming after step {state['step']} of {self.steps} from {found.folder}")

    def run(self) -> None:
        """All steps that are left, evaluated and saved when it is time."""
        world, first = self.session.world, self.resumed_after + 1
        log = MetricsLog(self.run_dir / "metrics.jsonl", self.resumed_after, world.lead, self.resumed_row)
        tracker = open_tracker(self.session.job, self.run_dir, self.job_hash, world.lead, self.display.echo)
        compiled, position = graphs_compiled(), self.sampler.state_dict()
        self.start.ended("records")
        try:
            if self.left_out:
                self._make_up(log, tracker, position)
            self._end_at(self.resumed_after)
            log.amend(self.resumed_after, {"steps": self.steps})
            self.display.start(self.steps, self.resumed_after)
            self.start.ended("resume")
            throughput = Throughput()
            for step, indices in zip(range(first, self.steps + 1), self.sampler, strict=False):
                before, position = position, self.sampler.state_dict()
                row = self._step(step, indices, before, throughput)
                if not self.start.is_over:
                    self.start.ended("first_step")
                    self.display.echo(self.start.sentence())
                row |= self._evaluate(step)
                self._end_at(step)
                asked = self.stopping()
                if asked or step % self.save_every == 0 or step == self.steps:
                    row["save_stall_s"] = self._save(step, position, row)
                log.append({**row, "steps": self.steps})  # so that who follows a run from elsewhere knows its end
                logging.getLogger("loadmaster").info(f"step {step} of {self.steps}: {row}")
                tracker.log({k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}, step)
                self._show(row, graphs_compiled() - compiled)
                self.stop_if(asked, f"checkpoint saved after step {step} of {self.steps}")
                throughput.pause()
                if step == self.steps:
                    break
            self.watch.at(self.steps, "save")
            self.checkpoints.wait()
        finally:
            self.display.stop()
            log.close()
            tracker.close()
        if (saves := self.checkpoints.figures()) is not None:
            self.display.echo(saving_sentence(saves))

    def _make_up(self, log: MetricsLog, tracker: Any, position: dict[str, Any]) -> None:
        """The evaluation that a request to stop left out; checkpoint and log are then as if nobody had stopped."""
        step = self.resumed_after
        found = self._evaluate(step)
        self.stop_if(self.left_out, f"step {step} of {self.steps} is yet to be evaluated")
        if found:
            log.amend(step, found)
            tracker.log({} if self.eval_loss is None else found, step)
            self._save(step, position)

    def _end_at(self, step: int) -> None:
        """Make `step` the last one where evaluation.patience is at its end."""
        patience, losses = self.session.job.evaluation.patience, self.losses
        if patience is None or losses.in_vain < patience or step == self.steps:
            return
        last = "the last evaluation" if losses.in_vain == 1 else f"the last {losses.in_vain} evaluations"
        found, best = "finite held-out loss", ""
        if losses.lowest is not None:
            found = f"lower held-out loss than {losses.lowest:.4f} at step {losses.step}"
            if not self.session.job.checkpoint.load_best:
                best = "; checkpoint.load_best=true takes the best checkpoint's weights"
        self.display.echo(
            f"training ends after step {step} of {self.steps}: {last} found no {found} (evaluation.patience){best}"
        )
        self.steps = step

    def load_best(self) -> None:
        """The weights of the checkpoint with the lowest held-out loss, in the place of the last ones."""
        found = best_whole(self.folder, self.job_hash, self.display.echo, self.session.world)
        if found is None:
            self.display.echo("no checkpoint has a held-out loss: the last weights are taken (checkpoint.load_best)")
            return
        if self.losses.lowest is not None and found.state["eval_loss"] > self.losses.lowest:
            gone = f"step {self.losses.step} had the lowest held-out loss, {self.losses.lowest:.4f}, and no checkpoint"
            self.display.echo(f"{gone} of it is there (checkpoint.every_steps, keep_best): the best of the others")
        if found.state["step"] == self.steps:
            return
        self.watch.at(self.steps, "load")
        self.taken = self.checkpoints.load(found.folder, self.session.trained, self.session.optimizer)
        said = f"step {self.taken['step']} of {self.steps} has the lowest held-out loss, {self.taken['eval_loss']:.4f}"
        self.display.echo(f"{said}: its weights are taken (checkpoint.load_best)")

    def _step(
        self, step: int, indices: Sequence[int], before: dict[str, Any], throughput: Throughput
    ) -> dict[str, Any]:
        """Take a step, or leave it out where its loss or gradients are not finite; returns its row of metrics.jsonl.

        before: the sampler's position until this step, for a checkpoint where too many were left out.
        """
        session, world = self.session, self.session.world
        self.watch.at(step, "step")
        began = time.perf_counter()
        picked = [self.prepared.train[i] for i in indices]
        batches, count = session.split(picked), max(1, sum(losses(r, session.job.objective) for r in picked))
        self.input_s += time.perf_counter() - began
        lr = self.learning_rate(step)
        loss, norm = session.gradients(batches, count, lr)
        row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            session.optimizer.step(lr)
            session.skipped.clear()
        else:
            skip(session, row, picked, lambda: (self._save(step - 1, before), self.checkpoints.wait()))
            row["loss"] = row["grad_norm"] = None
        tokens = sum(map(len, picked))
        self.tokens += tokens
        self.trained_tokens += sum(map(trained_tokens, picked))
        self.busy_s += time.perf_counter() - began
        self.watch.worked(session.worked_s)
        row |= {name: value if math.isfinite(value) else None for name, value in session.preference.items()}
        row |= {
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "tokens_per_second": round(throughput.update(tokens), 2),
        }
        if world.size > 1:
            row["step_s_by_rank"] = [round(s, 4) for s in world.gather(session.worked_s)]
        return row

    def _evaluate(self, step: int) -> dict[str, float | None]:
        self.eval_loss, self.left_out = None, False
        due = self.evaluate_every and (step % self.evaluate_every == 0 or step == self.steps)
        if not due or self.prepared.validation is None:
            return {}
        self.watch.at(step, "evaluate")
        figures = self.held_out(self.session, self.stopping)
        self.session.strategy.settle(self.session.loss)
        if figures is None:
            self.left_out = True
            return {}
        self.eval_loss = figures["loss"] if math.isfinite(figures["loss"]) else None
        self.losses.add(self.eval_loss, step)
        return {"eval_loss": self.eval_loss}

    def _save(self, step: int, position: dict[str, Any], row: dict[str, Any] | None = None) -> float:
        """Begin to; returns for how many seconds the loop waited. row: the step's, where it is not logged yet."""
        state = {
            "step": step,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "sampler": position,
            "job_hash": self.job_hash,
            "eval_loss": self.eval_loss,
            "held_out": asdict(self.losses),
            "evaluation_left_out": self.left_out,
            "row": row and dict(row),
        }
        session = self.session
        keep = (session.job.checkpoint.keep_last, session.job.checkpoint.keep_best)
        self.watch.at(step, "save")
        self.checkpoints.save(self.folder / f"step-{step}", session.trained, session.optimizer, state, keep)
        waited_s = self.checkpoints.stalls_s[-1]
        logging.getLogger("loadmaster").info(f"step {step}: saving; the loop waited {waited_s:.3f} s")
        return round(waited_s, 4)

    def _show(self, row: dict[str, Any], recompilations: int) -> None:
        if row["loss"] is not None:
            self.display.step(row, self.steps, peak_memory(self.session.device)["peak_allocated_gib"])
        if self.session.plan.compile and recompilations > self.recompilations:
            self.recompilations = recompilations
            since = f"{counted(recompilations, 'graph')} since the rehearsal"
            self.display.echo(f"step {row['step']} compiled anew ({since})")
        if self.session.world.lead and (straggler := self.watch.straggler()) is not None:
            self.display.echo(straggler)

    def outcome(self, rehearsal: Rehearsed, attention: str) -> Outcome:
        nothing = {"loss": None, "tokens_per_second": 0.0}  # metrics.jsonl was lost after the last step
        logged = read_metrics(self.run_dir / "metrics.jsonl") or [nothing]
        tokens, trained = self.tokens - self.resumed_tokens, self.trained_tokens - self.resumed_trained_tokens
        rate = tokens / self.busy_s if self.busy_s else logged[-1]["tokens_per_second"]
        share = trained / tokens if tokens else self.trained_tokens / self.tokens  # no step was left to this process
        return Outcome(
            steps=self.steps,
            train_loss=recent_loss(logged),
            eval_loss=self.taken["eval_loss"] if self.taken else logged[-1].get("eval_loss"),
            tokens_per_second=rate,
            trained_tokens_per_second=rate * share,
            rehearsal=rehearsal,
            peaks=most(self.session.world.gather(peak_memory(self.session.device))),
            saves=self.checkpoints.figures(),
            recompilations=self.recompilations,
            input_share=self.input_s / self.busy_s if self.busy_s else 0.0,
            attention_kernel=attention,
            resumed_after=self.resumed_after,
            taken_step=self.taken["step"] if self.taken else self.steps,
            start_s=self.start.figures(),
            compiler_cache={kind: count - self.graphs_before[kind] for kind, count in cache_counts().items()},
        )
