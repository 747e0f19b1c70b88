"""An exact answer where one is wanted: the engine's real step, traced on the meta device (`plan.trace=true`).

Real modules (transformers, peft, frozen layers), the engine's own forward and loss, autograd and
torch.utils.checkpoint, with tensors that have sizes and no values: no GPU, no weights, seconds. Every storage is
counted from the operation that makes it to its last reference. On the meta device the engine takes the paths of a GPU.

The tests hold the preflight's replay against the same function.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from loadmaster.config.schema import Job
from loadmaster.data import MicroBatch
from loadmaster.models.attention import PACKED
from loadmaster.models.float8 import train_in_fp8
from loadmaster.models.forward import token_losses
from loadmaster.models.frozen import freeze_linears, frozen_form
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.hardware import GIB
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.setup import SHARDED, Setup
from loadmaster.preflight.shape import find_config, from_config
from loadmaster.preflight.step import training_step


@dataclass(frozen=True)
class Case:
    tokens: int
    checkpointing: str = "none"
    accumulated: bool = False
    """Gradients of an earlier micro-batch are there."""


def trace_plan(job: Job, plan: Plan) -> dict[str, Any]:
    """One micro-batch of the plan, traced, beside its replay, in GiB; `skipped` says why where it is not traced.

    Both are besides weights, optimizer states and gradients that were there before, and neither has what kernels
    take inside themselves, which plan.json's memory_gib has.
    """
    if plan.precision == "fp32" or plan.sharding in SHARDED:
        return {
            "skipped": f"a trace is of bf16 or fp8 and whole weights, the plan of {plan.precision} and {plan.sharding}"
        }
    config, _ = find_config(job.model)
    accumulated = plan.gradient_accumulation_steps > 1
    tokens = plan.micro_batch_size * plan.sequence_length
    targets = job.lora.targets
    traced = traced_peaks(
        config,
        plan.method,
        [Case(tokens, plan.activation_checkpointing, accumulated)],
        job.lora.rank,
        targets,
        plan.precision,
    )[0]
    setup = Setup(
        method=plan.method, precision=plan.precision, optimizer=plan.optimizer, master_weights=plan.master_weights,
        checkpointing=plan.activation_checkpointing, sequence_length=tokens, lora_rank=job.lora.rank,
        lora_targets=tuple(targets) if isinstance(targets, list) else targets,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )  # fmt: skip
    replayed = training_step(from_config(config, job.model.name), setup, in_place=False).peak
    return {
        "traced_gib": round(traced / GIB, 4), "replayed_gib": round(replayed / GIB, 4),
        "difference": round(replayed / traced - 1, 6),
    }  # fmt: skip


def traced_peaks(
    config: dict[str, Any],
    method: str,
    cases: list[Case],
    rank: int = 16,
    targets: Any = "all-linear",
    precision: str = "bf16",
) -> list[int]:
    """For each case the peak bytes of one micro-batch, besides weights and the gradients that were there before.

    config: the model's config.json as a dict.
    """
    model = _meta_model(config)
    if form := frozen_form(method, precision):
        freeze_linears(model, form)
    if (method, precision) == ("full", "fp8"):
        train_in_fp8(model, torch.device("meta"))
    if method != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return [_traced_peak(model, case) for case in cases]


def _traced_peak(model: nn.Module, case: Case) -> int:
    checkpoint_activations(model, case.checkpointing)
    live = Live()
    held = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad and case.accumulated else None
        held += [] if parameter.grad is None else [parameter.grad]
    for tensor in held:
        live.count(tensor)
    before, live.peak = live.live, 0
    ids = torch.zeros(1, case.tokens, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.arange(case.tokens)[None], [["row"]])
    with live:
        loss, _ = token_losses(model, batch)
        loss.backward()
    return live.peak - before


class Live(TorchDispatchMode):
    """Bytes of every live storage on the meta device, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def count(self, tensor: torch.Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # what it wraps is counted
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "meta" or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result


def _meta_model(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=PACKED).train()
