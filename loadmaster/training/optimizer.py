"""The optimizer over what is trained, with fp32 master weights where the plan asks for them.

Bytes for each trainable bf16 parameter (weight and gradient are 2 + 2 of them):
    adamw, master weights      16   fp32 master 4, moments 4 + 4; and 4 more for gradients, a bucket at a time
    adamw, no master weights   12   moments 4 + 4 (bitsandbytes)
    adamw_bf16                  8   moments 2 + 2, rounded stochastically as well (adamw_bf16.py)
    adamw_8bit                  6   block-wise moments of 1 + 1 (bitsandbytes); paged: in memory the host can take
    adafactor                  ~4   second moment as row and column sums (transformers)
bf16 weights are rounded stochastically (rounding.py), from their masters or, without, stepped in fp32 a part at a time.
Everything is fp32 on a CPU: weight, gradient and two moments, 16 bytes.

Of a sharded parameter each rank steps its own part, as a plain tensor: all but Adafactor work element by element or
block by block, and Adafactor takes its means over the part. Offloaded states live on the host and are stepped there, on
copies of the parameters; gradients go there and new values come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loadmaster.config.schema import OptimizerConfig
from loadmaster.preflight.trained import BUCKET_ELEMENTS, in_groups
from loadmaster.training.placement import local
from loadmaster.training.relayout import BLOCK
from loadmaster.training.rounding import Rounding

UNUSED = "RMS"
"""Adafactor's, of a rank's part of a weight, written in each step and read in none (scale_parameter=False): it is no
state, and not the same on all ranks."""


@dataclass
class _Bucket:
    names: list[str]
    parameters: list[nn.Parameter]
    targets: list[Tensor]
    """What the optimizer updates: the parameters themselves, their local parts, or copies (masters, offloaded)."""
    numbers: list[int | None]
    """Of each, among all parameters; None for an adapter's, which its masters give to the nearest: its rates are high,
    half of it begins at zero, and hundreds of small matrices are copied by one kernel."""
    optimizer: torch.optim.Optimizer | None
    """None where this rank has no element of any of them."""
    steps: list[int]
    """How often each was stepped: not where it had no gradient."""


class TrainingOptimizer:
    """Clips, steps, and gives its state as named tensors, each of this rank's part of its parameter."""

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        name: str,
        master_weights: bool,
        offload: bool = False,
        sum_over_shards: Callable[[Tensor], Tensor] = lambda squares: squares,
        b_lr_ratio: float = 1.0,
        compiled: bool = False,
    ):
        """sum_over_shards: of a scalar, over the ranks that together hold every parameter once.

        b_lr_ratio: LoRA+ (Hayou et al. 2024, arXiv 2402.12354): rate of every adapter's B over that of all else.

        compiled: weights are rounded by a kernel that is compiled for it.
        """
        self.b_lr_ratio = b_lr_ratio
        self.config, self.offload, self.sum_over_shards = config, offload, sum_over_shards
        self.own_form = name in ("adamw_8bit", "paged_adamw_8bit", "adafactor")
        """Whether states depend on how a parameter is cut (loadmaster.training.relayout)."""
        self.masters = master_weights and any(p.dtype != torch.float32 for _, p in named_parameters)
        self.copies = self.masters or offload
        self.sharded = any(isinstance(p, DTensor) for _, p in named_parameters)
        for _, parameter in named_parameters:
            if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()  # it is stepped and rounded as a row of numbers
        meshes = [p.device_mesh for _, p in named_parameters if isinstance(p, DTensor)]
        shard = meshes[0].get_coordinate()[-1] if meshes else 0
        self.rounding = Rounding(shard, compiled)
        dtype = named_parameters[0][1].dtype
        self.rounds = dtype == torch.bfloat16 and not self.masters and name != "adamw_bf16"  # which does so itself
        make = _factory(name, config, dtype, self.masters, shard)
        numbers = {name: number for number, (name, _) in enumerate(named_parameters)}
        self.buckets = [self._bucket(group, make, numbers) for group in self.split(named_parameters)]
        self._smallest_first = sorted(self.buckets, key=lambda bucket: sum(p.numel() for p in bucket.parameters))
        """So the gradients of most are gone when those of a large embedding are there in two forms."""

    @staticmethod
    def split(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
        """Parameters that are stepped together."""
        return in_groups(named, lambda each: each[1].numel(), BUCKET_ELEMENTS)

    def _bucket(self, named: list[tuple[str, nn.Parameter]], make: Callable, numbers: dict[str, int]) -> _Bucket:
        names, parameters = [n for n, _ in named], [p for _, p in named]
        targets = [self._target(p) for p in parameters]
        groups: dict[tuple[float, float], dict[str, Tensor]] = {}
        for name, target in zip(names, targets, strict=True):
            if target.numel():
                decay = self.config.weight_decay if target.dim() > 1 else 0.0
                groups.setdefault((decay, self.b_lr_ratio if ".lora_B." in name else 1.0), {})[name] = target
        made = [
            {
                "params": [*held.values()], "numbers": [numbers[name] for name in held],
                "weight_decay": decay, "lr_ratio": ratio,
            }
            for (decay, ratio), held in groups.items()
        ]
        own = [None if ".lora_" in name else numbers[name] for name in names]
        return _Bucket(names, parameters, targets, own, make(made) if made else None, [0] * len(names))

    def _target(self, parameter: nn.Parameter) -> Tensor:
        if not self.copies:
            return local(parameter) if isinstance(parameter, DTensor) else parameter
        device = torch.device("cpu") if self.offload else local(parameter).device
        return local(parameter).to(device, torch.float32 if self.masters else parameter.dtype, copy=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for bucket in self.buckets for p in bucket.parameters]

    def begin(self, lr: float) -> None:
        """Before the backward pass of a step that is to be taken at rate `lr`."""

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Global L2 norm of the gradients in fp32, before they are scaled down to `max_norm` (0: not scaled)."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).norm()
        if self.sharded:
            norm = self.sum_over_shards(norm.square()).sqrt()
        if max_norm > 0:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update at rate `lr` and drop the gradients."""
        for bucket in self._smallest_first:
            self._step(bucket, lr)

    def _step(self, bucket: _Bucket, lr: float) -> None:
        if bucket.optimizer is None:
            for parameter in bucket.parameters:
                parameter.grad = None
            return
        for group in bucket.optimizer.param_groups:
            rate = lr * group["lr_ratio"]
            if isinstance(group["lr"], Tensor):  # compiled with the step
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self.copies or self.sharded:
            for parameter, target in zip(bucket.parameters, bucket.targets, strict=True):
                if not self.copies:
                    target.data = local(parameter)  # FSDP may have moved it (pinned memory, on its first forward)
                given = parameter.grad is not None
                target.grad = local(parameter.grad).to(target.device, target.dtype) if given else None
                parameter.grad = None
        stepped = [index for index, target in enumerate(bucket.targets) if target.grad is not None]
        if self.rounds:
            self.rounding.step(bucket.optimizer)
        else:
            _update(bucket.optimizer)
        bucket.optimizer.zero_grad(set_to_none=True)
        if self.copies:
            self._write(bucket, stepped)
        for index in stepped:
            bucket.steps[index] += 1

    def _write(self, bucket: _Bucket, stepped: list[int]) -> None:
        """From the copies into the parameters."""
        nearest = []
        for index in stepped:
            parameter, target, number = local(bucket.parameters[index]), bucket.targets[index], bucket.numbers[index]
            if self.masters and number is not None:
                self.rounding.write(parameter, target, number, bucket.steps[index])
            else:
                nearest.append((parameter, target))
        if nearest:
            torch._foreach_copy_(*map(list, zip(*nearest, strict=True)))

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def reset(self) -> None:
        """Forget all moments and take the masters from the parameters again: as if never stepped."""
        for bucket in self.buckets:
            if getattr(bucket.optimizer, "is_paged", False):
                _forget(bucket.optimizer)
            elif bucket.optimizer is not None:
                bucket.optimizer.state.clear()
            bucket.steps = [0] * len(bucket.names)
            if self.copies:
                torch._foreach_copy_(bucket.targets, [local(p) for p in bucket.parameters])

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors, scalars) by `parameter/key`; with master weights also `parameter/master`."""
        tensors, scalars = {}, {}
        for bucket in self.buckets:
            for name, target in zip(bucket.names, bucket.targets, strict=True):
                if not target.numel():
                    continue
                if self.masters:
                    tensors[f"{name}/master"] = target
                for key, value in bucket.optimizer.state.get(target, {}).items():
                    if key == UNUSED:
                        continue
                    (tensors if isinstance(value, Tensor) else scalars)[f"{name}/{key}"] = value
        return tensors, scalars

    @torch.no_grad()
    def load_state(self, values: Iterable[tuple[str, Tensor | float]]) -> None:
        """Take over what `state` gave, one value after another. Raises KeyError when it is of other parameters."""
        self.reset()
        where = {name: (bucket, index) for bucket in self.buckets for index, name in enumerate(bucket.names)}
        for path, value in values:
            name, key = path.rsplit("/", 1)
            bucket, index = where[name]
            target = bucket.targets[index]
            if not target.numel():
                continue  # a step count of a parameter that others hold
            if key == "master":
                target.copy_(value)
                continue
            if key == "step":
                bucket.steps[index] = int(value)
            state = bucket.optimizer.state[target]
            held = state.get(key)
            if not isinstance(value, Tensor):
                state[key] = value
            elif isinstance(held, Tensor) and (held.shape, held.dtype) == (value.shape, value.dtype):
                held.copy_(value)
            else:
                state[key] = _place(value, target, key, bucket.optimizer)

    @torch.no_grad()
    def adopt(self, name: str, states: dict[str, Tensor]) -> None:
        """Take over a parameter's states that OldLayout gave: this rank's rows, codes as numbers."""
        bucket, target = next(
            (b, t) for b in self.buckets for n, t in zip(b.names, b.targets, strict=True) if n == name
        )
        if not states or not target.numel():
            return
        if "state1" not in states:
            bucket.optimizer.state[target].update({k: v.to(target.device, copy=True) for k, v in states.items()})
            return
        import bitsandbytes.functional as bnb

        groups = bucket.optimizer.param_groups
        where = ((g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if p is target)
        group, index = next(where)
        state = bucket.optimizer.state[target]
        if "state1" not in state:
            bucket.optimizer.init_state(groups[group], target, group, index)
        for number in ("1", "2"):
            held, whole = state[f"state{number}"], states[f"state{number}"].to(target.device)
            if held.dtype != torch.uint8:
                held.copy_(whole)
                continue
            codes, scales = states.get(f"codes{number}"), states.get(f"absmax{number}")
            if codes is None:
                codes, made = bnb.quantize_blockwise(whole, code=state[f"qmap{number}"], blocksize=BLOCK)
                scales = made.absmax
            held.copy_(codes.view_as(held))
            state[f"absmax{number}"].copy_(scales)


def _update(optimizer: torch.optim.Optimizer) -> None:
    """One step. bitsandbytes' own waits for the GPU after every parameter, which only paged states need."""
    if not hasattr(optimizer, "update_step") or optimizer.is_paged:
        optimizer.step()
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, number, index)
            optimizer.update_step(group, parameter, number, index)


def _forget(optimizer: torch.optim.Optimizer) -> None:
    """Moments as if never stepped, in the memory that they have: bitsandbytes never gives paged memory back."""
    for state in optimizer.state.values():
        state["step"] = 0
        for key, value in state.items():
            if isinstance(value, Tensor) and not key.startswith("qmap"):
                value.zero_()


def _place(value: Tensor, target: Tensor, key: str, optimizer: torch.optim.Optimizer) -> Tensor:
    """A loaded state tensor where the optimizer keeps it: paged memory, the device, or (step counts) as made."""
    if getattr(optimizer, "is_paged", False) and value.shape == target.shape:
        buffer = optimizer.get_state_buffer(target, dtype=value.dtype)
        return buffer.copy_(value)
    if key == "step" and not optimizer.defaults.get("fused"):
        return value.clone()
    return value.to(target.device, copy=True)


def _factory(name: str, config: OptimizerConfig, dtype: torch.dtype, masters: bool, shard: int) -> Callable:
    """Makes an optimizer of its groups; each step brings its rate (`TrainingOptimizer.step`).

    dtype: of the parameters, whatever their masters' is. shard: which part of the parameters is stepped here.
    """
    betas, eps = (config.beta1, config.beta2), config.eps
    if name == "adamw" and (masters or dtype == torch.float32):
        return lambda groups: torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    if name == "adamw_bf16":
        from loadmaster.training.adamw_bf16 import AdamWBf16

        return lambda groups: AdamWBf16(groups, betas, eps, moments=dtype, shard=shard)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return lambda groups: Adafactor(
            groups, lr=0.0, scale_parameter=False, relative_step=False, warmup_init=False
        )
    import bitsandbytes as bnb

    kind = {
        "adamw": bnb.optim.AdamW32bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }[name]
    return lambda groups: kind(groups, lr=0.0, betas=betas, eps=eps)
