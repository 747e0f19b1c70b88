"""What the loop works on, built once from job and plan: model, strategy, optimizer, and the way to a step's gradients.

The loss of a step is the sum of its trained tokens' cross-entropies over their number, over all micro-batches and
ranks, so however a batch is split its gradient is the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loadmaster.config.schema import Job
from loadmaster.data import MicroBatch
from loadmaster.errors import ConfigError, LoadmasterError, Problem, TrainingFailed
from loadmaster.models import flash
from loadmaster.models.adapters import trainable
from loadmaster.models.apart import refuse_mixing
from loadmaster.models.capped import runs_fused
from loadmaster.models.forward import causal_lm
from loadmaster.models.load import config_of
from loadmaster.models.preference import FIGURES, mean_figures, preference_figures
from loadmaster.out_of_memory import ran_out
from loadmaster.preflight.families import FAMILIES
from loadmaster.preflight.plan import Plan
from loadmaster.training.batches import micro_batches
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.rng import restore_rng, rng_state
from loadmaster.training.sharding import STRATEGIES
from loadmaster.training.strategy import Strategy
from loadmaster.training.world import World
from loadmaster.training.zero import ZeroOptimizer
from loadmaster.words import counted

BUILT = {
    "sharding": tuple(STRATEGIES),
    "activation_checkpointing": ("none", "selective", "full", "offload"),
}
"""What a plan may say and this loop does; other values are refused."""


@dataclass
class Session:
    job: Job
    plan: Plan
    world: World
    strategy: Strategy
    model: nn.Module
    loss: nn.Module
    optimizer: TrainingOptimizer | ZeroOptimizer
    pad_token_id: int
    skipped: list[dict[str, Any]] = field(default_factory=list)
    preference: dict[str, float] = field(default_factory=dict)
    """Figures of the last step's preferences; {} for sft."""
    worked_s: float = 0.0
    """This rank's own part of the last step, without what it waited for others: a straggler is told by it.

    Processor seconds on a CPU; on a GPU the seconds of the forward passes, which under fsdp wait for weights too.
    """

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of what is trained; sharded, a parameter is a DTensor."""
        return trainable(self.model)

    @property
    def fixed_length(self) -> int | None:
        """Tokens that every row is padded to; None where shapes may differ from batch to batch."""
        return self.job.sequence_length if self.device.type == "cuda" or self.plan.compile else None

    def split(self, rows: list) -> list[MicroBatch]:
        return micro_batches(
            rows, self.plan.micro_batch_size, self.world.rank, self.world.size, self.pad_token_id, self.fixed_length
        )

    def backward(self, batches: list[MicroBatch], count: int) -> torch.Tensor:
        """Accumulate the step's gradients; returns the step's mean loss, fp32 scalar, over all ranks.

        count: trained tokens (or pairs, or labelled answers) of the step on all ranks, over which the mean is taken.
        """
        self.model.train()
        mean = torch.zeros((), device=self.device)
        figures = torch.zeros(FIGURES, device=self.device)
        clock = OwnTime(self.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.strategy.accumulating(self.loss):
                with clock.forward():
                    loss = self.loss(batch) / count
                self.strategy.backward(loss)
            mean += loss.detach()
            if self.job.objective != "sft":
                figures += preference_figures(self.loss)
        total = self.world.sum(mean)
        if self.job.objective != "sft":
            self.preference = mean_figures(self.world.sum(figures))
        self.worked_s = clock.seconds()
        return total

    def gradients(self, batches: list[MicroBatch], count: int, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss, gradients' norm before clipping) of a step that is to be taken at rate `lr`; fp32 scalars.

        Under optimizer.in_backward it is taken when this returns; else `optimizer.step(lr)` takes it.
        """
        self.optimizer.begin(lr)
        loss = self.backward(batches, count)
        return loss, self.optimizer.clip(self.job.optimizer.max_grad_norm)


class OwnTime:
    """How long a rank works on a step by itself."""

    def __init__(self, device: torch.device):
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._cuda = device.type == "cuda"
        self._began = time.process_time()

    @contextmanager
    def forward(self) -> Iterator[None]:
        if not self._cuda:
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def seconds(self) -> float:
        if not self._cuda:
            return time.process_time() - self._began
        self._events[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in self._events) / 1000


def make_session(
    job: Job,
    plan: Plan,
    world: World,
    pad_token_id: int,
    base_folder: Path | None = None,
    base: nn.Module | None = None,
) -> Session:
    """Load (or take `base`), freeze, checkpoint, shard and check, in this order; the optimizer comes last.

    Raises ConfigError for a plan that this loop does not do, or that is for another number of processes.
    """
    refuse_unbuilt(plan)
    refuse_other_world(plan, world)
    strategy = STRATEGIES[plan.sharding](job, plan, world)
    model, loss = strategy.prepare(strategy.load(base_folder) if base is None else base)
    return Session(job, plan, world, strategy, model, loss, strategy.optimizer(model), pad_token_id)


