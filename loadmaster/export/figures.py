"""How far one model's predictions and answers are from another's: the figures of verification, pure.

    perplexity ratio   exp(mean over tokens of [log p_trained(y) - log p_export(y)])         y: the true next token
    KL                 sum over v of p_trained(v) (log p_trained(v) - log p_export(v)), nats, for each token
    top-1 agreement    share of tokens whose most likely next token is the same
    fine-tune          mean over tokens of |log p_trained(y) - log p_base(y)|, nats: what training changed
    tuned share        sum of (export - base)(trained - base) over sum of (trained - base)^2, of log p(y)
    flipped answers    share of greedy answers that are not the trained model's, text for text

Equal accuracy can hide changed answers, which KL, agreement and flips show (Dutta et al. 2024, "Accuracy is not all
you need", arXiv 2407.09141). The tuned share is the coefficient of export - base on trained - base: 1 when the
fine-tune is there whole, 0 when the base is. Noise of quantization averages out of it, so it tells an adapter left
out from a coarse format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loadmaster.data import PackedRow, collate
from loadmaster.export.tuned import tuned_share
from loadmaster.models.forward import trained_logits


@dataclass(frozen=True)
class Reference:
    """The trained model on one packed row: log-probabilities [T, V] in fp32 on the host, and the true tokens [T].

    base: log-probabilities [T] of the true tokens under the base model; None where they are not wanted.
    """

    row: PackedRow
    log_probabilities: Tensor
    targets: Tensor
    base: Tensor | None = None


def log_probabilities(model: nn.Module, row: PackedRow, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """([T, V] log-probabilities at the trained positions of a row, [T] the tokens that stand there)."""
    with torch.no_grad():
        logits, targets = trained_logits(model, collate([row], pad_token_id))
        return torch.log_softmax(logits.float(), dim=-1), targets


def true_token_log_probabilities(model: nn.Module, row: PackedRow, pad_token_id: int) -> Tensor:
    """[T], on the host."""
    log_p, targets = log_probabilities(model, row, pad_token_id)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).cpu()


def compare(model: nn.Module, references: Sequence[Reference], pad_token_id: int) -> dict[str, float | int | None]:
    """The figures of `model` against the references; see the top of the module."""
    own, trained_own, divergences, agreements = [], [], [], []
    for reference in references:
        exported, targets = log_probabilities(model, reference.row, pad_token_id)
        trained = reference.log_probabilities.to(exported.device)
        true = targets.to(exported.device).unsqueeze(-1)
        own.append(exported.gather(-1, true).squeeze(-1).cpu())
        trained_own.append(trained.gather(-1, true).squeeze(-1).cpu())
        agreements.append((exported.argmax(-1) == trained.argmax(-1)).float().cpu())
        divergences.append((trained.exp() * (trained - exported)).sum(-1).clamp(min=0).cpu())  # rounding
    exported_own, reference_own = torch.cat(own).double(), torch.cat(trained_own).double()
    loss, trained_loss = -exported_own.mean().item(), -reference_own.mean().item()
    divergence = torch.cat(divergences).double()
    figures: dict[str, float | int | None] = {
        "tokens": len(divergence),
        "perplexity": _exp(loss),
        "trained_perplexity": _exp(trained_loss),
        "perplexity_ratio": _exp(loss - trained_loss),
        "mean_kl": divergence.mean().item(),
        "p99_kl": divergence.quantile(0.99).item(),
        "top1_agreement": torch.cat(agreements).double().mean().item(),
    }
    bases = [reference.base for reference in references if reference.base is not None]
    if len(bases) == len(references):
        figures["fine_tune"], figures["tuned_share"] = tuned_share(
            exported_own.tolist(), reference_own.tolist(), torch.cat(bases).double().tolist()
        )
    return figures


def flipped(answers: Sequence[str], trained_answers: Sequence[str]) -> float:
    """Share of answers that are not the trained model's."""
    return sum(a != b for a, b in zip(answers, trained_answers, strict=True)) / len(answers)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
