"""Attention whose scores are soft-capped, as Gemma 2's are: cap * tanh(score / cap) before the softmax.

PyTorch's variable-length kernel has no cap (looked up in torch 2.13), so on a GPU such models go through FlexAttention
(`torch.nn.attention.flex_attention`): one fused kernel made of `capping` and `sees`, which reads only the blocks of
128 x 128 positions that have a pair to attend. Which ones those are is worked out once a micro-batch from the document
bounds (`visible_blocks`), never by way of an N x N mask. Everywhere else `capped_attention` below is exact, document by
document; its sizes on the meta device are those of the kernel: the output and the logsumexp are kept.

What FlexAttention is known for, and what is done about it here:
- a backward pass of NaN where the length is no multiple of 128 (pytorch #153799), and fewer than 128 tokens sent to the
  kernel for decoding: a micro-batch is padded to whole blocks (forward.py);
- kernels for heads of 256 that need more shared memory than an RTX or L4 has (pytorch #198224): smaller blocks there,
  those of pytorch #198228 for the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from loadmaster.models.transfer import put
from loadmaster.preflight.blocks import BLOCK

BLOCKED = {"cuda", "meta"}
"""Devices that get blocks; a trace on the meta device stands for a GPU."""
BACKEND = "inductor"
ROOMY_BYTES = 160 * 1024
"""Shared memory of a block of threads with which the kernels' own sizes work (A100: 163 KiB; RTX, L4, L40S: 99)."""


def caps_scores(config: Any) -> float | None:
    """The cap of the model's attention scores, or None."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) or None


def own_attention(config: Any) -> str:
    """Which of transformers' attentions the model runs rightly in, cached or not: sdpa ignores the cap."""
    return "eager" if caps_scores(config) else "sdpa"


def attention_windows(config: Any) -> set[int | None]:
    """The windows that the model's layers have, tokens; None sees everything before it."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    return {text.sliding_window if kind == "sliding_attention" else None for kind in kinds}


# ---------------------------------------------------------------- FlexAttention


def capping(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's score_mod."""
    return lambda score, batch, head, query, key: softcap * torch.tanh(score / softcap)


def sees(documents_N: Tensor, window: int | None) -> Callable[..., Tensor]:
    """FlexAttention's mask_mod: the same document, nothing later, nothing further back than the window."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (documents_N[query] == documents_N[key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    return visible


def fused_inputs(config: Any, bounds: list[int], device: torch.device) -> dict[str, Any]:
    """What attention takes beside q, k and v where the fused kernel runs; nothing for other models and devices."""
    if not runs_fused(config, device):
        return {}
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    options = kernel_options(head_dim, _shared_bytes(device))
    return {**visible_blocks(bounds, attention_windows(config), device), "kernel_options": options}


def runs_fused(config: Any, device: torch.device) -> bool:
    return bool(caps_scores(config)) and device.type in BLOCKED


def visible_blocks(bounds: list[int], windows: Iterable[int | None], device: torch.device) -> dict[str, Any]:
    """Which document each token is of, and the blocks that its attention has to read.

    bounds: where documents begin, and the end, a multiple of BLOCK. Returns `documents`, int32 [N], and by window
    `blocks`, four times how many [1, 1, N / BLOCK] and which [1, 1, N / BLOCK, N / BLOCK], int32: blocks that a query
    block sees in part, and whole, and blocks that see a key block in part, and whole (BlockMask's own order).
    """
    sizes = torch.tensor([end - start for start, end in itertools.pairwise(bounds)])
    documents = put(torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes), device)
    first, last = documents[::BLOCK], documents[BLOCK - 1 :: BLOCK]
    place = torch.arange(len(first), device=device)
    back = place[:, None] - place[None, :]
    blocks = {}
    for window in windows:
        # Documents lie in order, so two blocks share one where the earlier ends with what the later begins with; the
        # pair of tokens nearest to each other is then of it, and the first and the last of it see each other if any do.
        partly = (back >= 0) & (last[None, :] >= first[:, None])
        whole = (back > 0) & (first[None, :] == last[:, None])
        if window is not None:
            partly &= (back - 1) * BLOCK + 1 < window
            whole &= back * BLOCK + BLOCK - 1 < window
        partly &= ~whole
        blocks[window] = *_table(partly), *_table(whole), *_table(partly.T), *_table(whole.T)
    return {"documents": documents, "blocks": blocks}


def _table(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a bool matrix: how many are true, and their places before the others'."""
    places = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32)[None, None], places.to(torch.int32).contiguous()[None, None]


def flexible(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, blocks: tuple[Tensor, ...],
    scale: float, softcap: float, window: int | None, options: dict[str, Any] | None = None,
) -> Tensor:
    """FlexAttention of q [1, H, N, D] over k and v [1, H_kv, N, D] -> [1, H, N, D]."""
    size = (q.shape[2], q.shape[2])
    mask = BlockMask(size, *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees(documents, window))
    return flex_attention(
        q, k, v, score_mod=capping(softcap), block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )


