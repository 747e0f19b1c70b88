"""Buffers that a checkpoint stores beside the weights: numbers of the base that are not trained (Gemma 4 has some).

Rotary frequencies and the like are computed, and in no file.
"""

from __future__ import annotations

from torch import Tensor, nn

from loadmaster.models.frozen import FrozenLinear


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """By name. Those of layers that are quantized while they are read are codes' scales, and in no checkpoint."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not isinstance(module, FrozenLinear)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
