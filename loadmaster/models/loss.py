"""Cross-entropy fused with the head, in chunks, over trained positions only.

The loss of a token with hidden state x [h] and target t is  logsumexp(W x) - (W x)[t], W the head [V, h].
Its gradient needs only softmax(W x) - onehot(t), so it can be taken in the forward pass, chunk by chunk:
at no time do more than CHUNK_TOKENS x V logits exist, and the backward pass recomputes nothing. The common
way keeps N x V logits in bf16 and fp32 together with their gradients, 12 to 14 bytes per token and
vocabulary entry: 6.85 GiB at 4096 tokens and a 128k vocabulary (measured, shared with the preflight).

Eager, a chunk's logits are cast to fp32 and pass through memory a dozen times. Beside compiled layers (`compile_loss`)
they stay in the compute dtype and their gradient takes their place, by a function that reads them two or three times:
a quarter of the memory (2 bytes of 8, a chunk and vocabulary entry in bf16). Its shape is always that of a whole chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.preflight.layers import LOSS_CHUNK_TOKENS as CHUNK_TOKENS


def run_with_head(head: nn.Module, function: Callable[..., Tensor], hidden_TH: Tensor, *arguments: Any) -> Tensor:
    """function(hidden, head, *arguments). A head that is sharded by itself has this as a method, which gathers it."""
    return function(hidden_TH, head, *arguments)


def through_head(head: nn.Module, function: Callable[..., Tensor], hidden_TH: Tensor, *arguments: Any) -> Tensor:
    """The same, by the head's own method where it has one."""
    run = getattr(head, "run", None) or partial(run_with_head, head)
    return run(function, hidden_TH, *arguments)


def compile_loss(head: nn.Module, backend: str) -> None:
    """Take this head's logits and their gradient in a compiled kernel from now on."""
    head.loss_backend = backend


@cache
def _compiled_gradient(backend: str) -> Callable[..., Tensor]:
    return torch.compile(_gradient_in_place, dynamic=False, fullgraph=True, backend=backend)


def _gradient_in_place(logits_CV: Tensor, targets_C: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Sum of cross-entropies of a chunk whose logits give way to their gradient; a target of -1 is of no token."""
    counted = targets_C >= 0
    wide = logits_CV.float()
    if scale != 1.0:
        wide = wide * scale
    capped = None
    if softcap is not None:
        capped = torch.tanh(wide / softcap)
        wide = capped * softcap
    log_normaliser = torch.logsumexp(wide, dim=-1, keepdim=True)
    target = torch.arange(wide.shape[-1], device=wide.device) == targets_C[:, None]
    losses = log_normaliser.squeeze(-1) - torch.where(target, wide, 0.0).sum(-1)
    grad = torch.exp(wide - log_normaliser) - target.float()
    if capped is not None:
        grad = grad * (1 - capped.square())  # tanh' = 1 - tanh^2
    if scale != 1.0:
        grad = grad * scale
    logits_CV.copy_(torch.where(counted[:, None], grad, 0.0))
    return torch.where(counted, losses, 0.0).sum()


class _CompiledCrossEntropy(torch.autograd.Function):
    """`_ChunkedCrossEntropy` with gradients, its chunks in one buffer."""

    @staticmethod
    def forward(
        ctx, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, softcap: float | None,
        scale: float, backend: str,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        logits = hidden_TH.new_empty(CHUNK_TOKENS, weight_VH.shape[0])
        part, targets = logits, targets_T.new_empty(CHUNK_TOKENS)
        for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS):
            x = hidden_TH[start : start + CHUNK_TOKENS]
            part = logits[: len(x)]
            targets.fill_(-1)[: len(x)] = targets_T[start : start + CHUNK_TOKENS]
            if bias_V is None:
                torch.mm(x, weight_VH.t(), out=part)
            else:
                torch.addmm(bias_V, x, weight_VH.t(), out=part)
            total += _compiled_gradient(backend)(logits, targets, softcap, scale)
            if grad_hidden is not None:
                torch.mm(part, weight_VH, out=grad_hidden[start : start + CHUNK_TOKENS])
            if grad_weight is not None:
                grad_weight += part.t() @ x
        del logits, part
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype) if needs_weight else None)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return *_times(ctx.saved_tensors, grad_output), *[None] * 5


def _times(gradients: tuple[Tensor | None, ...], factor: Tensor) -> list[Tensor | None]:
    return [None if each is None else each * factor.to(each.dtype) for each in gradients]


def logits_and_tanh(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Of a chunk: (logits [C, V] in fp32, tanh of the uncapped ones over the cap where there is one)."""
    logits = torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float()
    if scale != 1.0:
        logits *= scale
    if softcap is None:
        return logits, None
    capped = logits.div_(softcap).tanh_()
    return capped * softcap, capped


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
        for start in range(0, hidden_TH.shape[0], CHUNK_TOKENS):
            x = hidden_TH[start : start + CHUNK_TOKENS]
            t = targets_T[start : start + CHUNK_TOKENS]
            logits, capped = logits_and_tanh(x, weight_VH, bias_V, softcap, scale)
            log_normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_normaliser.squeeze(-1) - logits.gather(-1, t[:, None]).squeeze(-1)).sum()
            if grad_hidden is None and grad_weight is None:
                del logits, capped  # before the next chunk's are made
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
            del logits, grad
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VH.dtype) if needs_weight else None)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return *_times(ctx.saved_tensors, grad_output), *[None] * 5


def summed_cross_entropy(
    hidden_TH: Tensor, head: nn.Linear, targets_T: Tensor, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """Sum over T tokens of the cross-entropy of `head(hidden)` with `targets`; fp32 scalar.

    hidden_TH: [T, h] in the compute dtype; targets_T: [T] int64, every one trained.
    softcap: logits are softcap * tanh(logits / softcap) where set; scale multiplies the logits.
    """
    if head.bias is not None and head.bias.requires_grad:
        raise RuntimeError("a trainable bias of the head has no gradient here")
    backend, gradients = getattr(head, "loss_backend", None), torch.is_grad_enabled()
    if backend is not None and gradients and (hidden_TH.requires_grad or head.weight.requires_grad):
        return _CompiledCrossEntropy.apply(hidden_TH, head.weight, head.bias, targets_T, softcap, scale, backend)
    return _ChunkedCrossEntropy.apply(hidden_TH, head.weight, head.bias, targets_T, softcap, scale, gradients)
