"""FlashAttention 3 or 4 in the place of PyTorch's own variable-length kernel, where installed and found right.

PyTorch (>= 2.11) reroutes its flash attention to these packages when told to (`torch.nn.attention.
activate_flash_attention_impl`). Both are young, and their known faults are silent: wrong outputs, and wrong gradients
of right ones. So one is a candidate only for head sizes that no such report is of (of FlashAttention 3: Dao-AILab/
flash-attention #1214; of 4: #2698 there and NVIDIA/TransformerEngine #3216), and before the first step it is held
against PyTorch's kernel on this machine, as this model calls it (`refusal`). Whatever is wrong with it, down to a
package that does not import, PyTorch's kernel stays.

It takes the operators' place for the whole process, generation's included, so it is only there while training runs
(`loadmaster.training.session.attention_kernel`). Compiled code calls these operators by name and needs no other.

Memory of its backward pass, from the sources (hopper/flash_api.cpp, mha_bwd; flash_attn/cute/interface.py): dq in fp32
as in PyTorch's kernel; row sums twice, 4 bytes a token and head more, 1% of dq; dk and dv of grouped heads in fp32 for
each key-value head instead of bf16 for each query head, which is as much where two queries share a key and less where
more do. So the preflight counts one kernel. It leaves out what documents are padded by: dq to 64 or 128 rows each
(PyTorch's: 128) and here grouped dk and dv to 128, 1 MiB a document at 8 key-value heads of 128. FlashAttention 3's
forward pass may split the keys of few heads (heads x longest document below about 13,500, of 64: 20,000, on 132 SMs) in
documents of more than 512 tokens, and then holds an output in fp32 for each split while it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.models import attention
from loadmaster.models.attention import by_bounds
from loadmaster.models.capped import caps_scores, runs_fused
from loadmaster.models.forward import causal_lm, decoder_layers

OWN = "varlen"
"""PyTorch's variable-length kernel, in result.json."""


@dataclass(frozen=True)
class Package:
    impl: str
    """PyTorch's name of it."""
    name: str
    module: str

    def __str__(self) -> str:
        return f"{self.name} ({self.module})"


PACKAGES = {
    9: Package("FA3", "FlashAttention 3", "flash_attn_interface"),
    10: Package("FA4", "FlashAttention 4", "flash_attn.cute"),
}
"""By the card's major compute capability. FlashAttention 4 runs on 9.x too, where 3 is the older and better tried."""
HEAD_DIMS = {64, 128}
API = ("activate_flash_attention_impl", "restore_flash_attention_impl", "list_flash_attention_impls")

LENGTHS = (1, 5, 130, 600), (1500,)
"""Tokens of the documents of two micro-batches: one token, a few, more than a block of 128; and longest documents for
which FlashAttention 3 splits the keys of a model with few heads and does not."""
ROW_LIMIT = 0.2
"""How far one token's numbers of one head may be from PyTorch's, as a share of their norm.

Both kernels round probabilities and their gradients to bf16 (2^-9 each) and sum in orders of their own. Emulated so on
these inputs (up to 32 heads), with blocks of 64 and of 128 keys, the furthest row is 0.03 apart, and 0.09 from exact
attention. A row that a kernel forgets or takes from elsewhere is about 1 apart.
"""
WHOLE_LIMIT = 0.01
"""The same of a whole tensor: emulated 0.002, and 0.004 from exact. A scale that is off by 2% or a window by one token
is not let through."""
SMALL = 0.25
"""Of the typical row's norm: what smaller rows are held against instead of their own. A document's first query has a
gradient of exactly zero, and rounding."""


@dataclass(frozen=True)
class Call:
    """How a layer calls attention; window in tokens."""

    heads: int
    key_value_heads: int
    head_dim: int
    scale: float | None
    window: int | None


