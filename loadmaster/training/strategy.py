"""What the loop knows of how a model is spread over processes; the ways to spread it are subclasses (sharding.py).

Gradients are sums over ranks of what each rank's part of the loss gives, so any split of a batch has the same gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loadmaster.config.schema import Job
from loadmaster.errors import TrainingFailed
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.compiled import compile_layers
from loadmaster.models.float8 import train_in_fp8
from loadmaster.models.forward import causal_lm
from loadmaster.models.frozen import frozen_form
from loadmaster.models.load import DTYPES, load_base, load_trained
from loadmaster.models.preference import loss_module
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.plan import Plan
from loadmaster.training import allocator
from loadmaster.training.in_backward import BackwardOptimizer
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed
from loadmaster.training.rng import seed_everything
from loadmaster.training.world import World


class Strategy:
    """One process with everything; the base of the others."""

    def __init__(self, job: Job, plan: Plan, world: World):
        self.job, self.plan, self.world = job, plan, world
        self.frozen = frozen_form(plan.method, plan.precision)
        self.dtype = DTYPES[plan.precision]
        self.placed = Placed()
        self.allocator = allocator.settle(world.device)
        """How memory of a GPU is taken, from before the model is there; nothing of a CPU."""

    def load(self, folder: Path) -> nn.Module:
        """The base model on this process's device."""
        return load_base(folder, self.dtype, self.world.device, self.frozen)

    def prepare(self, base: nn.Module) -> tuple[nn.Module, nn.Module]:
        """(model as it is trained, module whose forward is a batch's summed loss), wrapped and checked."""
        model = self.with_trained_part(base)
        checkpoint_activations(model, self.plan.activation_checkpointing, self.plan.kept_layers)
        if self.plan.compile:
            compile_layers(model)
        causal_lm(model).neftune_alpha = self.job.neftune_alpha
        loss = self.wrap(self.loss(model))
        self.check(loss)
        return model, loss

    def with_trained_part(self, base: nn.Module) -> nn.Module:
        seed_everything(self.job.seed)  # an adapter's first values: the same on every rank, however the base was read
        model = make_trainable(base, self.plan.method, self.job.lora)
        if (self.plan.method, self.plan.precision) == ("full", "fp8"):
            train_in_fp8(model, self.world.device)
        return model

    def loss(self, model: nn.Module) -> nn.Module:
        return loss_module(model, self.job.objective, self.job.preference)

    def wrap(self, loss: nn.Module) -> nn.Module:
        return loss

    def check(self, loss: nn.Module) -> None:
        """Raise TrainingFailed unless what the plan says is what is there."""
        if self.world.size != 1:
            raise TrainingFailed(f"sharding=none, and there are {self.world.size} processes; use ddp or fsdp")

    def optimizer(self, model: nn.Module) -> TrainingOptimizer:
        kind = BackwardOptimizer if self.plan.optimizer_in_backward else TrainingOptimizer
        return kind(
            trainable(model), self.job.optimizer, self.plan.optimizer, self.plan.master_weights,
            offload=self.plan.offload == "optimizer", sum_over_shards=self.sum_over_shards,
            b_lr_ratio=self.job.lora.b_lr_ratio, compiled=self.plan.compile,
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def accumulating(self, loss: nn.Module) -> AbstractContextManager[Any]:
        """Around every micro-batch of a step but the last."""
        return nullcontext()

    def settle(self, loss: nn.Module) -> None:
        """After a forward pass without a backward one: the next reads the parameters anew."""

    def sum_over_shards(self, squares: Tensor) -> Tensor:
        """The sum over the ranks that together hold each trained parameter once."""
        return squares

    def generating(self, loss: nn.Module) -> AbstractContextManager[Any]:
        """Around calls of the model that do not go through the loss module."""
        return nullcontext()

    def for_evaluation(self, base_folder: Path, trained_folder: Path | None) -> tuple[nn.Module, nn.Module]:
        """(model, module whose forward is a batch's summed loss) as trained, or without what was trained."""
        how = (self.dtype, self.world.device, self.frozen)
        if trained_folder is None:
            model = load_base(base_folder, *how).eval()
        else:
            model = load_trained(base_folder, trained_folder, *how)
        return model, self.loss(model)

    def let_go(self, loss: nn.Module) -> None:
        """Before what `for_evaluation` gave is dropped: free what would stay."""
