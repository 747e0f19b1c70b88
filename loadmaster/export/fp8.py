"""FP8 E4M3 weights without calibration data, to the bit as llm-compressor 0.14 rounds them.

    scale = bf16(max |w| / 448)        of each output channel, or of each block of 128 x 128
    q     = e4m3(clamp(bf16(w / scale), -448, 448))

448 is the largest E4M3 value. All of it is taken in bf16, as there: the quotient is rounded twice, and computing it
in float32 would give other bits (checked tensor by tensor in tests/export/test_stream.py). Activations are quantized
by the server as they come: per token, or per token and 128 inputs where weights have blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loadmaster.export.stream import row_chunks
from loadmaster.preflight.tensor_parallel import FP8_BLOCK as BLOCK

LARGEST = 448.0
E4M3 = torch.float8_e4m3fn
Shape = tuple[int, ...]


def scale_of(largest: Tensor, steps: float) -> Tensor:
    """Scales from the largest absolute values; those of nothing but zeros are bf16's epsilon, as in llm-compressor."""
    scale = largest / steps
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


class Fp8:
    """One scale an output channel."""

    name = "float-quantized"

    def problem(self, shape: Shape) -> str | None:
        return None

    def layout(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {"weight": (E4M3, shape), "weight_scale": (torch.bfloat16, (shape[0], 1))}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """weight: bf16 [outputs, inputs]."""
        packed = torch.empty(weight.shape, dtype=E4M3)
        scales = []
        for rows in row_chunks(tuple(weight.shape)):
            part = weight[rows]
            scale = scale_of(part.abs().amax(dim=1, keepdim=True), LARGEST)
            packed[rows] = part.div(scale).clamp_(-LARGEST, LARGEST).to(E4M3)
            scales.append(scale)
        return {"weight": packed, "weight_scale": torch.cat(scales)}

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Of weights and of input activations, in the terms of compressed-tensors."""
        weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
        return weights, {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


class Fp8Block:
    """One scale a block of 128 x 128 weights, as DeepSeek-V3 was trained (arXiv 2412.19437)."""

    name = "float-quantized"

    def problem(self, shape: Shape) -> str | None:
        odd = [size for size in shape if size % BLOCK]
        return f"{odd[0]} is not a multiple of {BLOCK}" if odd else None

    def layout(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {"weight": (E4M3, shape), "weight_scale": (torch.bfloat16, tuple(size // BLOCK for size in shape))}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """weight: bf16 [outputs, inputs], both multiples of 128."""
        packed = torch.empty(weight.shape, dtype=E4M3)
        scales = []
        for start in range(0, weight.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            part = weight[rows].unflatten(1, (-1, BLOCK))  # [128, blocks, 128]
            scale = scale_of(part.abs().amax(dim=(0, 2)), LARGEST)
            quotient = part.div(scale.unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
            packed[rows] = quotient.flatten(1).to(E4M3)
            scales.append(scale)
        return {"weight": packed, "weight_scale": torch.stack(scales)}

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]}
        return weights, {"num_bits": 8, "type": "float", "strategy": "group", "group_size": BLOCK, "dynamic": True}