def attention_calls(model: nn.Module) -> list[Call]:
    """The different ways in which the model's layers call attention."""
    config = causal_lm(model).config.get_text_config()
    heads = config.num_attention_heads
    found = []
    for layer in decoder_layers(model):
        module = getattr(layer, "self_attn", None)
        own = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)  # a config may have several
        head_dim = own or getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(module, "num_key_value_groups", None)
        windows = module if hasattr(module, "sliding_window") else config
        found.append(
            Call(
                heads, heads // groups if groups else getattr(config, "num_key_value_heads", None) or heads, head_dim,
                getattr(module, "scaling", None), getattr(windows, "sliding_window", None) or None,
            )
        )
    return list(dict.fromkeys(found))


def own_kernel(config: Any, device: torch.device) -> str:
    """What packed attention runs without our doing: varlen, flex_attention, or by_document (a CPU, dropout)."""
    if runs_fused(config, device):
        return "flex_attention"
    if device.type != "cuda" or _dropout(config):
        return "by_document"
    return _active() or OWN


def _active() -> str | None:
    """What somebody else has activated in this process."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


def _dropout(config: Any) -> float:
    return getattr(config.get_text_config(), "attention_dropout", None) or 0.0


def candidate(
    device: str,
    major: int | None,
    dtype: torch.dtype,
    head_dims: Collection[int],
    capped: bool,
    dropout: float,
    known: Collection[str],
) -> Package | None:
    """The package that may run, if it is installed. known: what this PyTorch can activate; major: of the capability."""
    package = PACKAGES.get(major) if device == "cuda" and major is not None else None
    if package is None or package.impl not in known or dtype != torch.bfloat16 or capped or dropout:
        return None
    return package if set(head_dims) <= HEAD_DIMS else None


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it or what it is part of."""
    whole, _, part = module.partition(".")
    try:
        spec = find_spec(whole)
        places = spec and spec.submodule_search_locations
        return spec is not None and (not part or bool(places and PathFinder.find_spec(module, list(places))))
    except Exception:  # a broken installation is none
        return False


def activatable() -> list[str]:
    """What this PyTorch can activate. Nothing where something is active already: that is somebody's choice."""
    if not all(hasattr(torch.nn.attention, name) for name in API) or _active() is not None:
        return []
    return torch.nn.attention.list_flash_attention_impls()


def found_for(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Package | None:
    """The installed package that may run this model's attention."""
    config = causal_lm(model).config
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else None
    if major not in PACKAGES:
        return None
    package = candidate(
        device.type, major, dtype, {call.head_dim for call in attention_calls(model)}, bool(caps_scores(config)),
        _dropout(config), activatable(),
    )
    return package if package is not None and installed(package.module) else None


# ---------------------------------------------------------------- held against PyTorch's own


def documents(window: int | None, longest: int) -> list[tuple[int, ...]]:
    """Tokens of the documents of each micro-batch that is compared; one is longer than the window.

    longest: the longest document that there can be; no window as long as it is ever reached.
    """
    beyond = window is not None and max(map(max, LENGTHS)) <= window < longest
    return [*LENGTHS, (1, 5, window + 130)] if beyond else list(LENGTHS)


def results(call: Call, lengths: Iterable[int], device: torch.device) -> dict[str, Tensor]:
    """Output and gradients of q, k and v, each [1, N, heads, D] in bf16, for a micro-batch of such documents.

    Queries of the later heads are longer and keys lie around a point of their own, as trained models have them: softmax
    is flat in some heads and sharp in others. The numbers are the same each time and leave no generator changed.
    """
    sizes, generator = torch.tensor([0, *lengths]), torch.Generator(device).manual_seed(0)
    bounds, longest = sizes.cumsum(0).to(device, torch.int32), torch.empty(int(sizes.max()), 0, device=device)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, call.head_dim, device=device, generator=generator)

    total = int(sizes.sum())
    sharpness = torch.logspace(-1, 1, call.heads, 2.0, device=device)[:, None]
    numbers = [
        normal(total, call.heads) * sharpness,
        normal(total, call.key_value_heads) + normal(1, call.key_value_heads),
        normal(total, call.key_value_heads),
    ]
    leaves = [t.to(torch.bfloat16).requires_grad_() for t in numbers]
    d_output = normal(total, call.heads).to(torch.bfloat16)
    with torch.enable_grad():
        output = by_bounds(*(t.transpose(1, 2) for t in leaves), bounds, longest, call.scale, call.window)
    gradients = torch.autograd.grad(output, leaves, d_output)
    return dict(zip(("output", "dq", "dk", "dv"), (output.detach(), *gradients), strict=True))


