"""DoRA (Liu et al. 2024, arXiv 2402.09353): an adapter whose weight has a magnitude for each output, and a direction.

    V = W + s B A        y = (m / |V|) V x + b        |V| the norm of each row of V [out], m its trained magnitude [out]

m begins as |W|, so that y begins as the base's. The norm takes part in no gradient (section 4.3 of the paper). peft's
own layer makes V by multiplying the adapter with an identity matrix, in x in, in every forward pass; here its rows'
norms come out of products that no dimension of the matrix is left in:

    |V|^2 = |W|^2 + 2 s rows(B * (W A^T)) + s^2 rows(B * (B (A A^T)))

in float32 but for W A^T [out, r], which is the base layer's own product with the rows of A. So a layer keeps one more
tensor of its output's size for the backward pass (the gradient of m needs it), and nothing the size of a weight is
made. Parameters, their names and files are peft's, and the steps are (a test). m is in float32 whatever the rest is in:
bf16 has steps of 0.4%, and a whole row of the weight would be off by half of one.

Dropout is on the adapter's input alone, as of a plain one: y = (m / |V|) (W x + s B A dropout(x)) + b. (peft also drops
from the part of W x by which m / |V| differs from 1, for which it multiplies with W twice. The mean is the same.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

LEAST_NORM = torch.finfo(torch.float32).tiny ** 0.5
"""Of a row of zeros (a dead or padded channel), which stays one: whatever its magnitude is divided by, but not 0."""


class Magnitudes:
    """Takes the place of peft's variant in a layer's forward pass."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """x [..., in], result [..., out] of the base layer."""
        a, b, dropout = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        scaling, layer = module.scaling[active_adapter], module.get_base_layer()
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        scale = (magnitude / row_norms(layer, a.weight, b.weight, scaling)).to(result.dtype)
        if layer.bias is None:
            return (result + b(a(dropout(x))) * scaling) * scale
        return (result - layer.bias + b(a(dropout(x))) * scaling) * scale + layer.bias

    @staticmethod
    def supports_lora_conversion() -> bool:
        return False


@torch.no_grad()
def row_norms(layer: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """|W + s B A| by rows [out], float32; W [out, in] the layer's weight, a [r, in], b [out, r]."""
    weight = layer.weight
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    a32, b32 = a.float(), b.float()
    crossed = nn.functional.linear(a, weight).t().float()
    both = 2 * scaling * crossed + scaling**2 * (b32 @ (a32 @ a32.t()))
    return (squares + (b32 * both).sum(1)).clamp(min=0).sqrt().clamp(min=LEAST_NORM)


def run_by_norms(model: nn.Module, folder: Path | None = None) -> None:
    """Let every DoRA layer that peft made run as above, m in float32: of the adapter in `folder`, or |W|.

    (peft makes and reads it in the dtype of the base.)
    """
    layers = {name: module for name, module in model.named_modules() if getattr(module, "lora_magnitude_vector", None)}
    saved = safe_open(folder / "adapter_model.safetensors", framework="pt") if layers and folder else None
    for name, module in layers.items():
        module.lora_variant["default"] = Magnitudes
        magnitude = module.lora_magnitude_vector["default"].weight
        if saved is not None:
            magnitude.data = saved.get_tensor(f"{name}.lora_magnitude_vector").to(magnitude.device, torch.float32)
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        magnitude.data = row_norms(module.get_base_layer(), a, b, module.scaling["default"])
