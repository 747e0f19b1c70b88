"""Training every weight with products on FP8 units (method=full precision=fp8): torchao's float8 training.

Weights, gradients and activations stay in bf16; before each product its two factors are cast to FP8 under one scale
each (E4M3 forward, E5M2 for gradients), taken as they come. So it saves time and no memory, and what is trained and
exported is bf16. Scaling by row was slower than bf16 (one H100, full 3B, 2026-11-23: 24,329 tokens/s by row, 28,761
by tensor, 24,639 in bf16), so it is not offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MULTIPLE = 16
"""Sizes that FP8 units take; other layers stay in bf16."""


def train_in_fp8(model: nn.Module, device: torch.device) -> None:
    """Swap every linear layer but the head. Where `device` has no FP8 units the rounding is imitated, slowly."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.get_output_embeddings()
    units = device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))
    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, _: module is not head and takes_fp8(module.in_features, module.out_features),
        config=Float8LinearConfig(emulate=not units),
    )


def takes_fp8(inputs: int, outputs: int) -> bool:
    return inputs % MULTIPLE == 0 and outputs % MULTIPLE == 0


@contextmanager
def products_in_bf16(model: nn.Module) -> Iterator[None]:
    """Within the block no product is rounded to FP8: a row of tokens has one scale there, so documents depend on each
    other by what is rounded away."""
    swapped = [(module, type(module)) for module in model.modules() if type(module).__name__ == "Float8Linear"]
    for module, _ in swapped:
        module.__class__ = nn.Linear
    try:
        yield
    finally:
        for module, kind in swapped:
            module.__class__ = kind