def apart(given: Tensor, own: Tensor) -> tuple[float, float]:
    """(of the furthest row, of the whole): the norm of the difference over that of `own`; [..., D], a row is of D."""
    difference, norms = (given.float() - own.float()).norm(dim=-1), own.float().norm(dim=-1)
    typical = norms.square().mean().sqrt()
    rows = difference / norms.clamp(min=SMALL * typical)
    return rows.max().item(), (difference.norm() / norms.norm()).item()


def disagreement(given: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """What is wrong with a kernel's results, held against those of PyTorch's own."""
    for name, mine in given.items():
        if not bool(torch.isfinite(mine).all()):
            return f"its {name} is not finite"
        if mine.shape != own[name].shape or mine.stride() != own[name].stride():
            return f"its {name} is laid out in another way"
        row, whole = apart(mine, own[name])
        if row > ROW_LIMIT or whole > WHOLE_LIMIT:
            return (
                f"its {name} is not that of PyTorch's kernel: {whole:.2%} apart (limit {WHOLE_LIMIT:.0%}), one row "
                f"{row:.1%} (limit {ROW_LIMIT:.0%})"
            )
    return None


def refusal(impl: str, calls: Iterable[Call], device: torch.device, longest: int) -> str | None:
    """Activate `impl` and hold it against PyTorch's kernel; why it was taken back, or None: it is active now.

    longest: tokens of the longest document that there can be. Raises nothing.
    """
    cases = [(call, lengths) for call in calls for lengths in documents(call.window, longest)]
    active = False
    try:
        own = [results(*case, device) for case in cases]
        with warnings.catch_warnings():  # that a kernel takes another's place
            warnings.simplefilter("ignore")
            torch.nn.attention.activate_flash_attention_impl(impl)
        active = attention.REROUTED = True
        given = [results(*case, device) for case in cases]
        why = next(filter(None, map(disagreement, given, own)), None)
        if why is None and all(torch.equal(a["output"], b["output"]) for a, b in zip(given, own, strict=True)):
            why = "this PyTorch runs its own kernel in spite of it, bit for bit"
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        why = f"it failed with {type(error).__name__}: {reason}"
    if why is not None and active:
        restore()
    return why


def restore() -> None:
    """PyTorch's own kernel again."""
    attention.REROUTED = False
    torch.nn.attention.restore_flash_attention_impl()


def agreed(tried: list[tuple[Package | None, str | None]]) -> tuple[Package | None, str | None]:
    """(what all ranks run, the sentence about it), of what each rank has found and why it refuses it."""
    found = [package for package, _ in tried if package is not None]
    if not found:
        return None, None
    reasons = [_reason(rank, *each, len(tried)) for rank, each in enumerate(tried)]
    if why := next(filter(None, reasons), None):
        return None, f"{found[0]} was found and is not used: {why}; attention runs PyTorch's own kernel"
    return found[0], f"attention runs {found[0]}, whose outputs and gradients were held against PyTorch's own kernel"


def _reason(rank: int, package: Package | None, why: str | None, ranks: int) -> str | None:
    where = f"rank {rank}: " if ranks > 1 else ""
    return f"{where}it is not there" if package is None else why and where + why


def tried(
    model: nn.Module, dtype: torch.dtype, device: torch.device, longest: int
) -> tuple[Package | None, str | None]:
    """(the package that was found, why it is not active now); raises nothing."""
    try:
        package = found_for(model, dtype, device)
        if package is None:
            return None, None
        return package, refusal(package.impl, attention_calls(model), device, longest)
    except Exception:  # a model of another make
        return None, None
    finally:
        if device.type == "cuda":
            with suppress(Exception):  # of a kernel that broke the card's context, what comes next will tell
                torch.cuda.empty_cache()
