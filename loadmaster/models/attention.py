"""Attention over packed documents that never crosses from one to the next.

Several documents lie one after another in one row of tokens, [1, N]. `cu_seq_lens` holds where each
begins: document i is tokens cu_seq_lens[i] up to cu_seq_lens[i + 1]. On a GPU the variable-length flash
kernel (`torch.nn.attention.varlen`, torch >= 2.10) takes those bounds as they are; elsewhere each document
goes through scaled-dot-product attention by itself. Neither needs a mask, so none is built: a packed row of
S tokens never costs S x S memory, and transformers' mask code (which reads position ids back from the
device on every forward) is not run.

Calling the model without the bounds is an error, never a silent leak: transformers' default call over a
packed row lets documents see each other (logits differ by up to 37, measured on SmolLM2, 2026-11-23).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "loadmaster_packed"


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Causal mask [length, length] that reaches back `window` tokens, the token itself included."""
    offset = torch.arange(length, device=device)
    distance = offset[:, None] - offset[None, :]
    return (distance >= 0) & (distance < window)


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float | None, dropout: float, window: int | None
) -> Tensor:
    """q [1, H, N, D], k and v [1, H_kv, N, D] -> [1, H, N, D], one document at a time."""
    outputs = []
    for start, end in itertools.pairwise(bounds):
        length = end - start
        windowed = window is not None and length > window
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, start:end],
                v[:, :, start:end],
                attn_mask=_window_mask(length, window, q.device) if windowed else None,
                dropout_p=dropout,
                is_causal=not windowed,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    document_bounds: list[int] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]."""
    if cu_seq_lens_q is None or document_bounds is None:
        raise RuntimeError(
            "packed attention was called without document bounds; run the model through loadmaster.models.forward"
        )
    if softcap is not None or s_aux is not None:
        raise RuntimeError(
            "packed attention has no soft-capping or attention sinks; this model family is refused at load"
        )
    if query.is_cuda and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
        output = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=window,
            **_grouped_query(query, key),
        )
        return output.unsqueeze(0), None
    output = _by_document(query, key, value, document_bounds, scaling, dropout, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def _grouped_query(query: Tensor, key: Tensor) -> dict[str, bool]:
    """torch 2.11's varlen_attn infers grouped queries from the shapes, later ones want to be told."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    if query.shape[1] == key.shape[1] or "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return {}
    return {"enable_gqa": True}


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def cached_attention(model: nn.Module, implementation: str = "sdpa") -> Iterator[None]:
    """Within the block the model attends by padding mask and KV cache, as generation needs."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = causal.config._attn_implementation
    causal.set_attn_implementation(implementation)
    try:
        yield
    finally:
        causal.set_attn_implementation(before)
