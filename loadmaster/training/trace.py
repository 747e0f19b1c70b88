"""An exact answer where one is wanted: the engine's real step, traced on the meta device (`plan.trace=true`).

Real modules (transformers, peft, frozen layers), the engine's own forward and loss, autograd and
torch.utils.checkpoint, with tensors that have sizes and no values: no GPU, no weights, seconds. Every storage is
counted from the operation that makes it to its last reference. On the meta device the engine takes the paths of a GPU.

The tests hold the preflight's replay against the same trace.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from loadmaster.config.schema import Job, LoraConfig, PreferenceConfig
from loadmaster.data import MicroBatch
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.models.adapters import make_trainable
from loadmaster.models.attention import PACKED
from loadmaster.models.float8 import train_in_fp8
from loadmaster.models.forward import token_losses
from loadmaster.models.frozen import freeze_linears, frozen_form
from loadmaster.models.load import DTYPES
from loadmaster.models.preference import loss_module
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.config_json import find_config, from_config
from loadmaster.preflight.hardware import GIB
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import training_step
from loadmaster.training.metas import Metas


@dataclass(frozen=True)
class Case:
    tokens: int
    checkpointing: str = "none"
    accumulated: bool = False
    """Gradients of an earlier micro-batch are there."""
    objective: str = "sft"
    evaluated: bool = False
    """Without gradients, as held-out rows are."""
    kept_layers: int = 0
    """Of the last ones, beside others that are checkpointed whole."""
    rows: int = 1
    """Of as many documents; a pair's answers are two in any case. The last token of each predicts nothing."""


def trace_plan(job: Job, plan: Plan) -> dict[str, Any]:
    """One micro-batch of the plan, traced, beside its replay, in GiB, and what the traced model consists of.

    Both are besides weights, optimizer states and gradients that were there before, and neither has what kernels
    take inside themselves, which plan.json's memory_gib has. Weights are whole: of a sharded plan the micro-batch is
    traced as one GPU would run it, without the buffers of sharding.
    Raises ConfigError for a model that transformers cannot build, or whose step depends on its data.
    """
    config, _ = find_config(job.model)
    setup = traced_setup(job, plan)
    accumulated = setup.gradient_accumulation_steps > 1
    case = Case(
        setup.tokens, setup.checkpointing, accumulated, job.objective, kept_layers=setup.kept_layers,
        rows=setup.micro_batch_size,
    )
    try:
        base = _meta_model(config, DTYPES[setup.precision])
        parameters = sum(p.numel() for p in base.parameters())
        model = with_trained_part(base, setup)
        peak = _traced_peak(model, case)
    except Exception as error:  # whatever a model's own code makes of the meta device
        message = f"a step of model type {config.get('model_type')!r} cannot be traced ({first_line(error)})"
        remedy = "plan.trace=false, or a model of a type that transformers knows"
        raise ConfigError([Problem("plan.trace", True, IN_THE_JOB, message, remedy)]) from error
    replayed = training_step(from_config(config, job.model.name), setup, in_place=False).peak
    whole = plan.sharding not in ("none", "ddp")
    return {
        "traced_gib": round(peak / GIB, 4), "replayed_gib": round(replayed / GIB, 4),
        "difference": round(replayed / peak - 1, 6),
        "of": "a micro-batch" + (" that keeps its gradients" if plan.optimizer_in_backward else "")
        + (" with whole weights on one GPU" if whole else "")
        + " (besides weights and states" + ("; layers not compiled, which keep more)" if plan.compile else ")"),
        "parameters": parameters,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights_gib": round(weight_bytes(model) / GIB, 4),
    }


def traced_setup(job: Job, plan: Plan) -> Setup:
    targets = job.lora.targets
    return Setup(
        method=plan.method, precision=plan.precision, optimizer=plan.optimizer, master_weights=plan.master_weights,
        checkpointing=plan.activation_checkpointing, kept_layers=plan.kept_layers,
        micro_batch_size=plan.micro_batch_size,
        sequence_length=plan.sequence_length, lora_rank=job.lora.rank, lora_dropout=job.lora.dropout,
        lora_targets=tuple(targets) if isinstance(targets, list) else targets, objective=job.objective,
        modules_to_save=tuple(job.lora.modules_to_save), dora=job.lora.dora,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
    )


def weight_bytes(model: nn.Module) -> int:
    """Of everything that the model keeps on the device, each storage once."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def with_trained_part(model: nn.Module, setup: Setup) -> nn.Module:
    """A model on the meta device as it is trained: its linears quantized, its adapter on."""
    if form := frozen_form(setup.method, setup.precision):
        freeze_linears(model, form)
    if (setup.method, setup.precision) == ("full", "fp8"):
        train_in_fp8(model, torch.device("meta"))
    if setup.method != "full":
        targets = list(setup.lora_targets) if isinstance(setup.lora_targets, tuple) else setup.lora_targets
        lora = LoraConfig(
            rank=setup.lora_rank, dropout=setup.lora_dropout, targets=targets, dora=setup.dora,
            modules_to_save=list(setup.modules_to_save),
        )
        model = make_trainable(model, setup.method, lora)
    return model


def _traced_peak(model: nn.Module, case: Case, metas: Metas | None = None) -> int:
    checkpoint_activations(model, case.checkpointing, case.kept_layers)
    live = Live(metas)
    held = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad and case.accumulated else None
        held += [] if parameter.grad is None else [parameter.grad]
    for tensor in held:
        live.count(tensor)
    before, live.peak = live.live, 0
    ids = torch.zeros(1, case.tokens, dtype=torch.long)
    documents = case.rows if case.objective == "sft" else max(2, case.rows)
    places = torch.arange(case.tokens) % -(-case.tokens // documents)
    adapted = any("lora_" in name for name, _ in model.named_parameters())
    known = {"dpo": (documents,), "kto": (documents, 2)}
    reference = None if adapted or case.objective not in known else torch.zeros(known[case.objective])
    batch = MicroBatch(ids, ids, places[None], reference=reference)
    model.train(not case.evaluated)
    with live, torch.set_grad_enabled(not case.evaluated):
        if case.objective == "sft":
            loss, _ = token_losses(model, batch)
        else:
            loss = loss_module(model, case.objective, PreferenceConfig())(batch)
        if not case.evaluated:
            loss.backward()
    return live.peak - before


class Live(TorchDispatchMode):
    """Bytes of every live storage on the meta device, and their peak."""

    def __init__(self, metas: Metas | None = None) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.storages: dict[int, weakref.ref] = {}
        self.live = self.peak = 0
        self.metas = metas or Metas()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch wraps a mode to keep it from being compiled, which costs each operation; nothing is compiled here."""
        return False

    def count(self, tensor: torch.Tensor) -> None:
        if type(tensor) is not torch.Tensor and is_traceable_wrapper_subclass(tensor):  # what it wraps is counted
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or not tensor.is_meta:
            return
        size = storage.nbytes()
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.storages[key] = weakref.ref(storage, partial(self._gone, key))

    def _gone(self, key: int, _: object = None) -> None:
        self.live -= self.sizes.pop(key, 0)
        self.storages.pop(key, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = self.metas(function, args, kwargs or {})
        if type(result) is torch.Tensor:
            self.count(result)
            return result
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result


def _meta_model(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=PACKED).train()
