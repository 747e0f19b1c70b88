"""Attention of heads of more than 256 numbers, which flash kernels do not take: those of Gemma 4 that see everything.

On a GPU each document goes through PyTorch's memory-efficient kernel by itself, which takes heads of any size but no
groups of queries: a document's keys and values are repeated for the heads that share them, and their gradients summed.
(scaled_dot_product_attention told of groups would quietly compute all L x L scores of a document: transformers #46960.)
What is kept for the backward pass is what flash kernels keep: q, k, v, the output and the logsumexp. Everywhere else it
is attention.py's exact attention by document.

How many documents there are is read from their bounds, which waits for the device once a layer and pass.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loadmaster.preflight.shape import FLASH_HEAD

ALIGNED = 32
"""The kernel's logsumexp has a multiple of so many numbers for each head."""
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward


def is_wide(head_dim: int) -> bool:
    return head_dim > FLASH_HEAD


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """[1, H_kv, L, D] -> [1, H, L, D]."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _summed(gradient: Tensor, heads: int) -> Tensor:
    """The other way: over the heads that share a key."""
    return gradient.unflatten(1, (heads, -1)).sum(2)


def forward_document(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output [1, H, L, D], logsumexp [1, H, L]) of one document, by the memory-efficient kernel."""
    k, v = (_repeated(t, q.shape[1]) for t in (k, v))
    output, logsumexp, *_ = EFFICIENT(q, k, v, None, True, 0.0, True, scale=scale)
    return output, logsumexp[:, :, : q.shape[2]]


def backward_document(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one document, by the same kernel's backward pass."""
    groups, length = k.shape[1], q.shape[2]
    k, v = (_repeated(t, q.shape[1]) for t in (k, v))
    logsumexp = pad(logsumexp, (0, -length % ALIGNED), value=torch.inf).contiguous()
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's seed and offset
    d_q, d_k, d_v, _ = BACKWARD(
        grad, q, k, v, None, output, logsumexp, unused, unused, 0.0, [True, True, True, False], True, scale=scale
    )
    return d_q, _summed(d_k, groups), _summed(d_v, groups)


@torch.library.custom_op("loadmaster::wide_attention", mutates_args=())
def wide_attention(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output [1, H, N, D] that lies token by token, logsumexp [1, H, N]) of q [1, H, N, D], k and v [1, H_kv, N, D].

    On a GPU alone."""
    output, logsumexp = _outputs(q)
    for start, end in itertools.pairwise(cu_seq_lens.tolist()):
        part = slice(start, end)
        output[:, :, part], logsumexp[:, :, part] = forward_document(*(t[:, :, part] for t in (q, k, v)), scale)
    return output, logsumexp


@wide_attention.register_fake
def _outputs(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    output = q.new_empty(batch, tokens, heads, width).transpose(1, 2)
    return output, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("loadmaster::wide_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, output: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients(grad, q, k, v)
    for start, end in itertools.pairwise(cu_seq_lens.tolist()):
        part = slice(start, end)
        parts = backward_document(*(t[:, :, part] for t in (grad, q, k, v, output, logsumexp)), scale)
        for whole, gradient in zip(gradients, parts, strict=True):
            whole[:, :, part] = gradient
    return gradients


@_backward.register_fake
def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 5
    return *torch.ops.loadmaster.wide_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


wide_attention.register_autograd(_differentiate, setup_context=_keep)
