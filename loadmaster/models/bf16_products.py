"""Matrix products of bf16 on x86 processors without instructions for it, which most laptops have.

PyTorch's own take 4 times as long there as in float32 (AVX-512 alone) to 14 times (AVX2; one thread, 512 x 576 x 1536,
2026-11-28). These take as long: a block of columns at a time is held in float32, and the result is rounded to bf16
once, as by a GPU's units, which add up in float32 too. One row is left to PyTorch, which is quick at it.
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
        for name, widened in (("mm", _mm), ("addmm", _addmm), ("bmm", _bmm)):
            library.impl(name, _or_own(name, widened), "CPU", with_keyset=True)
    return library


def _or_own(name: str, widened: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product by `widened` of bf16 of more than a row, and any other by PyTorch's kernel."""
    own = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *factors: Tensor, **scales: float) -> Tensor:
        if factors[-2].shape[-2] > 1 and all(each.dtype is torch.bfloat16 for each in factors):
            return widened(*factors, **scales)
        return own.call_boxed(keys, *factors, **scales)

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
