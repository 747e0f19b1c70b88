"""Bytes that one decoder layer keeps for its backward pass, and what it needs while it runs.

    kept, full fine-tune      16h + 4q + 4k + 4n + 8f + 8          bytes per token and layer, bf16
    kept, bf16 adapters       12h + 4q + 4k + 4n + 8f + 8 + 14r

h hidden, f feed-forward, q and k widths of query and key, n heads, r rank (all linears adapted).
Source: memory.md section 2.1, equal to traces of the eager transformers blocks within 0.00015%.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape


@dataclass(frozen=True)
class LayerBytes:
    kept: int
    """Alive from the layer's forward to its backward."""
    backward: int
    """Most that is alive inside the layer's backward besides what it kept, its gradients' storage included."""


def layer_bytes(shape: ModelShape, setup: Setup) -> LayerBytes:
    n, w = setup.tokens, setup.width
    h, f, q, k = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size
    if shape.experts:
        f = shape.expert_size * shape.experts_per_token
    norms = shape.norms * 4 * h + (2 if setup.adapters else 4) * w * h
    if not setup.adapters:
        norms += shape.norms // 2 * 2 * w * h // 2
    kept = n * (norms + 2 * w * q + 2 * w * k + 4 * shape.heads + 4 * w * f + 8)
    if setup.adapters:
        kept += n * w * setup.lora_rank * len(shape.adapted(setup.lora_targets))
    return LayerBytes(kept=kept, backward=n * w * (4 * f + 2 * h))
