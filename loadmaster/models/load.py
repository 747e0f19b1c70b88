"""Models in memory: the base, whole or quantized, and the model as trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loadmaster.errors import LoadmasterError
from loadmaster.models.attention import PACKED
from loadmaster.models.bf16_products import quicken
from loadmaster.models.capped import caps_scores
from loadmaster.models.dora import run_by_norms
from loadmaster.models.frozen import freeze_linears
from loadmaster.models.libraries import deepspeed_told, peft_alone
from loadmaster.models.spread import Spread, settled, stand_ins

deepspeed_told()

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp32": torch.float32}
"""Compute dtype of each precision; fp8 keeps everything but its matmuls in bf16."""


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str | Spread,
    frozen: str | None = None,
    beside: float = 0.0,
) -> nn.Module:
    """The base model with packed attention, weights read straight to `device`, no second copy in memory.

    device: one, or where the layers of a model go that none may hold; `beside` of its adapters' bytes.
    frozen: nf4 or fp8: linear layers but the head are quantized on the way in (`loadmaster.models.frozen`).
    Raises LoadmasterError for a checkpoint with missing or unexpected weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from loadmaster.models.frozen_load import FrozenConfig

    transformers_logging.disable_progress_bar()
    config = config_of(folder)
    quicken()
    with knowing_packed_attention(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            **placed_by(folder, dtype, device, frozen, beside),
            attn_implementation=PACKED,
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=FrozenConfig(frozen) if frozen else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
    problems = {
        kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys", "error_msgs") if info.get(kind)
    }
    if problems:
        shown = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(map(_said, names[:3]))}" for kind, names in problems.items()
        )
        raise LoadmasterError(
            f"the checkpoint in {folder} does not fill the model ({shown}); it is torn or of another model"
        )
    refuse_unsupported(model)
    return settled(model)


def _said(name: Any) -> str:
    return name if isinstance(name, str) else f"{name[0]} is {list(name[1])} and not {list(name[2])}"


def config_of(folder: Path) -> Any:
    """A model's configuration, to be given to from_pretrained: what it read itself could name another attention than is
    asked for, kernels of the Hub's among them (_attn_implementation).

    Raises LoadmasterError for a model type that the installed transformers has not, or that continues no text.
    """
    import transformers

    try:
        found = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except ValueError as error:
        reason = str(error).partition(". ")[0]
        raise LoadmasterError(f"transformers {transformers.__version__} cannot load {folder}: {reason}") from error
    if type(found) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LoadmasterError(
            f"transformers {transformers.__version__} has no causal language model of type {found.model_type!r}, which "
            f"is what {folder} holds\n    fix: a text-only model, of a family in docs/preflight.md"
        )
    return found


@contextmanager
def knowing_packed_attention(folder: Path) -> Iterator[None]:
    """Raises LoadmasterError for a model whose code, as it is built, has a list of its own of kinds of attention."""
    try:
        yield
    except KeyError as error:
        if error.args != (PACKED,):
            raise
        raise LoadmasterError(
            f"the model in {folder} cannot be trained here: its family's code in transformers attends in ways of its "
            "own only, and packed attention is none of them\n"
            "    fix: a model of another family; those in docs/preflight.md are tested"
        ) from error


def placed_by(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str | Spread,
    frozen: str | None = None,
    beside: float = 0.0,
) -> dict[str, Any]:
    """Arguments of from_pretrained that put the checkpoint's model there."""
    if isinstance(device, Spread):
        return device.placed_by(folder, dtype, frozen, beside)
    return {"device_map": {"": str(device)}}


def load_trained(
    base_folder: Path,
    trained_folder: Path,
    dtype: torch.dtype,
    device: torch.device | str | Spread,
    frozen: str | None = None,
) -> nn.Module:
    """The model exactly as it was trained: the adapter live over its base, or the full weights."""
    if not (trained_folder / "adapter_config.json").is_file():
        return load_base(trained_folder, dtype, device).eval()
    peft_alone()
    from peft import PeftModel

    adapter_bytes = sum(file.stat().st_size for file in trained_folder.glob("adapter_model.safetensors"))
    base = load_base(base_folder, dtype, device, frozen, adapter_bytes)
    with stand_ins(base):
        model = PeftModel.from_pretrained(base, str(trained_folder), autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
    run_by_norms(model, trained_folder)
    return model.eval()


def random_model(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, frozen: str | None = None
) -> nn.Module:
    """A model of this shape (a config.json's dict) with small random weights, the same ones each time.

    It measures memory and speed as well as a real one, and needs no download.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=PACKED)
    refuse_unsupported(model)
    if frozen:
        freeze_linears(model, frozen)
    return model


def refuse_unsupported(model: nn.Module) -> None:
    """Raise for a family whose attention needs what packed attention does not do."""
    config = model.config.get_text_config()
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        raise LoadmasterError(
            f"{config.model_type} has attention sinks, which packed attention cannot do; models of this family are "
            "not trained yet"
        )
    if caps_scores(config) and getattr(config, "attention_dropout", 0.0):
        raise LoadmasterError(
            f"attention_dropout={config.attention_dropout} in the model's config.json: {config.model_type} caps its "
            "attention scores, and those have no dropout here; set it to 0 there (lora.dropout is another one)"
        )
