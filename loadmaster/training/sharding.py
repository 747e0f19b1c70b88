"""How a model is spread over the processes of a world, as the plan says.

    none   one process holds everything
    ddp    each process holds everything; gradients are summed
    fsdp   FSDP2: each holds a share of every parameter, its gradient and its optimizer states. A decoder layer is
           gathered whole when it is needed, forward and backward, and dropped after; embeddings, last norm and head
           stay whole from the forward to the end of the backward pass, for the loss uses the head by itself.
           On several nodes, where the plan says so, each node has all shards (hybrid sharding):
           weights then travel inside the node, and between nodes only gradients do.
    zero3  fsdp over all ranks, never hybrid
    zero2  weights are gathered once a step and stay whole until its end; gradients are reduced to shares after each
           micro-batch; optimizer states are shares
    zero1  as zero2, but gradients add up whole over the micro-batches and are reduced once a step

The ZeRO stages (Rajbhandari et al. 2020) are settings of the one engine, so every method, optimizer and checkpoint
goes with each of them.

Gradients are sums over ranks of what each rank's part of the loss gives, so any split of a batch has the same gradient.
A Strategy is all that the loop knows of it; another engine is another Strategy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loadmaster.config.schema import Job
from loadmaster.errors import TrainingFailed
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.compiled import compile_layers
from loadmaster.models.float8 import train_in_fp8
from loadmaster.models.forward import causal_lm, decoder_layers
from loadmaster.models.frozen import frozen_form
from loadmaster.models.load import DTYPES, load_base, load_trained
from loadmaster.models.preference import loss_module
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.plan import Plan
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed, local
from loadmaster.training.rng import seed_everything
from loadmaster.training.world import World


def shard_mesh(plan: Plan) -> tuple[int, int]:
    """(replicas, shards) of a sharded plan: over all GPUs, or over each node's (hybrid), as the plan says."""
    return plan.replicas, plan.world_size // plan.replicas


class Strategy:
    """One process with everything; the base of the others."""

    def __init__(self, job: Job, plan: Plan, world: World):
        self.job, self.plan, self.world = job, plan, world
        self.frozen = frozen_form(plan.method, plan.precision)
        self.dtype = DTYPES[plan.precision]
        self.placed = Placed()

    def load(self, folder: Path) -> nn.Module:
        """The base model on this process's device."""
        return load_base(folder, self.dtype, self.world.device, self.frozen)

    def prepare(self, base: nn.Module) -> tuple[nn.Module, nn.Module]:
        """(model as it is trained, module whose forward is a batch's summed loss), wrapped and checked."""
        model = self.with_trained_part(base)
        checkpoint_activations(model, self.plan.activation_checkpointing)
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
        return TrainingOptimizer(
            trainable(model), self.job.optimizer, self.plan.optimizer, self.plan.master_weights,
            offload=self.plan.offload == "optimizer", sum_over_shards=self.sum_over_shards,
            b_lr_ratio=self.job.lora.b_lr_ratio,
        )  # fmt: skip

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

    @staticmethod
    def generating(loss: nn.Module) -> AbstractContextManager[Any]:
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


class Replicated(Strategy):
    """DistributedDataParallel. It averages over ranks what is to be summed; the loss is multiplied to undo that."""

    def wrap(self, loss: nn.Module) -> nn.Module:
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(loss, device_ids=devices)

    def check(self, loss: nn.Module) -> None:
        if not isinstance(loss, nn.parallel.DistributedDataParallel):
            raise TrainingFailed(f"the plan says ddp, and the model is a {type(loss).__name__}")

    def backward(self, loss: Tensor) -> None:
        (loss * self.world.size).backward()

    def accumulating(self, loss: nn.Module) -> AbstractContextManager[Any]:
        return loss.no_sync()


