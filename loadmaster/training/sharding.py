"""How a model is spread over the processes of a world, as the plan says.

    none   one process holds everything
    ddp    each process holds everything; gradients are summed
    fsdp   FSDP2: each holds a share of every parameter, its gradient and its optimizer states. A decoder layer is
           gathered whole when it is needed, forward and backward, and dropped after; the embedding in the forward pass
           alone, for its gradient does without it; the head for the loss and its backward pass. An embedding and a head
           that share their weight, or are trained beside an adapter, are whole from the forward to the end of the
           backward pass, as the last norm is.
           Where the plan says reshard_after_forward=false, layers and embedding are gathered once a step and stay whole
           until their backward pass in its last micro-batch.
           On several nodes, where the plan says so, each node has all shards (hybrid sharding):
           weights then travel inside the node, and between nodes only gradients do.
    zero1, zero2, zero3   DeepSpeed (zero.py)

A Strategy (strategy.py) is all that the loop knows of it; another engine is another Strategy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loadmaster.config.schema import Job
from loadmaster.errors import TrainingFailed
from loadmaster.models.forward import causal_lm, decoder_layers
from loadmaster.models.loss import run_with_head
from loadmaster.preflight.plan import Plan
from loadmaster.training.placement import Placed, local
from loadmaster.training.strategy import Strategy
from loadmaster.training.world import World
from loadmaster.training.zero import Zero


class Replicated(Strategy):
    """DistributedDataParallel. It averages over ranks what is to be summed; the loss is multiplied to undo that."""

    def wrap(self, loss: nn.Module) -> nn.Module:
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        # A frozen base's scales, alike on all ranks, would be sent before each step.
        loss._ddp_params_and_buffers_to_ignore = [name for name, _ in loss.named_buffers()]
        return nn.parallel.DistributedDataParallel(loss, device_ids=devices)

    def check(self, loss: nn.Module) -> None:
        if not isinstance(loss, nn.parallel.DistributedDataParallel):
            raise TrainingFailed(f"the plan says ddp, and the model is a {type(loss).__name__}")

    def backward(self, loss: Tensor) -> None:
        (loss * self.world.size).backward()

    def accumulating(self, loss: nn.Module) -> AbstractContextManager[Any]:
        return loss.no_sync()


@contextmanager
def codes_without_gradients() -> Iterator[None]:
    """Within the block a new parameter of integers (a frozen base's codes) needs no gradient, which it could not have.

    torch 2.11's fully_shard makes every shard a parameter that needs one, and takes that back in its next line.
    """
    made = nn.Parameter.__new__

    def make(cls: type, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        return made(cls, data, requires_grad and (data is None or data.is_floating_point() or data.is_complex()))

    nn.Parameter.__new__ = staticmethod(make)
    try:
        yield
    finally:
        nn.Parameter.__new__ = staticmethod(made)


class FullyShard(Strategy):
    """FSDP2, over one dimension of ranks or over nodes x GPUs."""

    def __init__(self, job: Job, plan: Plan, world: World):
        super().__init__(job, plan, world)
        from torch.distributed.device_mesh import init_device_mesh

        replicas, shards = plan.replicas, plan.world_size // plan.replicas
        if replicas * shards != world.size or (replicas > 1 and shards != world.local_size):
            raise TrainingFailed(f"a mesh of {replicas} x {shards} does not fit {world.size} processes")
        shape, names = ((replicas, shards), ("replica", "shard")) if replicas > 1 else ((shards,), ("shard",))
        self.mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self.parameter_device = torch.device("cpu") if plan.offload == "all" else world.device
        self.placed = Placed(self.mesh)
        self.folder: Path | None = None

    def load(self, folder: Path) -> nn.Module:
        from loadmaster.models.shards import empty_model

        self.folder = folder
        return empty_model(folder, self.dtype, self.frozen)

    def with_trained_part(self, base: nn.Module) -> nn.Module:
        from loadmaster.models.shards import with_adapter

        add = super().with_trained_part
        return add(base) if self.plan.method == "full" else with_adapter(base, add)

    def wrap(self, loss: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        from loadmaster.models.shards import fill, materialise

        cuda = self.world.device.type == "cuda"
        settings = {
            "mesh": self.mesh,
            # Weights are stored in the compute dtype (fp32 masters are the optimizer's); gradients are summed in fp32.
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if self.plan.offload == "all" else OffloadPolicy(),
        }
        layers = decoder_layers(loss)
        embedding, head = own_units(causal_lm(loss))
        with codes_without_gradients():
            for module in (*embedding, *layers):
                fully_shard(module, **settings, reshard_after_forward=self.plan.reshard_after_forward)
            for module in (*head, loss):
                fully_shard(module, **settings, reshard_after_forward=False)
        for module in (*embedding, *layers, *head, loss):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        for here, following in itertools.pairwise((*layers, *head)):
            here.set_modules_to_forward_prefetch([following])
        for module in embedding:
            module.set_unshard_in_backward(False)
            module.set_modules_to_backward_prefetch([module])  # itself, so nothing: by default what ran before it
        for module in head:
            module.run = MethodType(run_with_head, module)
            register_fsdp_forward_method(module, "run")
        materialise(loss, self.parameter_device)
        for _, buffer in loss.named_buffers():
            buffer.data = buffer.data.to(self.world.device)
        fill(loss.module, self.folder, self.dtype)
        return loss

    def check(self, loss: nn.Module) -> None:
        for name, parameter in loss.named_parameters():
            if not isinstance(parameter, DTensor) or parameter.device_mesh != self.mesh:
                raise TrainingFailed(
                    f"the plan says fsdp, and {name} is not sharded over its {self.world.size} ranks"
                )
            if local(parameter).device.type != self.parameter_device.type:
                raise TrainingFailed(f"the plan says offload={self.plan.offload}, and {name} is on {parameter.device}")

    def settle(self, loss: nn.Module) -> None:
        _reshard(loss)

    @contextmanager
    def accumulating(self, loss: nn.Module) -> Iterator[None]:
        keeps = not self.plan.reshard_after_forward
        if keeps:
            loss.set_reshard_after_backward(False)
        yield
        if keeps:
            loss.set_reshard_after_backward(True)

    def sum_over_shards(self, squares: Tensor) -> Tensor:
        total = squares.clone()
        torch.distributed.all_reduce(total, group=self.mesh.get_group("shard"))
        return total

    @contextmanager
    def generating(self, loss: nn.Module) -> Iterator[None]:
        """Embedding, norm and head whole within the block; layers gather themselves when they are called.

        The embedding, for it would be gathered for each token, and transformers takes its device for the model's, which
        for shards in host memory is the host. After the block nothing is whole, layers that stay so after a forward
        pass included.
        """
        embedding, _ = own_units(causal_lm(loss))
        for module in (loss, *embedding):
            module.unshard()
        for module in embedding:
            module.set_reshard_after_forward(False)
        try:
            yield
        finally:
            for module in embedding:
                module.set_reshard_after_forward(self.plan.reshard_after_forward)
            _reshard(loss)

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


def own_units(lm: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(the embedding, the head) where each is gathered by itself: not where both have one weight, or a copy of it is
    trained beside an adapter."""
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head.weight is embedding.weight:
        return [], []
    return [embedding] * isinstance(embedding, nn.Embedding), [head] * isinstance(head, nn.Linear)


def _reshard(loss: nn.Module) -> None:
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


STRATEGIES: dict[str, type[Strategy]] = {
    "none": Strategy,
    "ddp": Replicated,
    "fsdp": FullyShard,
    **dict.fromkeys(("zero1", "zero2", "zero3"), Zero),
}
"""What each sharding of a plan is done by; one that is not here is refused."""
