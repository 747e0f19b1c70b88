"""Kernels of PyTorch's flash attention operators for a CPU, right and wrong ones: what test_flash.py activates."""

import itertools
from dataclasses import dataclass

import torch
from torch.library import Library


class Kernel:
    """Exact attention of each document in fp32; `rounded`, with probabilities and their gradients in bf16 as a GPU has
    them, over blocks of so many keys."""

    def __init__(self, block: int | None = None):
        self.block = block

    def rounded(self, t):
        return t if self.block is None else t.to(torch.bfloat16).float()

    def pieces(self, q, k, v, bounds, scale, left, right):
        """(tokens, q, k, v [H, L, D] with a head for each of q's, who sees whom, scale) of each document."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        for start, end in itertools.pairwise(bounds.tolist()):
            q_, k_, v_ = (t[start:end].transpose(0, 1).float() for t in (q, k, v))
            k_, v_ = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for t in (k_, v_))
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            seen = (back >= -right if right >= 0 else back == back) & (back <= left if left >= 0 else back == back)
            yield slice(start, end), q_, k_, v_, seen, scale

    def forward(
        self, q, k, v, bounds, bounds_k, longest, longest_k, dropout, causal, debug, *, scale=None,
        window_size_left=-1, window_size_right=-1, **_,
    ):
        output, logsumexp = self.output(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        for tokens, q_, k_, v_, seen, s in self.pieces(q, k, v, bounds, scale, window_size_left, window_size_right):
            scores = (q_ @ k_.mT * s).masked_fill(~seen, -torch.inf)
            logsumexp[:, tokens] = scores.logsumexp(-1)
            output[tokens] = self.attend(scores, v_).transpose(0, 1).to(q.dtype)
        numbers = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return output, logsumexp, *numbers, torch.empty(0)

    def output(self, q):
        return torch.empty_like(q)

    def attend(self, scores, v):
        size = self.block or scores.shape[-1]
        most, total = scores.new_full((*scores.shape[:2], 1), -1e30), 0.0
        summed = 0.0
        for part, values in zip(scores.split(size, dim=-1), v.split(size, dim=-2), strict=True):
            higher = torch.maximum(most, part.amax(-1, keepdim=True))
            p, shrunk = (part - higher).exp(), (most - higher).exp()
            total = total * shrunk + p.sum(-1, keepdim=True)
            summed, most = summed * shrunk + self.rounded(p) @ values, higher
        return summed / total

    def backward(
        self, grad, q, k, v, output, logsumexp, bounds, bounds_k, longest, longest_k, dropout, causal, state, unused,
        *, scale=None, window_size_left=-1, window_size_right=-1,
    ):
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        for tokens, q_, k_, v_, seen, s in self.pieces(q, k, v, bounds, scale, window_size_left, window_size_right):
            grad_, output_ = (t[tokens].transpose(0, 1).float() for t in (grad, output))
            p = (q_ @ k_.mT * s - logsumexp[:, tokens, None]).exp().masked_fill(~seen, 0)
            d_s = p * (grad_ @ v_.mT - (grad_ * output_).sum(-1, keepdim=True))
            d_s, p = self.rounded(d_s), self.rounded(p)
            for whole, part in zip(gradients, (d_s @ k_ * s, d_s.mT @ q_ * s, p.mT @ grad_), strict=True):
                whole[tokens] = part.unflatten(0, (whole.shape[1], -1)).sum(1).transpose(0, 1).to(whole.dtype)
        return tuple(gradients)

    def register(self) -> Library:
        library = Library("aten", "IMPL", "CPU")
        library.impl("_flash_attention_forward", self.forward, "CPU")
        library.impl("_flash_attention_backward", self.backward, "CPU")
        return library


class Right(Kernel):
    def __init__(self):
        super().__init__(block=64)

    def output(self, q):
        return q.new_empty(q.shape)  # by token, however the queries lie, as FlashAttention 3 and 4 have it


class ForgetsGroups(Right):
    """dk and dv of the first query head of each group alone."""

    def backward(self, grad, q, k, v, *rest, **how):
        d_q, d_k, d_v = super().backward(grad, q, k, v, *rest, **how)
        first = grad.clone().unflatten(1, (k.shape[1], -1))
        first[:, :, 1:] = 0
        _, d_k, d_v = super().backward(first.flatten(1, 2), q, k, v, *rest, **how)
        return d_q, d_k, d_v


class ForgetsOneRow(Right):
    """Of one head's dq, in one document, the last token: 1 row of several hundred."""

    def backward(self, *tensors, **how):
        d_q, d_k, d_v = super().backward(*tensors, **how)
        d_q[-1, 0] = 0
        return d_q, d_k, d_v


class ForgetsTheScale(Right):
    def backward(self, *tensors, **how):
        d_q, *others = super().backward(*tensors, **how)
        return d_q * 1.02, *others


class SeesOneMore(Right):
    """A window that is one token too long, forward and backward."""

    def pieces(self, q, k, v, bounds, scale, left, right):
        return super().pieces(q, k, v, bounds, scale, left + 1 if left >= 0 else left, right)


class SeesOtherDocuments(Right):
    def forward(self, q, k, v, bounds, *rest, **how):
        return super().forward(q, k, v, bounds[[0, -1]], *rest, **how)


class IsNan(Right):
    def backward(self, *tensors, **how):
        d_q, d_k, d_v = super().backward(*tensors, **how)
        return d_q, d_k.fill_(torch.nan), d_v


class Raises(Right):
    def backward(self, *_, **__):
        raise AssertionError("SM100 backward\n does not do this")


class LaidOutByHead(Right):
    def forward(self, *tensors, **how):
        output, *rest = super().forward(*tensors, **how)
        return output.transpose(0, 1).contiguous().transpose(0, 1), *rest


@dataclass
class Handle:
    library: Library | None

    def remove(self) -> None:
        self.library = None
