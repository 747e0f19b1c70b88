"""Activation checkpointing: what the backward pass finds kept, and what it makes again.

    none       everything that the backward pass reads is kept
    selective  of each decoder layer: its input, attention, and products over at least WIDE inputs; norms, activations,
               rotary embeddings, dequantized weights and adapters' second products are made again
    full       of each decoder layer its input

Selective is torch.utils.checkpoint's policy by operation. What is kept is what costs most to make again for each byte
it takes: an element of a product over K inputs costs 2 K FLOPs and 2 bytes, so that on cards of the day, with about
300 dense bf16 FLOPs for each byte of bandwidth, remaking it is cheaper than its traffic below some hundred inputs.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from loadmaster.models.forward import causal_lm, decoder_layers

WIDE = 512
"""Inputs of a product that is kept; an adapter's second product has its rank. The preflight reads this number."""


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Set how a model's decoder layers are checkpointed; the mode before is undone. Before they are compiled."""
    lm = causal_lm(model)
    if lm.is_gradient_checkpointing:
        lm.gradient_checkpointing_disable()
    if mode == "full":
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.get_decoder().train()
    layers = getattr(lm.get_decoder(), "layers", [])
    for layer in layers:
        if getattr(layer.__dict__.get("forward"), "__func__", None) is _selective:
            del layer.forward
    if mode == "selective":
        for layer in decoder_layers(model):
            layer.forward = MethodType(_selective, layer)


def _selective(layer: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """The layer's own forward, checkpointed by operation."""
    forward = partial(type(layer).forward, layer)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_contexts, **settings)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    name = operation.name() if isinstance(operation, torch._ops.OpOverload) else ""
    inputs = arguments[PRODUCTS[name]].shape[-1] if name in PRODUCTS else 0
    kept = name in ATTENTION or inputs >= WIDE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::_scaled_mm": 0,
    "aten::_grouped_mm": 0,
    "bitsandbytes::gemm_4bit": 0,
}
"""By operation, which argument is the left factor."""

ATTENTION = {
    "torch_attn::_varlen_attn",
    "loadmaster::attention_by_document",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