class FullyShard(Strategy):
    """FSDP2, over one dimension of ranks or over nodes x GPUs; the ZeRO stages are settings of it."""

    def __init__(self, job: Job, plan: Plan, world: World):
        super().__init__(job, plan, world)
        from torch.distributed.device_mesh import init_device_mesh

        replicas, shards = shard_mesh(plan)
        if replicas * shards != world.size or (replicas > 1 and shards != world.local_size):
            raise TrainingFailed(f"a mesh of {replicas} x {shards} does not fit {world.size} processes")
        shape, names = ((replicas, shards), ("replica", "shard")) if replicas > 1 else ((shards,), ("shard",))
        self.mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self.parameter_device = torch.device("cpu") if plan.offload == "all" else world.device
        self.placed = Placed(self.mesh)
        self.folder: Path | None = None
        self.keeps_weights = plan.sharding in ("zero1", "zero2")

    def load(self, folder: Path) -> nn.Module:
        from loadmaster.models.shards import empty_model

        self.folder = folder
        return empty_model(folder, self.dtype, self.frozen)

    def with_trained_part(self, base: nn.Module) -> nn.Module:
        from loadmaster.models.shards import with_adapter

        add = super().with_trained_part
        return add(base) if self.plan.method == "full" else with_adapter(base, add)

    def wrap(self, loss: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        from loadmaster.models.shards import fill, materialise

        cuda = self.world.device.type == "cuda"
        settings = {
            "mesh": self.mesh,
            # Weights are stored in the compute dtype (fp32 masters are the optimizer's); gradients are summed in fp32.
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if self.plan.offload == "all" else OffloadPolicy(),
        }
        layers = decoder_layers(loss)
        for layer in layers:
            fully_shard(layer, **settings, reshard_after_forward=not self.keeps_weights)
        fully_shard(loss, **settings, reshard_after_forward=False)
        for module in (loss, *layers):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for here, following in itertools.pairwise(layers):
            here.set_modules_to_forward_prefetch([following])
        materialise(loss, self.parameter_device)
        for _, buffer in loss.named_buffers():
            buffer.data = buffer.data.to(self.world.device)
        fill(loss.module, self.folder, self.dtype)
        return loss

    @contextmanager
    def _accumulating(self, loss: nn.Module) -> Iterator[None]:
        """zero1, zero2: weights stay whole from one micro-batch to the next; zero1: so do gradients."""
        reduces = self.plan.sharding != "zero1"
        loss.set_reshard_after_backward(False)
        loss.set_requires_gradient_sync(reduces)
        try:
            yield
        finally:
            loss.set_reshard_after_backward(True)
            loss.set_requires_gradient_sync(True)

    def accumulating(self, loss: nn.Module) -> AbstractContextManager[Any]:
        return self._accumulating(loss) if self.keeps_weights else nullcontext()

    def check(self, loss: nn.Module) -> None:
        for name, parameter in loss.named_parameters():
            if not isinstance(parameter, DTensor) or parameter.device_mesh != self.mesh:
                raise TrainingFailed(
                    f"the plan says {self.plan.sharding}, and {name} is not sharded over its {self.world.size} ranks"
                )
            if local(parameter).device.type != self.parameter_device.type:
                raise TrainingFailed(f"the plan says offload={self.plan.offload}, and {name} is on {parameter.device}")

    def settle(self, loss: nn.Module) -> None:
        for module in loss.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def sum_over_shards(self, squares: Tensor) -> Tensor:
        total = squares.clone()
        torch.distributed.all_reduce(total, group=self.mesh.get_group("shard"))
        return total

    @staticmethod
    def generating(loss: nn.Module) -> AbstractContextManager[Any]:
        return _Unsharded(loss)

    def for_evaluation(self, base_folder: Path, trained_folder: Path | None) -> tuple[nn.Module, nn.Module]:
        from loadmaster.models.shards import fill_adapter

        adapter = trained_folder is not None and (trained_folder / "adapter_config.json").is_file()
        base = self.load(base_folder if adapter or trained_folder is None else trained_folder)
        model = self.with_trained_part(base) if adapter else base
        loss = self.wrap(self.loss(model.requires_grad_(False)))
        if adapter:
            fill_adapter(model, trained_folder)
        self.check(loss)
        return model.eval(), loss


class _Unsharded:
    """Embeddings, norm and head whole within the block; layers gather themselves when they are called."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __enter__(self) -> None:
        self.root.unshard()

    def __exit__(self, *_: object) -> None:
        self.root.reshard()


STRATEGIES: dict[str, type[Strategy]] = {
    "none": Strategy,
    "ddp": Replicated,
    **dict.fromkeys(("fsdp", "zero1", "zero2", "zero3"), FullyShard),
}
"""What each sharding of a plan is done by; one that is not here is refused."""
