"""Cross-entropy fused with the head, in chunks, over trained positions only.

The loss of a token with hidden state x [h] and target t is  logsumexp(W x) - (W x)[t], W the head [V, h].
Its gradient needs only softmax(W x) - onehot(t), so it can be taken in the forward pass, chunk by chunk:
at no time do more than CHUNK_TOKENS x V logits exist, and the backward pass recomputes nothing. The common
way keeps N x V logits in bf16 and fp32 together with their gradients, 12 to 14 bytes per token and
vocabulary entry: 6.85 GiB at 4096 tokens and a 128k vocabulary (measured, shared with the preflight).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK_TOKENS = 1024
"""Rows of logits alive at a time; the preflight's memory model reads this number."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; gradients of hidden states and head are made in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        softcap: float | None,
        scale: float,
        with_gradients: bool,
    ) -> Tensor:
        needs_hidden, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        capped = None
        for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS):
            x = hidden_TH[start : start + CHUNK_TOKENS]
            t = targets_T[start : start + CHUNK_TOKENS]
            logits = torch.nn.functional.linear(x, weight_VH, bias_V).float()
            if scale != 1.0:
                logits *= scale
            if softcap is not None:
                capped = logits.div_(softcap).tanh_()
                logits = capped * softcap
            log_normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_normaliser.squeeze(-1) - logits.gather(-1, t[:, None]).squeeze(-1)).sum()
            if grad_hidden is None and grad_weight is None:
                capped = None
                continue
            grad = logits.sub_(log_normaliser).exp_()  # softmax, in the logits' own memory
            grad.scatter_add_(-1, t[:, None], grad.new_full((len(t), 1), -1.0))
            if softcap is not None:
                grad *= capped.square_().neg_().add_(1)  # tanh' = 1 - tanh^2, in its own memory
                capped = None
            if scale != 1.0:
                grad *= scale
            grad = grad.to(weight_VH.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + CHUNK_TOKENS] = grad @ weight_VH
            if grad_weight is not None:
                grad_weight += grad.T @ x
            del logits, grad  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype) if needs_weight else None)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad_output.to(grad_weight.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def summed_cross_entropy(
    hidden_TH: Tensor, head: nn.Linear, targets_T: Tensor, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Sum over T tokens of the cross-entropy of `head(hidden)` with `targets`; fp32 scalar.

    hidden_TH: [T, h] in the compute dtype; targets_T: [T] int64, every one trained.
    softcap: logits are softcap * tanh(logits / softcap) where set; scale multiplies the logits.
    """
    if head.bias is not None and head.bias.requires_grad:
        raise RuntimeError("a trainable bias of the head has no gradient here")
    return _ChunkedCrossEntropy.apply(
        hidden_TH, head.weight, head.bias, targets_T, softcap, scale, torch.is_grad_enabled()
    )
