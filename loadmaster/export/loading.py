"""Load an exported folder as a server would, and strictly: whatever does not fill the model is an error."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from loadmaster.errors import ExportRejected
from loadmaster.export.weights import tensor_names, weight_files
from loadmaster.files import read_json
from loadmaster.models.attention import PACKED
from loadmaster.models.bf16_products import quicken
from loadmaster.models.language_model import by_names_of, of_whole
from loadmaster.models.load import config_of, load_trained, placed_by
from loadmaster.models.spread import Spread, other_shapes, settled, where_they_lie

LOOSE = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_export(folder: Path, device: str | Spread) -> nn.Module:
    """The exported model as a server sees it, in bf16; quantized activations are quantized here too.

    Raises ExportRejected for any tensor that is missing, unexpected, or of another shape.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quicken()
    quantized = "quantization_config" in read_json(folder / "config.json")
    quantization = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantized else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder), config=config_of(folder), dtype=torch.bfloat16, attn_implementation=PACKED, use_safetensors=True,
        output_loading_info=True, ignore_mismatched_sizes=True,  # named below instead
        trust_remote_code=False, **quantization, **placed_by(folder, torch.bfloat16, device),
    )
    _refuse_loose_tensors({kind: sorted(map(str, info[kind])) for kind in LOOSE if info.get(kind)})
    model = settled(model)
    if isinstance(device, Spread) and not device.placement.is_whole and (wrong := other_shapes(model, device.shapes)):
        _refuse_loose_tensors({"mismatched_keys": wrong})
    return model.eval()


def load_adapter(base: Path, folder: Path, device: str | Spread) -> nn.Module:
    """The exported adapter over the bf16 base, every one of its tensors in use."""
    with by_names_of(base, folder, of_whole) as own:
        return _adapted(base, own, device)


def _adapted(base: Path, folder: Path, device: str | Spread) -> nn.Module:
    from peft import get_peft_model_state_dict

    model = load_trained(base, folder, torch.bfloat16, device)
    with where_they_lie(model):
        expected = set(get_peft_model_state_dict(model))
    found = set(tensor_names(folder / "adapter_model.safetensors"))
    _refuse_loose_tensors({
        kind: sorted(names)
        for kind, names in {"missing_keys": expected - found, "unexpected_keys": found - expected}.items()
        if names
    })
    return model


def refuse_torn(folder: Path) -> None:
    """Raises ExportRejected for a safetensors file that is not there, or is cut off or damaged in its header."""
    for file in weight_files(folder):
        try:
            tensor_names(file)
        except Exception as error:  # safetensors raises a class of its own, and OSError
            raise ExportRejected(f"{file.name} is torn or no safetensors file ({error})") from None


def _refuse_loose_tensors(problems: dict[str, list[str]]) -> None:
    if problems:
        shown = "; ".join(
            f"{len(names)} {kind.replace('_', ' ')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in problems.items()
        )
        raise ExportRejected(f"its tensors do not fill the model: {shown}")
