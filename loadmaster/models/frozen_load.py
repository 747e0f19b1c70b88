"""Quantizing while loading: transformers reads a checkpoint tensor by tensor, and a frozen layer takes its own at once.

Everything that transformers does on the way (names that changed, fused weights, ties, a torn file) stays its work; a
weight in the compute dtype exists for one layer at a time, on the device that it is quantized on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from loadmaster.models.frozen import FrozenLinear, freeze_linears

METHOD = "loadmaster_frozen"


@register_quantization_config(METHOD)
class FrozenConfig(QuantizationConfigMixin):
    """For from_pretrained(quantization_config=): a form of loadmaster.models.frozen.FORMS."""

    def __init__(self, form: str):
        self.quant_method, self.form = METHOD, form


@register_quantizer(METHOD)
class FrozenQuantizer(HfQuantizer):
    """Puts frozen layers into the model while it is on the meta device, and fills each as its weight is read."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, FrozenLinear) and name == "weight"

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return {"nf4": 0.5, "fp8": 1.0}[self.quantization_config.form]
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        dtype = model.get_output_embeddings().weight.dtype
        freeze_linears(model, self.quantization_config.form)
        for layer in model.modules():
            if isinstance(layer, FrozenLinear):  # transformers reads a weight in the dtype of what it is to replace
                shape = (layer.out_features, layer.in_features)
                layer.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def postprocess_model(self, model: nn.Module, **_: Any) -> None:
        """To everybody after this it is a model with some layers of its own, not one that transformers quantized."""
        self.remove_quantization_config(model)


class _Quantize(ConversionOps):
    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, Any]:
        filled = {}
        for name, value in input_dict.items():
            layer, _, _ = name.rpartition(".")
            module = model.get_submodule(layer)
            weight = value[0] if isinstance(value, list) else value
            filled |= {f"{layer}.{part}": tensor for part, tensor in module.quantized(weight).items()}
            module._is_hf_initialized = True
        return filled