def compiles_some(plan: Plan, base_folder: Path, device: torch.device) -> bool:
    """Whether a run compiles anything: layers, or what compiles itself, a step of adamw_bf16 and capped attention."""
    return plan.compile or plan.optimizer == "adamw_bf16" or runs_fused(config_of(base_folder), device)


@contextmanager
def attention_kernel(session: Session, echo: Callable[[str], None]) -> Iterator[str]:
    """The name of what packed attention runs within the block, on all ranks: FlashAttention 3 or 4 where it is there
    and found right on each (models/flash.py), else PyTorch's own.

    Enter it before anything is compiled or rehearsed. Generators and, at the end, PyTorch's kernel are put back.
    """
    generators = rng_state()
    mine = flash.tried(session.model, session.strategy.dtype, session.device, session.job.sequence_length)
    restore_rng(*generators)
    active = mine[0] is not None and mine[1] is None
    try:
        package, said = flash.agreed(session.world.gather(mine))
        if active and package is None:
            active = False
            flash.restore()
        if said:
            echo(said)
        yield package.impl if package else flash.own_kernel(causal_lm(session.model).config, session.device)
    finally:
        if active:
            flash.restore()


def try_family(session: Session) -> None:
    """Raise LoadmasterError for a model that does not keep packed documents apart; families that are modelled do, by
    tests. All ranks call it, once the model has run."""
    if session.plan.model.family in FAMILIES:
        return
    with session.strategy.generating(session.loss):
        refuse_mixing(session.model, session.job.sequence_length)
    session.strategy.settle(session.loss)


@contextmanager
def own_code(session: Session) -> Iterator[None]:
    """Raises LoadmasterError for an error within the block of a family that is not modelled: nobody has tried its code
    with packed documents, adapters on all its linear layers, or a frozen base."""
    try:
        yield
    except (LoadmasterError, OSError, MemoryError):
        raise
    except Exception as error:
        family = session.plan.model.family
        if family in FAMILIES or ran_out(error):
            raise
        said = next(iter(str(error).strip().splitlines()), "")
        fix = "a model of another family; those in docs/preflight.md are tested"
        if session.plan.method != "full":
            fix += ". Where its adapters or its quantized base are what fails, method=full"
        raise LoadmasterError(
            f"models of type {family!r} cannot be trained here: a step of this one failed "
            f"({type(error).__name__}: {said})\n    fix: {fix}"
        ) from error


def skip(session: Session, row: dict[str, Any], picked: list, save: Callable[[], Any]) -> None:
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
        f"the {what} was not finite in {counted(len(session.skipped), 'step')} in a row, from step {first['step']} "
        f"on; {weights}, saved in checkpoints/step-{row['step'] - 1}. "
        f"Rows of that step: {', '.join(first['rows'][:8])}{' ...' if len(first['rows']) > 8 else ''}.\n"
        "fix: look at these rows, lower optimizer.lr, or raise optimizer.warmup_ratio (warmup_steps)"
    )


def refuse_other_world(plan: Plan, world: World) -> None:
    """A plan for several GPUs is not trained on one of them in silence, nor the other way round."""
    if world.size != plan.world_size:
        message = f"the plan's number of processes is {plan.world_size} and this run's is {world.size}"
        remedy = "start as many as the plan has, or hardware.count and hardware.nodes for what was started"
        raise ConfigError([Problem("hardware.count", plan.hardware.count, "the plan (plan.json)", message, remedy)])


def refuse_unbuilt(plan: Plan) -> None:
    """Raise ConfigError for what a plan may say and this loop does not do; nothing is silently replaced."""
    problems = [
        Problem(
            key,
            getattr(plan, key),
            "the plan (plan.json)",
            f"training does not do {key}={getattr(plan, key)}; it is planned, not built",
            f"{key}={' or '.join(built)}",
        )
        for key, built in BUILT.items()
        if getattr(plan, key) not in built
    ]
    if plan.optimizer_in_backward and (
        plan.gradient_accumulation_steps != 1 or plan.sharding not in ("none", "fsdp") or plan.offload != "none"
    ):
        message = "the optimizer steps in the backward pass of one micro-batch, with none or fsdp and without offload"
        remedy = "gradient_accumulation_steps=1, sharding=none or fsdp, offload=none"
        problems.append(Problem("optimizer_in_backward", True, "the plan (plan.json)", message, remedy))
    if problems:
        raise ConfigError(problems)
