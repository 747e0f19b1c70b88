"""ZeRO by DeepSpeed (Rajbhandari et al. 2020): what a plan's zero1, zero2 and zero3 are done by.

    zero1  optimizer states and fp32 master weights are shares; gradients add up whole and are reduced once a step
    zero2  gradients are shares too, reduced in buckets after each micro-batch
    zero3  weights are shares too; a module gathers what it needs before it runs, forward and backward

Shares are ranges of elements (flat.py), over all ranks. Weights in bf16 always have fp32 masters here, and the only
optimizer is AdamW: others work on matrices or blocks, which a range of elements cuts. With offload=optimizer states
and masters live on the host and are stepped there; with offload=all (zero3) so do the weights.

DeepSpeed's engine does the sharding, gathering, reducing and stepping. Ours stay: the loop, which says where a step
ends; clipping; the rule for gradients that are not finite; loading; and checkpoints, in the form that all share.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.config.schema import Job, OptimizerConfig
from loadmaster.errors import ConfigError, Problem, TrainingFailed
from loadmaster.models.adapters import trainable
from loadmaster.models.forward import causal_lm, decoder_layers
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.zero_settings import ZERO, deepspeed_config, max_live
from loadmaster.training.flat import Cut, FlatPlaced
from loadmaster.training.strategy import Strategy
from loadmaster.training.world import World
from loadmaster.training.zero_patches import (
    add_biases_once,
    cut_again,
    forget_modules,
    gather_apart,
    keep_experts_cut,
    keep_no_input_of_what_is_frozen,
)


def refuse_missing_deepspeed(plan: Plan) -> None:
    """Raise ConfigError where the plan's sharding needs DeepSpeed and it is not installed."""
    if plan.sharding in ZERO and importlib.util.find_spec("deepspeed") is None:
        message = "is done by DeepSpeed, which is not installed here"
        remedy = "pip install 'deepspeed>=0.19.8,<0.20' on every machine, or sharding=fsdp"
        raise ConfigError([Problem("sharding", plan.sharding, "the plan (plan.json)", message, remedy)])


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, for this device, in the process group that is there, quiet, and compiling nothing."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.utils import logger

    add_biases_once()
    gather_apart()
    keep_experts_cut()
    keep_no_input_of_what_is_frozen()
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*_tensor` is deprecated", category=FutureWarning)  # its collectives
    deepspeed.ops.__compatible_ops__ = {}  # or a process on a CPU compiles a collective of inference for a minute
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


class Zero(Strategy):
    """One of DeepSpeed's three stages."""

    def __init__(self, job: Job, plan: Plan, world: World):
        super().__init__(job, plan, world)
        refuse_missing_deepspeed(plan)
        self.stage = ZERO[plan.sharding]
        self.deepspeed = load_deepspeed(world.device)
        self.placed = FlatPlaced(world.rank, world.size, self.stage == 3, self._gathered)
        self.folder: Path | None = None
        self.engine: Any = None

    def _config(self, loss: nn.Module, trained: list[nn.Parameter]) -> dict[str, Any]:
        pin, count = self.world.device.type == "cuda", sum(map(elements, trained))
        sharding, offload, rows = self.plan.sharding, self.plan.offload, self.plan.micro_batch_size
        return deepspeed_config(sharding, offload, pin, count, self._live(loss), rows, self._layer_share(loss))

    def _layer_share(self, loss: nn.Module) -> int:
        """A rank's elements of the largest trained tensor of a decoder layer."""
        trained = (p for layer in decoder_layers(loss) for p in layer.parameters() if p.requires_grad)
        return -(-max(map(elements, trained), default=0) // self.world.size)

    def _live(self, loss: nn.Module) -> int:
        head = elements(causal_lm(loss).get_output_embeddings().weight)
        return max_live(head, max(sum(map(elements, layer.parameters())) for layer in decoder_layers(loss)))

    # ---------------------------------------------------------------- loading

    def load(self, folder: Path) -> nn.Module:
        if self.stage < 3:
            return super().load(folder)
        from loadmaster.models.shards import empty_model

        self.folder = folder
        return empty_model(folder, self.dtype, self.frozen)

    def with_trained_part(self, base: nn.Module) -> nn.Module:
        add = super().with_trained_part
        if self.stage < 3 or self.plan.method == "full":
            return add(base)
        from loadmaster.models.shards import with_adapter

        return with_adapter(base, add)

    def _fill(self, loss: nn.Module, config: dict[str, Any], trained: Path | None = None) -> None:
        """zero3: a decoder layer at a time is whole on each rank, as it is read, and cut; then what is left.

        trained: the adapter's folder, where it was trained before.
        """
        from loadmaster.models.shards import stream

        def cut(part: nn.Module) -> None:
            self.deepspeed.zero.Init(module=part, config_dict_or_path=config)

        stream(loss.module, decoder_layers(loss), self.folder, self.dtype, self.world.device, cut, trained)
        for buffer in loss.buffers():
            buffer.data = buffer.data.to(self.world.device)
        # The loss multiplies with the head by itself, so it has to be whole for as long as the loss runs.
        self.deepspeed.zero.register_external_parameter(loss, causal_lm(loss).get_output_embeddings().weight)

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.detach().to("cpu", copy=True)
        with self.deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True)

    # --------------------------------------------------------------- wrapping

    def wrap(self, loss: nn.Module) -> nn.Module:
        named = trainable(loss)
        config = self._config(loss, [p for _, p in named])
        if self.stage == 3:
            self._fill(loss, config)
            named = trainable(loss)
        basic = adamw(named, self.job.optimizer, self.job.lora.b_lr_ratio)
        self.engine, *_ = self.deepspeed.initialize(model=loss, optimizer=basic, config=config)
        if self.stage == 3:
            loss.register_forward_hook(cut_again)
        return self.engine

    def check(self, loss: nn.Module) -> None:
        """Raise TrainingFailed unless DeepSpeed did what it was asked."""
        found, asked = (loss.zero_optimization_stage(), loss.dp_world_size), (self.stage, self.world.size)
        self._agree(found == asked, f"DeepSpeed does stage {found[0]} over {found[1]} ranks")
        zero = loss.optimizer
        asked = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}[
            self.stage
        ]
        self._agree(type(zero).__name__ == asked, f"DeepSpeed steps by {type(zero).__name__}")
        shares = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        device = "cpu" if self.plan.offload != "none" else self.world.device.type
        for share in shares:
            self._agree(share.device.type == device, f"optimizer states are on {share.device}")
        trained = [p for _, p in trainable(loss)]
        whole, held = sum(map(elements, trained)), sum(share.numel() for share in shares)
        padding = self.world.size * (len(trained) + 2 * len(shares))
        self._agree(held * self.world.size <= whole + padding, f"a rank has the states of {held} of {whole} elements")
        for name, parameter in loss.named_parameters() if self.stage == 3 else ():
            self._check_cut(name, parameter)

    def _check_cut(self, name: str, parameter: nn.Parameter) -> None:
        part = getattr(parameter, "ds_tensor", None)
        cut = part is not None and part.numel() == -(-elements(parameter) // self.world.size)
        self._agree(cut, f"{name} is not sharded over the ranks")
        host = self.plan.offload == "all"
        if not (host and parameter.ds_persist):  # a small one is whole on the GPU, wherever its part is
            self._agree(part.device.type == ("cpu" if host else self.world.device.type), f"{name} is on {part.device}")

    def _agree(self, agrees: bool, found: str) -> None:
        if not agrees:
            plan = f"sharding={self.plan.sharding} offload={self.plan.offload} over {self.world.size} ranks"
            raise TrainingFailed(f"the plan says {plan}, and {found}")

    def optimizer(self, model: nn.Module) -> ZeroOptimizer:
        return ZeroOptimizer(self.engine, self.stage, self.world, self.placed, trainable(model))

    # ---------------------------------------------------------------- running

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over ranks of what is to be summed.
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        forget_modules()

    def settle(self, loss: nn.Module) -> None:
        """Wait for weights that a forward pass has gathered ahead, and drop them: those on their way can be neither
        read nor cut."""
        if self.stage == 3:
            loss.optimizer.parameter_offload.partition_all_parameters()
            if kept := loss.optimizer.persistent_parameters:
                kept[0].all_gather(kept)

    @contextmanager
    def accumulating(self, loss: nn.Module) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def for_evaluation(self, base_folder: Path, trained_folder: Path | None) -> tuple[nn.Module, nn.Module]:
        if self.stage < 3:
            return super().for_evaluation(base_folder, trained_folder)
        from loadmaster.models.shards import fill_adapter

        adapter = trained_folder is not None and (trained_folder / "adapter_config.json").is_file()
        base = self.load(base_folder if adapter or trained_folder is None else trained_folder)
        model = self.with_trained_part(base) if adapter else base
        if adapter:
            fill_adapter(model, trained_folder)
        loss = self.loss(model.requires_grad_(False))
        config = self._config(loss, [])
        config["zero_optimization"].pop("offload_optimizer", None)
        self._fill(loss, config, trained_folder if adapter else None)
        engine, *_ = self.deepspeed.initialize(model=loss, config=config)
        for name, parameter in engine.named_parameters():
            self._check_cut(name, parameter)
        return model.eval(), engine

    def let_go(self, loss: nn.Module) -> None:
        """DeepSpeed keeps every module that it has run under zero3, so this one's weights are taken from it."""
        if self.stage == 3:
            loss.optimizer.partition_all_parameters()
            for parameter in loss.parameters():
                parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


def elements(parameter: nn.Parameter) -> int:
    """Of the whole parameter, cut or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


def adamw(
    named: list[tuple[str, nn.Parameter]], config: OptimizerConfig, b_lr_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW, which DeepSpeed gives its fp32 shares to; matrices decay, vectors do not.

    b_lr_ratio: LoRA+, as of TrainingOptimizer.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = config.weight_decay if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 else 0.0
        groups.setdefault((decay, b_lr_ratio if ".lora_B." in name else 1.0), []).append(parameter)
    made = [{"params": held, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), held in groups.items()]
    return torch.optim.AdamW(made, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class ZeroOptimizer:
    """DeepSpeed's optimizer with the methods of TrainingOptimizer."""

    def __init__(
        self, engine: Any, stage: int, world: World, placed: FlatPlaced, trained: list[tuple[str, nn.Parameter]]
    ):
        self.engine, self.zero, self.stage, self.world = engine, engine.optimizer, stage, world
        self.offload = self.zero.offload_optimizer if stage == 3 else self.zero.cpu_offload
        self._where: dict[str, tuple[int, int, int]] = {}
        """Of each parameter with elements on this rank: its group, their place in the group's share, their number."""
        parameters = {parameter: name for name, parameter in trained}
        for parameter, group, offset, cut in self._cuts():
            start, end = cut.bounds[world.rank], cut.bounds[world.rank + 1]
            placed.enter(parameter, cut, lambda p=parameter, g=group, o=offset, n=end - start: self._weight(p, g, o, n))
            if start < end:
                self._where[parameters.pop(parameter)] = (group, offset, end - start)
            else:
                del parameters[parameter]
        if parameters:
            raise TrainingFailed(f"DeepSpeed trains {', '.join(list(parameters.values())[:3])} on no rank")

    def _cuts(self) -> Iterator[tuple[nn.Parameter, int, int, Cut]]:
        """(parameter, group, place of this rank's elements in the group's share, how it is cut over ranks)."""
        zero, ranks = self.zero, range(self.world.size + 1)
        if self.stage == 3:
            for group, parameters in enumerate(zero.fp16_groups):
                offset = 0
                for p in parameters:
                    share = p.partition_numel()
                    yield p, group, offset, Cut(p.ds_shape, tuple(min(r * share, p.ds_numel) for r in ranks))
                    offset += share
            return
        for group, parameters in enumerate(zero.bit16_groups):
            share, begin = int(zero.partition_size[group]), 0
            for p in parameters:
                bounds = tuple(min(max(r * share - begin, 0), p.numel()) for r in ranks)
                yield p, group, max(0, begin - self.world.rank * share), Cut(p.shape, bounds)
                begin += p.numel()

    @property
    def _shares(self) -> list[Tensor]:
        """The fp32 weights that this rank steps, by group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _weight(self, parameter: nn.Parameter, group: int, offset: int, count: int) -> Tensor:
        if self.stage == 3:
            return parameter.ds_tensor.detach().narrow(0, 0, count)
        share = self.zero.parallel_partitioned_bit16_groups[group][self.world.rank].detach()
        return share.narrow(0, offset if count else 0, count)

    def _gradients(self) -> list[Tensor]:
        if self.offload:
            return [share.grad for share in self._shares]
        return [g for group in range(len(self._shares)) for g in self.zero.averaged_gradients[group]]

    def begin(self, lr: float) -> None:
        """Before the backward pass of a step that is to be taken at rate `lr`."""

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Global L2 norm of the gradients in fp32, before they are scaled down to `max_norm` (0: not scaled)."""
        if self.offload and self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # gradients are on their way to the host
        gradients = self._gradients()
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        norm = self.world.sum(squares.to(self.world.device)).sqrt()
        if max_norm > 0:
            # Of NaN, 1: what fills a share up is written once, and would be NaN from a step that is left out on.
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        return norm

    def step(self, lr: float) -> None:
        """Update at rate `lr` and drop the gradients."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self.engine.step()

    def zero_grad(self) -> None:
        """Forget the gradients of a step that is left out, as DeepSpeed does when they overflow."""
        zero = self.zero
        zero.zero_grad(set_to_none=True)
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
        if self.stage < 3:
            zero.micro_step_id = -1
            zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)
        if self.offload:
            zero.reset_cpu_buffers()

    def reset(self) -> None:
        """Forget all moments and take the masters from the parameters again: as if never stepped."""
        self.zero.optimizer.state.clear()
        self.zero.refresh_fp32_params()
        self._spread()

    @torch.no_grad()
    def _spread(self) -> None:
        """After shares of weights were written: what is kept whole is made whole again."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        kept = self.zero.persistent_parameters
        # A forward pass without a backward one may have left others whole: they, too, hold what was there before.
        whole = [p for group in self.zero.fp16_groups for p in group if p.ds_status.name == "AVAILABLE"]
        if whole:
            whole[0].partition(whole)
        if kept:
            kept[0].all_gather(kept)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors, scalars) by `parameter/key`; of bf16 weights also `parameter/master`."""
        tensors = {}
        for name, (group, offset, count) in self._where.items():
            share = self._shares[group]
            if self.zero.dtype != torch.float32:
                tensors[f"{name}/master"] = share.detach().narrow(0, offset, count)
            for key, value in self.zero.optimizer.state.get(share, {}).items():
                tensors[f"{name}/{key}"] = value if value.dim() == 0 else value.narrow(0, offset, count)
        return tensors, {}

    @torch.no_grad()
    def load_state(self, values: Iterable[tuple[str, Tensor | float]]) -> None:
        """Take over what `state` gave, of any number of ranks. Raises KeyError when it is of other parameters."""
        self.reset()
        for path, value in values:
            name, key = path.rsplit("/", 1)
            if name not in self._where:
                continue  # a step count of what is on other ranks
            group, offset, count = self._where[name]
            share = self._shares[group]
            if key == "master":
                share.detach().narrow(0, offset, count).copy_(value)
                continue
            state, value = self.zero.optimizer.state[share], torch.as_tensor(value)
            if value.dim() == 0:
                state[key] = value.to(share.device, copy=True)
                continue
            if key not in state:
                state[key] = torch.zeros_like(share, requires_grad=False)
            state[key].narrow(0, offset, count).copy_(value)
        self._spread()
