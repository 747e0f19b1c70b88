"""Matrix products of bf16 on x86 processors without instructions for it, which most laptops have.

PyTorch's own take 4 to 7 times as long there as in float32 (AVX-512 alone), or 9 to 12 times (AVX2; one thread, 128 and
512 rows, 576 and 1536 columns, 2026-11-28). These take hardly longer: a block of columns at a time is held in float32,
and the result is rounded to bf16 once, as by a GPU's units, which add up in float32 too. A few rows are left to
PyTorch, which is quick at them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**20
"""Values of the second factor in float32 at once, 4 MiB: within a processor's cache."""
FEWEST_ROWS = 5
"""Of the first factor: of 4 PyTorch's own take about as long, of 16 three times as long (AVX2, 2026-11-28)."""
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def lacks_bf16() -> bool:
    """Whether this is an x86 processor that has to widen bf16 to multiply it."""
    cpu = torch.cpu.get_capabilities()
    return cpu.get("architecture") == "x86_64" and not any(cpu.get(name) for name in BF16_INSTRUCTIONS)


def quicken() -> None:
    """Let this process multiply bf16 on its processor by float32, where that is quicker."""
    if lacks_bf16():
        _registered()


@cache
def _registered() -> torch.library.Library:
    """It lasts as long as the process: PyTorch forgets what is registered when this is collected."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        for name, widened, rank in (("mm", _mm, 2), ("addmm", _addmm, 2), ("bmm", _bmm, 3)):
            for each in (name, f"{name}.out"):
                library.impl(each, _or_own(each, widened, rank), "CPU", with_keyset=True)
    return library


def _or_own(name: str, widened: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """The product by `widened` of bf16 of more than a few rows, and any other by PyTorch's kernel.

    rank: dimensions of both factors; what has others is PyTorch's to refuse.
    """
    own = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *factors: Tensor, **more: Any) -> Tensor:
        out = more.get("out")
        tensors = factors if out is None else (*factors, out)
        many = all(each.dim() == rank for each in factors[-2:]) and factors[-2].shape[-2] >= FEWEST_ROWS
        if not many or any(each.dtype is not torch.bfloat16 for each in tensors):
            return own.call_boxed(keys, *factors, **more)
        more.pop("out", None)
        made = widened(*factors, **more)
        if out is None:
            return made
        return (out if out.shape == made.shape else out.resize_(made.shape)).copy_(made)

    return product


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """[rows, inner] by [inner, columns]."""
    made, wide = left.new_empty(left.shape[0], right.shape[1]), left.float()
    for columns in _blocks(right):
        made[:, columns] = wide @ right[:, columns].float()
    return made


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta x bias + alpha x [rows, inner] by [inner, columns]; bias: anything that broadcasts to [rows, columns]."""
    made, wide = left.new_empty(left.shape[0], right.shape[1]), left.float()
    bias = bias.expand_as(made)
    for columns in _blocks(right):
        added = bias[:, columns].float()
        made[:, columns] = torch.addmm(added, wide, right[:, columns].float(), beta=beta, alpha=alpha)
    return made


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """[batch, rows, inner] by [batch, inner, columns]."""
    return torch.bmm(left.float(), right.float()).bfloat16()


def _blocks(right: Tensor) -> list[slice]:
    width = max(1, BLOCK // max(1, right.shape[0]))
    return [slice(first, first + width) for first in range(0, right.shape[1], width)]
