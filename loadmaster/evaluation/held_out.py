"""Loss and perplexity on held-out data.

loss = (sum over trained tokens of -log p(token | what precedes it in its document)) / trained tokens, in nats;
perplexity = exp(loss). The mean is over tokens, not over rows or batches, so it does not depend on how the
data was packed or batched.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from loadmaster.data import PackedRows, collate
from loadmaster.errors import DataError
from loadmaster.evaluation.mode import evaluating
from loadmaster.models.forward import token_losses


def held_out(
    model: nn.Module, rows: PackedRows, pad_token_id: int, batch_size: int, device: torch.device | str
) -> dict[str, float | int]:
    """{"loss": nats a trained token, "perplexity": exp of it, "tokens": trained tokens} of `rows`.

    batch_size: packed rows at a time. A perplexity beyond the range of a float is infinite.
    Raises DataError when the rows hold no trained token.
    """
    # Summed on the device: reading each batch's loss back would make the host wait for it.
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            some = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch_loss_sum, batch_tokens = token_losses(model, collate(some, pad_token_id))
            loss_sum += batch_loss_sum
            tokens += batch_tokens
    if tokens == 0:
        raise DataError("the held-out data has no trained token: data.validation needs rows with an assistant's answer")
    loss = loss_sum.item() / tokens
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens}


def perplexity(loss: float) -> float:
    """exp(loss in nats); infinite where that exceeds a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
