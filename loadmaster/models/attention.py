"""Attention over packed documents that never crosses from one to the next.

Several documents lie one after another in one row of tokens, [1, N]. `cu_seq_lens` holds where each
begins: document i is tokens cu_seq_lens[i] up to cu_seq_lens[i + 1]. On a GPU the variable-length flash
kernel (`torch.nn.attention.varlen`, torch >= 2.10) takes those bounds as they are; elsewhere each document
goes through scaled-dot-product attention by itself. Neither needs a mask, so none is built: a packed row of
S tokens never costs S x S memory, and transformers' mask code (which reads position ids back from the
device on every forward) is not run. FlashAttention 3 or 4 takes that kernel's place where it may: flash.py.

Both are one operation to torch.compile, and neither how many documents there are nor how long they are is part of
a compiled graph: each batch has others. The kernel is told the longest document's length, which is therefore the
first size of a tensor without elements; as a number it would be compiled in.

Soft-capped scores (Gemma 2) are a kernel of their own: capped.py; so are heads of more than 256 numbers (Gemma 4), on
a GPU: wide_heads.py.

Calling the model without the bounds is an error, never a silent leak: transformers' default call over a
packed row lets documents see each other (logits differ by up to 37, measured on SmolLM2, 2026-11-23).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from loadmaster.models.capped import attend_capped, own_attention
from loadmaster.models.forward import causal_lm
from loadmaster.models.libraries import OPTIONAL, without
from loadmaster.models.wide_heads import is_wide

with without(*OPTIONAL):
    from transformers import AttentionInterface

PACKED = "loadmaster_packed"
REROUTED = False
"""Whether another package's kernel runs in the place of PyTorch's; flash.py sets it."""


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


@torch.compiler.disable(reason="attention dropout")
def _eagerly(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float | None, dropout: float, window: int | None
) -> Tensor:
    """`_by_document`, between two graphs of a compiled layer where there is dropout: the bounds that it reads would be
    compiled in, and each batch has others."""
    return _by_document(q, k, v, cu_seq_lens.tolist(), scale, dropout, window)


@torch.library.custom_op("loadmaster::attention_by_document", mutates_args=())
def attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """`_by_document` as one operation, for compiled layers where there is no variable-length kernel (a CPU)."""
    return _by_document(q, k, v, cu_seq_lens.tolist(), scale, 0.0, window)


@attention_by_document.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float | None, window: int | None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("loadmaster::attention_by_document_backward", mutates_args=())
def _backward_by_document(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention's gradients, one document at a time, with its probabilities P made again in fp32:

    dV = P^T dO    dS = P (dO V^T - rowsum(dO O))    dQ = scale dS K    dK = scale dS^T Q
    """
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    for start, end in itertools.pairwise(cu_seq_lens.tolist()):
        d_out, query = grad[:, :, start:end].float(), q[:, :, start:end].float()
        key, value = (t[:, :, start:end].float().repeat_interleave(groups, dim=1) for t in (k, v))
        seen = _window_mask(end - start, end - start if window is None else window, q.device)
        scores = (query @ key.mT * scale).masked_fill_(~seen, -torch.inf)
        p = scores.softmax(-1)
        d_p = d_out @ value.mT
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True))
        parts = d_scores @ key * scale, d_scores.mT @ query * scale, p.mT @ d_out
        for whole, part in zip(gradients, parts, strict=True):
            whole[:, :, start:end] = part.unflatten(1, (whole.shape[1], -1)).sum(2)
    return tuple(gradients)


@_backward_by_document.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    gradients = torch.ops.loadmaster.attention_by_document_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *gradients, None, None, None


attention_by_document.register_autograd(_differentiate, setup_context=_keep)


def by_bounds(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest_document: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D], by the variable-length kernel.

    PyTorch's own, or the one that runs in its place (flash.py).
    """
    from torch.nn.attention.varlen import varlen_attn

    longest, q = longest_document.shape[0], query[0].transpose(0, 1)
    if not q.is_contiguous() and REROUTED:  # its output always is, and compiled code counts on one laid out like q
        q = q.contiguous()
    output = varlen_attn(
        q,
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        **({"enable_gqa": True} if query.shape[1] != key.shape[1] and TOLD_OF_GROUPS else {}),
    )
    return output.unsqueeze(0)


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
    longest_document: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Tensor | None = None,
    blocks: dict[int | None, tuple[Tensor, ...]] | None = None,
    kernel_options: dict[str, Any] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D].

    cu_seq_lens_q: int32 [documents + 1]; longest_document: [its length, 0], no elements. documents, blocks and
    kernel_options: for capped scores on a GPU (capped.fused_inputs).
    """
    if cu_seq_lens_q is None or longest_document is None:
        raise RuntimeError(
            "packed attention was called without document bounds; run the model through loadmaster.models.forward"
        )
    if s_aux is not None:
        raise RuntimeError("packed attention has no attention sinks; this model family is refused at load")
    if softcap is not None:
        if dropout:
            raise RuntimeError("packed attention has no dropout of capped scores; this model is refused at load")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attend_capped(
            query, key, value, cu_seq_lens_q, scale, softcap, sliding_window, documents, blocks, kernel_options
        )
        return output.transpose(1, 2), None
    if is_wide(query.shape[-1]) and dropout == 0.0 and (query.is_meta or query.is_cuda):
        if sliding_window is not None:
            raise RuntimeError("packed attention has no windows for heads of this size; this model is refused at load")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = torch.ops.loadmaster.wide_attention(query, key, value, cu_seq_lens_q, scale)[0]
        return output.transpose(1, 2), None
    # A trace on the meta device stands for a GPU, whose kernel takes 16 bits (float32 is there to be compared with).
    if query.is_meta or (query.is_cuda and dropout == 0.0 and query.dtype != torch.float32):
        return by_bounds(query, key, value, cu_seq_lens_q, longest_document, scaling, sliding_window), None
    if torch.compiler.is_compiling() and dropout == 0.0:
        output = torch.ops.loadmaster.attention_by_document(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    else:
        output = _eagerly(query, key, value, cu_seq_lens_q, scaling, dropout, sliding_window)
    return output.transpose(1, 2).contiguous(), None


def _told_of_groups() -> bool:
    """torch 2.11's varlen_attn infers grouped queries from the shapes, later ones want to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


TOLD_OF_GROUPS = _told_of_groups()

AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def cached_attention(model: nn.Module, implementation: str | None = None) -> Iterator[None]:
    """Within the block the model attends by padding mask and KV cache, as generation needs."""
    causal = causal_lm(model)
    implementation = implementation or own_attention(causal.config)
    before = causal.config._attn_implementation
    causal.set_attn_implementation(implementation)
    try:
        yield
    finally:
        causal.set_attn_implementation(before)
