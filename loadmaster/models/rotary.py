"""LongRoPE (Phi 3.5, Phi 4 mini) by document: its factors are short or long by how long a sequence is.

transformers takes one kind for all that a batch holds, by the longest sequence in it, so one long document would turn
all that are packed beside it by the long factors. Here each token is turned by its own document's. Nothing waits for
the device, and no number decides what runs, so a step can be traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.errors import LoadmasterError


def turn_by_document(decoder: nn.Module) -> None:
    """Let a decoder with LongRoPE turn packed documents each by its own length; others stay as they are."""
    rotary = getattr(decoder, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) == "longrope" and getattr(rotary.forward, "__func__", None) is not _forward:
        rotary.forward = MethodType(_forward, rotary)


def refuse_dynamic(decoder: nn.Module, longest: int) -> None:
    """Raise LoadmasterError where a document, or a row's padding, of `longest` tokens would change how documents beside
    it are turned.

    Dynamic NTK scaling takes other frequencies for each length beyond the model's own, and transformers takes those of
    the longest one in a batch for all. So it does with LongRoPE's factors, which are by document here but where layers
    of one kind alone have them.
    """
    for kind, most in _turned_by_length(getattr(decoder, "rotary_emb", None)):
        if longest > most:
            raise LoadmasterError(
                f"a document, or a row's padding, has {longest:,} tokens, and this model's rotary embeddings "
                f"(rope_type={kind}) turn what has more than {most:,} by its length, and all that is packed beside it\n"
                f"    fix: sequence_length={most}"
            )


def _turned_by_length(rotary: Any) -> Iterator[tuple[str, int]]:
    """Kinds of rotation that one length decides for all in a batch, each with the most tokens for which it does not."""
    kinds = getattr(rotary, "rope_type", None)
    if not isinstance(kinds, dict):
        if kinds == "dynamic":
            yield kinds, rotary.original_max_seq_len
        return
    for layers, kind in kinds.items():  # Gemma 3 and OLMo 3 have one for each kind of layers
        if kind == "dynamic":
            yield kind, rotary.original_max_seq_len
        elif kind == "longrope":
            yield kind, rotary.config.rope_parameters[layers]["original_max_position_embeddings"]


@torch.no_grad()
def _forward(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    """cos and sin [1, N, d] of positions [1, N] that begin at 0 in each document; of batches, transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if len(position_ids) > 1:
        return type(rotary).forward(rotary, x, position_ids)
    most = rotary.config.rope_parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, x.device, seq_len=most + 1)
    short = rotary.original_inv_freq.to(x.device)
    turn, found = inspect.unwrap(type(rotary).forward), []  # without what chooses the factors
    for rotary.inv_freq in (long, short):
        found.append(turn(rotary, x, position_ids))
    documents = (position_ids[0] == 0).cumsum(0)
    last = torch.zeros(len(documents) + 1, dtype=torch.long, device=documents.device)
    is_long = last.scatter_reduce(0, documents, position_ids[0], "amax")[documents] >= most
    return tuple(torch.where(is_long[:, None], *both) for both in zip(*found, strict=True))
