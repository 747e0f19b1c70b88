"""Loss and perplexity on held-out data.

loss = (sum over trained tokens of -log p(token | what precedes it in its document)) / trained tokens, in nats;
perplexity = exp(loss). The mean is over tokens, not over rows or batches, so it does not depend on how the
data was packed or batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loadmaster.data import MicroBatch, PackedRows, collate
from loadmaster.errors import DataError
from loadmaster.evaluation.mode import evaluating
from loadmaster.models.forward import count_trained, token_losses
from loadmaster.models.preference import FIGURES, mean_figures, preference_figures
from loadmaster.training.batches import untrained
from loadmaster.training.world import World


def held_out(
    model: nn.Module,
    rows: PackedRows,
    pad_token_id: int,
    batch_size: int,
    device: torch.device | str,
    loss: Callable[[MicroBatch], Tensor] | None = None,
    world: World | None = None,
    stopping: Callable[[], bool] = lambda: False,
    to_length: int | None = None,
) -> dict[str, float | int] | None:
    """{"loss": nats a trained token, "perplexity": exp of it, "tokens": trained tokens} of `rows`.

    Of preference pairs: {"loss": mean of a pair, "reward_accuracy", "reward_margin", "pairs"}; of labelled answers:
    {"loss": mean of an answer, "reward_desirable", "reward_undesirable", "reward_margin", "answers"}.
    batch_size: packed rows at a time. loss: summed loss of a batch, where the model is sharded and must be called
    through its root. world: the ranks among which batches are dealt out, as many to each; all call this together.
    stopping: asked before each batch; None is returned once it says yes. A perplexity beyond a float is infinite.
    to_length: fixed shapes, as a compiled model needs them: `batch_size` rows of so many tokens, whatever is left.
    Raises DataError when the rows hold no trained token.
    """
    world = world or World()
    summed = loss or (lambda batch: token_losses(model, batch)[0])
    # Summed on the device: reading each batch's loss back would make the host wait for it.
    sums = torch.zeros(2 + FIGURES, dtype=torch.float64, device=device)  # loss, trained tokens, figures of preferences
    with evaluating(model):
        for start in range(0, len(rows), batch_size * world.size):
            if stopping():
                return None
            first = start + batch_size * world.rank
            some = [rows[i] for i in range(first, min(first + batch_size, len(rows)))] or [untrained(rows[0])]
            if to_length is not None:
                some += [untrained(rows[0])] * (batch_size - len(some))
            batch = collate(some, pad_token_id, to_length)
            sums[0] += summed(batch)
            sums[1] += count_trained(batch.labels, batch.position_ids)
            if (figures := preference_figures(loss)) is not None:
                sums[2:] += figures
    sums = world.sum(sums)
    loss_sum, tokens, pairs, _, _, desirable, undesirable, *_ = sums.tolist()
    if pairs:
        return {"loss": loss_sum / pairs, **mean_figures(sums[2:]), "pairs": int(pairs)}
    if answers := int(desirable + undesirable):
        return {"loss": loss_sum / answers, **mean_figures(sums[2:]), "answers": answers}
    if tokens == 0:
        raise DataError("the held-out data has no trained token: data.validation needs rows with an assistant's answer")
    mean = loss_sum / tokens
    return {"loss": mean, "perplexity": perplexity(mean), "tokens": int(tokens)}


def before_training(figures: dict[str, float | int], objective: str) -> dict[str, float | int]:
    """Of a policy that is its own reference still: rewards are zero, whatever rounding makes of the difference."""
    if objective not in ("dpo", "kto"):
        return figures
    return {name: 0.0 if name.startswith("reward_") else figure for name, figure in figures.items()}


def perplexity(loss: float) -> float:
    """exp(loss in nats); infinite where that exceeds a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