def kernel_options(head_dim: int, shared_bytes: int) -> dict[str, Any]:
    """Of the fused kernel: its own, or blocks that fit what the card has. shared_bytes: of a block of threads."""
    if head_dim <= 128 or shared_bytes >= ROOMY_BYTES:
        return {}
    blocks = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    return {**dict.fromkeys(blocks, 32), "num_stages": 2, "num_warps": 4}


def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return ROOMY_BYTES
    gpu = torch.cuda.get_device_properties(device)
    # Drivers say 4 GiB of an RTX 50's blocks (llama.cpp #23385), which have no more than a multiprocessor.
    return min(gpu.shared_memory_per_block_optin, gpu.shared_memory_per_multiprocessor)


@cache
def _compiled() -> Callable[..., Tensor]:
    """`flexible` by itself, for layers that are not compiled.

    Where the compiler gave up it would run unfused, with N x N scores; fullgraph makes that an error.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flexible, fullgraph=True, backend=BACKEND)


# ---------------------------------------------------------------- exact, document by document


def _pieces(bounds: list[int], window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that they see) over all documents, BLOCK queries of one at a time: scores take N x BLOCK."""
    for start, end in itertools.pairwise(bounds):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            yield slice(first, last), slice(start if window is None else max(start, first - window + 1), last)


def _parts(
    q: Tensor, k: Tensor, v: Tensor, queries: slice, keys: slice, scale: float, softcap: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of one piece, in fp32 or finer: q, k and v with a head for each of q's, tanh(scores / cap), who sees whom."""
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q[:, :, queries].to(wide)
    key, value = (t[:, :, keys].to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    places = (torch.arange(part.start, part.stop, device=q.device) for part in (queries, keys))
    back = next(places)[:, None] - next(places)[None, :]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    return query, key, value, torch.tanh(query @ key.mT * (scale / softcap)), seen


@torch.library.custom_op("loadmaster::capped_attention", mutates_args=())
def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, softcap: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(output [1, H, N, D], logsumexp [1, H, N]) of q [1, H, N, D], k and v [1, H_kv, N, D]."""
    output, logsumexp = _outputs(q)
    for queries, keys in _pieces(cu_seq_lens.tolist(), window):
        _, _, value, bent, seen = _parts(q, k, v, queries, keys, scale, softcap, window)
        scores = (softcap * bent).masked_fill_(~seen, -torch.inf)
        total = scores.logsumexp(-1, keepdim=True)
        output[:, :, queries] = (scores - total).exp_() @ value
        logsumexp[:, :, queries] = total.squeeze(-1)
    return output, logsumexp


@capped_attention.register_fake
def _outputs(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("loadmaster::capped_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, output: Tensor, logsumexp: Tensor,
    scale: float, softcap: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With T = tanh(scale Q K^T / cap) and P = exp(cap T - logsumexp), one piece of a document at a time:

    dV = P^T dO    dS = P (dO V^T - rowsum(dO O)) (1 - T^2)    dQ = scale dS K    dK = scale dS^T Q
    """
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros_like(t, dtype=logsumexp.dtype) for t in (k, v))  # sums over pieces
    for queries, keys in _pieces(cu_seq_lens.tolist(), window):
        query, key, value, bent, seen = _parts(q, k, v, queries, keys, scale, softcap, window)
        d_out, out = (t[:, :, queries].to(query.dtype) for t in (grad, output))
        p = (softcap * bent - logsumexp[:, :, queries, None]).exp_().masked_fill_(~seen, 0)
        d_scores = p * (d_out @ value.mT - (d_out * out).sum(-1, keepdim=True)) * (1 - bent * bent)
        d_q[:, :, queries] = d_scores @ key * scale
        for whole, part in ((d_k, d_scores.mT @ query * scale), (d_v, p.mT @ d_out)):
            whole[:, :, keys] += part.unflatten(1, (whole.shape[1], -1)).sum(2)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    gradients = torch.ops.loadmaster.capped_attention_backward(grad, *saved, ctx.scale, ctx.softcap, ctx.window)
    return *gradients, None, None, None, None


capped_attention.register_autograd(_differentiate, setup_context=_keep)


def attend_capped(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, softcap: float, window: int | None,
    documents: Tensor | None = None, blocks: dict[int | None, tuple[Tensor, ...]] | None = None,
    kernel_options: dict[str, Any] | None = None,
) -> Tensor:
    """q [1, H, N, D], k and v [1, H_kv, N, D] -> [1, H, N, D], by the fused kernel where there are blocks for it."""
    if blocks is None or q.is_meta:
        return torch.ops.loadmaster.capped_attention(q, k, v, cu_seq_lens, scale, softcap, window)[0]
    fused = flexible if torch.compiler.is_compiling() else _compiled()
    return fused(q, k, v, documents, blocks[window], scale, softcap, window, kernel_options)
