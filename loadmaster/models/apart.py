"""Whether a model's documents are packed what they are alone, tried on the model itself.

Packed attention keeps documents apart, and is told of a layer's window. What else a family lets tokens see, by a
convolution, a recurrent state or a mask of its own, it is not told, and no error comes of it: such a model would learn
from its neighbours in the row, or from what it is to predict. The families that are modelled exactly are held to
transformers' own logits by tests; any other is tried before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.data import MicroBatch
from loadmaster.data.rows import NO_LOSS
from loadmaster.errors import LoadmasterError
from loadmaster.models.attention import PACKED, AttentionInterface, cached_attention, packed_attention
from loadmaster.models.float8 import products_in_bf16
from loadmaster.models.forward import causal_lm, input_device, trained_hidden
from loadmaster.models.transfer import put

TOKENS = 9
"""Of a document: few, so that a convolution of three reaches a good part of it."""
SEEN = 0.03
"""Most that another document may change of a token's last hidden state, as a share of its norm, in the mean over a
document: the same kernels run on the same shapes, so nothing but an expert chosen otherwise does."""
OTHERWISE = 0.2
"""Most that it may be from what transformers' eager attention makes of the document alone; rounding to bf16 makes less
than 0.02 of it in the 30 layers of SmolLM2 135M, over nf4 and FP8 too."""


FEW = 4
"""Tokens of a window that reaches over less than one of these documents."""


def refuse_mixing(model: nn.Module, sequence_length: int) -> None:
    """Raises LoadmasterError where a packed document depends on others, or is not what transformers makes of it alone:
    of nine tokens, or of so many as are beyond a window that the model's mask alone has.

    Leaves the model in evaluation mode.
    """
    model.eval()
    seen, otherwise = _distances(model)
    if not (seen <= SEEN and otherwise <= OTHERWISE):
        kind = causal_lm(model).config.get_text_config().model_type
        raise LoadmasterError(
            f"models of type {kind!r} cannot be trained here: a document in a packed row changes by {seen:.0%} with "
            f"the one before it, and is {otherwise:.0%} from what it is by itself, so its layers let tokens see others "
            "than packed attention does\n    fix: a model of another family; those in docs/preflight.md are tested"
        )
    window = _window_of_the_mask(model)
    if window is not None and sequence_length > window:
        kind = causal_lm(model).config.get_text_config().model_type
        raise LoadmasterError(
            f"models of type {kind!r} have their window of {window} tokens in their mask alone, which packed attention "
            f"has not: documents of up to sequence_length={sequence_length} tokens would attend further than that\n"
            f"    fix: sequence_length={window}, or less"
        )


@torch.no_grad()
def _window_of_the_mask(model: nn.Module) -> int | None:
    """The configuration's window where the model's mask keeps to it and packed attention is not told of it."""
    lm = causal_lm(model)
    text = lm.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or window < FEW:
        return None
    device = input_device(lm)
    ids = 37 * torch.arange(TOKENS) % text.vocab_size
    batch = MicroBatch(ids[None], ids[None], torch.arange(TOKENS)[None])
    with torch.compiler.set_stance("force_eager"), products_in_bf16(lm):
        with _windows_heard() as heard:
            trained_hidden(model, batch)
        if window in heard:
            return None
        alone = _alone(model, ids, device)
        text.sliding_window = FEW  # which masks are made by in each forward pass
        try:
            masked = _apart(_alone(model, ids, device), alone) > 0
        finally:
            text.sliding_window = window
    return window if masked else None


@contextmanager
def _windows_heard() -> Iterator[list[int | None]]:
    """The windows that packed attention is called with within the block."""
    heard = []

    def listening(*tensors: Any, sliding_window: int | None = None, **more: Any) -> Any:
        heard.append(sliding_window)
        return packed_attention(*tensors, sliding_window=sliding_window, **more)

    AttentionInterface.register(PACKED, listening)
    try:
        yield heard
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def _alone(model: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """Last hidden states [T - 1, h] that transformers' own attention makes of one document, all but the last."""
    with cached_attention(model, "eager"):
        decoder = causal_lm(model).get_decoder()
        return decoder(input_ids=put(ids[None], device), use_cache=False).last_hidden_state[0, :-1]


@torch.no_grad()
def _distances(model: nn.Module) -> tuple[float, float]:
    """How far a document's last hidden states behind one other are from those behind another, and from those alone."""
    lm = causal_lm(model)
    device = input_device(lm)
    one, other, document = (37 * torch.arange(3 * TOKENS) % lm.config.get_text_config().vocab_size).split(TOKENS)
    labels = torch.cat([torch.full_like(one, NO_LOSS), document])[None]
    places = torch.arange(TOKENS).repeat(2)[None]

    def behind(first: Tensor) -> Tensor:
        batch = MicroBatch(torch.cat([first, document])[None], labels, places)
        return trained_hidden(model, batch)[0]

    with torch.compiler.set_stance("force_eager"), products_in_bf16(lm):
        packed = behind(one)
        seen = _apart(packed, behind(other))
        alone = _alone(model, document, device)
    return seen, _apart(packed, alone)


def _apart(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean().item()
