"""What is trained: adapters on a frozen base, or every weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from loadmaster.config.schema import LoraConfig
from loadmaster.errors import ConfigError
from loadmaster.models.dora import run_by_norms
from loadmaster.models.frozen import FrozenLinear
from loadmaster.models.libraries import peft_alone
from loadmaster.preflight.targets import WHOLE, some_of


def make_trainable(model: nn.Module, method: str, lora: LoraConfig) -> nn.Module:
    """Freeze and wrap the model for `method`: lora and qlora get a peft adapter, full trains all.

    Adapter weights take the compute dtype of the base, so no cast is kept for the backward pass; their
    precision over many small updates comes from the optimizer's fp32 master copy.
    """
    if method == "full":
        model.requires_grad_(True)
        for tower in _towers(model):  # no gradient reaches those, and a weight decay would
            tower.requires_grad_(False)
        return model
    if lora.dora and any(isinstance(module, FrozenLinear) for module in model.modules()):
        message = "takes norms of a base's weights, which are held in few bits here"
        remedy = "method=lora and precision=bf16, or lora.dora=false"
        raise ConfigError.of("lora.dora", True, message, remedy)
    targets, saved = target_modules(model, lora.targets), saved_modules(model, lora.modules_to_save)
    peft_alone()
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilised,
        task_type="CAUSAL_LM",
        bias="none",
        target_modules=targets,
        use_dora=lora.dora,
        **saved,
    )
    dtype = model.get_output_embeddings().weight.dtype
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for _, parameter in trainable(wrapped):
        parameter.data = parameter.data.to(dtype)
    run_by_norms(wrapped)
    scale_where_narrow(wrapped)
    return wrapped


class Narrow:
    """Takes the place of peft's own line in a layer's forward pass: its scaling is put on the r values between A and B.

    Put on the product, as peft does it, each pass over it is one more, and a compiler can join neither the product with
    the base's nor their gradients.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x [..., in], result [..., out] of the base layer."""
        a, b, dropout = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        return result + b(a(dropout(x)) * module.scaling[active_adapter])

    @staticmethod
    def supports_lora_conversion() -> bool:
        return True


def scale_where_narrow(model: nn.Module) -> None:
    """Let every plain LoRA layer that peft made run so."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.lora_variant.setdefault("default", Narrow)


def saved_modules(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """peft's options for training modules of these names whole: an embedding, the head, norms.

    peft takes every module whose name ends so (`norm` would be all norms) and unties a head from its embedding unless
    it is told not to. Here a name is the last part of a module's, and what is tied stays one weight, whichever of the
    two is named: a copy of one alone would leave the other what it was, and the model of another shape than its base.
    Raises ConfigError for a name that is none of these.
    """
    if not names:
        return {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    full = {
        name: module
        for name, module in model.named_modules()
        if module in (head, embedding) or [p.dim() for p in module.parameters()] == [1]
    }
    kinds = {name.rpartition(".")[2] for name in full}
    if unknown := [name for name in names if name not in kinds]:
        what = f"names no embedding, head or norm of this model: {', '.join(unknown)}"
        remedy = f"some of: {', '.join(sorted(kinds))}"
        raise ConfigError.of("lora.modules_to_save", list(names), what, remedy)
    found = {name: module for name, module in full.items() if name.rpartition(".")[2] in names}
    tied = head.weight is embedding.weight and not {head, embedding}.isdisjoint(found.values())
    if tied:
        found = {name: module for name, module in found.items() if module is not head}
        found |= {name: module for name, module in full.items() if module is embedding}
    return {"modules_to_save": sorted(found), "ensure_weight_tying": tied}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that training changes, in a fixed order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base; what is trained stays what it was.

    peft's disable_adapter also sets requires_grad, off and on again. Under fully_shard a layer has other parameters on
    the way in than on the way out, when it is whole: the shards would then be trained no more.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    switched = (BaseTunerLayer, ModulesToSaveWrapper)
    before = {module: module._disable_adapters for module in model.modules() if isinstance(module, switched)}
    for layer in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in before.items():  # off already where the model before training is scored
            layer._disable_adapters = disabled


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers that can carry an adapter: all but the head, and beside experts what is in an
    MLP, for by those names, of dense layers too, peft puts adapters on the experts' 3-D tensors."""
    head, mlps = model.get_output_embeddings(), not _has_experts(model)
    others = {head, *(module for tower in _towers(model) for module in tower.modules())}
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in others and not _is_router(module)
    ]
    return [name for name in linears if mlps or ".mlp." not in name]


def _towers(model: nn.Module) -> list[nn.Module]:
    """What stands beside the language model in a multimodal one: vision towers, projectors."""
    inner = getattr(model, model.base_model_prefix, model)
    decoder = model.get_decoder()
    used = {decoder, model.get_output_embeddings(), *decoder.modules()}
    return [] if decoder is inner else [part for part in inner.children() if part not in used]


def _is_router(module: nn.Module) -> bool:
    """A linear layer by its class that yields more than a tensor (PhiMoE, Llama 4), which peft's layer would add to."""
    return isinstance(module, nn.Linear) and type(module).__name__.endswith("Router")


def _has_experts(model: nn.Module) -> bool:
    return any(name.endswith(".experts") for name, _ in model.named_modules())


def target_modules(model: nn.Module, targets: str | list[str]) -> list[str] | str:
    """peft's option of this name; raises ConfigError when nothing matches, or what gets no adapter."""
    names = linear_names(model)
    if targets == "all-linear":
        return names if _towers(model) or any(map(_is_router, model.modules())) else "all-linear"
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    if isinstance(targets, str):
        if targets in kinds:
            return _of_the_language_model(model, names, [targets])
        try:
            found = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise _wrong_targets(targets, f"is no regular expression ({error})", kinds) from None
        if not found:
            raise _wrong_targets(targets, "matches no linear layer", kinds)
        _refuse_others(model, targets)
        return found if _has_experts(model) else targets  # peft would match an expression with the experts as well
    if not targets:
        raise _wrong_targets(targets, "names no linear layer", kinds)
    unknown = [target for target in targets if target not in kinds and target not in names]
    if unknown:
        raise _wrong_targets(targets, f"names no linear layer of this model: {', '.join(unknown)}", kinds)
    return _of_the_language_model(model, names, targets)


def _of_the_language_model(model: nn.Module, names: list[str], targets: Sequence[str]) -> list[str]:
    """As they are; where towers may have layers of these names too, the full names of the language model's."""
    if not _towers(model):
        return list(targets)
    return [name for name in names if name in targets or name.rpartition(".")[2] in targets]


def _refuse_others(model: nn.Module, targets: str) -> None:
    """An expression may match modules that get no adapter here: the loss takes the head's weight past its module, and
    peft has none for whole layers or activations."""
    linear = set(linear_names(model))
    other = [name for name, _ in model.named_modules() if re.fullmatch(targets, name) and name and name not in linear]
    if other:
        message = f"also matches {some_of(other)}, where no adapter is made"
        raise _wrong_targets(targets, message, sorted({name.rpartition(".")[2] for name in linear}))


def _wrong_targets(value: object, message: str, kinds: list[str]) -> ConfigError:
    remedy = f"all-linear, or some of: {', '.join(kinds)}; {WHOLE}"
    return ConfigError.of("lora.targets", value, message, remedy)
