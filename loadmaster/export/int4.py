"""INT4 weights by rounding to nearest, without calibration data, to the bit as llm-compressor 0.14 does.

    scale = bf16(max |w| / 7.5)       of each group of inputs of an output channel
    q     = round(clamp(bf16(w / scale), -8, 7))

Eight values q + 8 lie in one int32, the first in its lowest four bits. All of it is taken in bf16, as there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loadmaster.errors import ExportRejected
from loadmaster.export.fp8 import Shape, scale_of
from loadmaster.export.stream import row_chunks
from loadmaster.preflight.tensor_parallel import INT4_GROUPS

STEPS = 7.5
PER_WORD = 8


def group_size(input_sizes: Iterable[int]) -> int:
    """The largest group size that divides the number of inputs of every quantized layer.

    Raises ExportRejected where none does.
    """
    sizes = sorted(set(input_sizes))
    for size in INT4_GROUPS:
        if all(inputs % size == 0 for inputs in sizes):
            return size
    odd = [inputs for inputs in sizes if inputs % INT4_GROUPS[-1]]
    raise ExportRejected(
        f"int4 needs layers whose number of inputs is a multiple of {INT4_GROUPS[-1]}; this model has {odd}. "
        "Take export.formats=[bf16, fp8] instead."
    )


@dataclass(frozen=True)
class Int4:
    """One scale a group of `group_size` inputs; activations stay in bf16."""

    group_size: int
    name = "pack-quantized"

    def problem(self, shape: Shape) -> str | None:
        return f"{shape[1]} is not a multiple of {self.group_size}" if shape[1] % self.group_size else None

    def layout(self, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        outputs, inputs = shape
        return {
            "weight_packed": (torch.int32, (outputs, inputs // PER_WORD)),
            "weight_scale": (torch.bfloat16, (outputs, inputs // self.group_size)),
            "weight_shape": (torch.int64, (2,)),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """weight: bf16 [outputs, inputs]."""
        outputs, inputs = weight.shape
        packed = torch.empty(outputs, inputs // PER_WORD, dtype=torch.int32)
        scales = []
        for rows in row_chunks((outputs, inputs)):
            part = weight[rows].unflatten(1, (-1, self.group_size))  # [rows, groups, group]
            scale = scale_of(part.abs().amax(dim=2), STEPS)
            quotient = part.div(scale.unsqueeze(-1)).clamp_(-8, 7).round_()
            values = (quotient.to(torch.int8).reshape(-1, PER_WORD // 2, 2) + 8).view(torch.uint8)
            pairs = values[..., 0] | (values[..., 1] << 4)
            packed[rows] = pairs.contiguous().view(torch.int32).reshape(-1, inputs // PER_WORD)
            scales.append(scale)
        return {
            "weight_packed": packed, "weight_scale": torch.cat(scales), "weight_shape": torch.tensor([outputs, inputs]),
        }

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": self.group_size}, None
