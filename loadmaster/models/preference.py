"""Preference losses over packed rows: DPO, ORPO and KTO over pairs that lie side by side, KTO over labelled answers.

Notation, for a prompt x with chosen answer c and rejected answer r: log p(c) is the sum over the answer's tokens
of log p(token | x and the tokens before it).

    DPO   -log sigmoid(beta * ([log p(c) - log q(c)] - [log p(r) - log q(r)])), q the reference: the base under a
          disabled adapter, so it costs a second forward pass and no memory of its own (Rafailov et al. 2023, eq. 7);
          where all weights are trained, what was asked before the first step (training/reference.py), of KTO too
          label_smoothing e mixes in the other direction's loss: (1 - e) * loss + e * loss with c and r exchanged
    ORPO  nll(c) - beta * log sigmoid(log odds(c) - log odds(r)), with nll and odds from the mean log-probability of an
          answer's tokens; needs no reference (Hong et al. 2024, eq. 6 and 7)
    KTO   an answer by itself: w (1 - sigmoid(beta * (r - z))) of a chosen one, w' (1 - sigmoid(beta * (z - r))) of a
          rejected one, r = log p(answer) - log q(answer), w and w' its weights; z is what the policy has moved from the
          reference altogether: the mean of r, at least 0, over prompts with another's answer, without gradient
          (Ethayarajh et al. 2024, eq. 7). A pair's loss is the mean of its two. Of unpaired data each answer stands
          alone, chosen where its label says desirable. Two more passes, of no memory either; one where all weights are
          trained, whose reference was asked before of each packed row: there the other answer is of the same row

The loss of a step is the mean over its pairs (or labelled answers), whatever micro-batches and ranks they are split
into; KTO's z alone is taken from one micro-batch, and is 0 where nothing in that has another's answer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loadmaster.config.schema import PreferenceConfig
from loadmaster.data import MicroBatch
from loadmaster.data.rows import NO_LOSS
from loadmaster.models import dropout
from loadmaster.models.adapters import without_adapter
from loadmaster.models.forward import SummedLoss, causal_lm, document_bounds, logit_transform, trained_hidden
from loadmaster.models.loss import CHUNK_TOKENS, logits_and_tanh, through_head
from loadmaster.models.transfer import put

NEED_REFERENCE = ("dpo", "kto")
"""Objectives that compare with the model before training."""


class _TokenLogProbs(torch.autograd.Function):
    """log p of each target [T], in chunks; the backward pass makes each chunk's logits again.

    Unlike the summed loss, the gradient of a token here waits for its whole pair, so it cannot be taken in the
    forward pass; what is kept are the hidden states, never T x V logits.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        softcap: float | None,
        scale: float,
    ):
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T)
        ctx.transform = softcap, scale
        chunks = [slice(i, i + CHUNK_TOKENS) for i in range(0, len(targets_T), CHUNK_TOKENS)]
        found = []
        for chunk in chunks:
            logits = logits_and_tanh(hidden_TH[chunk], weight_VH, bias_V, softcap, scale)[0]
            found.append(-F.cross_entropy(logits, targets_T[chunk], reduction="none"))
            del logits
        return torch.cat(found) if found else hidden_TH.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        hidden_TH, weight_VH, bias_V, targets_T = ctx.saved_tensors
        softcap, scale = ctx.transform
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets_T), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits, capped = logits_and_tanh(hidden_TH[part], weight_VH, bias_V, softcap, scale)
            # d log p(t) / d logits = onehot(t) - softmax(logits), in the logits' own memory
            grad = logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True)).exp_().neg_()
            grad.scatter_add_(-1, targets_T[part, None], grad.new_ones((len(grad), 1)))
            grad *= grad_T[part, None]
            if softcap is not None:
                grad *= capped.square_().neg_().add_(1)
            del capped
            if scale != 1.0:
                grad *= scale
            grad = grad.to(weight_VH.dtype)
            if needs_hidden:
                grad_hidden[part] = grad @ weight_VH
            if needs_weight:
                grad_weight += grad.T @ hidden_TH[part]
            del logits, grad  # before the next chunk's are made
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None, None, None


def token_log_probs(
    hidden_TH: Tensor, head: nn.Linear, targets_T: Tensor, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """log p of each target [T], fp32; see `summed_cross_entropy` for the arguments."""
    return _TokenLogProbs.apply(hidden_TH, head.weight, head.bias, targets_T, softcap, scale)


@dataclass(frozen=True)
class AnswerLogProbs:
    """Of the A answers of a batch, in order: sums of their tokens' log-probabilities [A], how many tokens [A], and (on
    the host) their places among all documents of the batch [A]."""

    sums: Tensor
    tokens: Tensor
    documents: Tensor


def answer_log_probs(model: nn.Module, batch: Any) -> AnswerLogProbs:
    """log p of every document of the batch that has trained tokens: of pairs, chosen and rejected in turn."""
    hidden, targets, documents = trained_hidden(model, batch)
    lm = causal_lm(model)
    log_probs = through_head(
        lm.get_output_embeddings(), token_log_probs, hidden, targets, *logit_transform(lm.config)
    )
    # Padding and untrained copies of rows are documents without a trained token: they have no place in the count.
    answered, place, tokens = torch.unique_consecutive(documents, return_inverse=True, return_counts=True)
    place, tokens = put(place, log_probs.device), put(tokens, log_probs.device)
    sums = log_probs.new_zeros(len(tokens)).index_add(0, place, log_probs)
    return AnswerLogProbs(sums, tokens, answered)


def dpo_loss(policy_A: Tensor, reference_A: Tensor, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss [P], reward margin [P]) of P pairs from the summed log-probabilities of their 2 P answers."""
    rewards = beta * (policy_A - reference_A)
    margin = rewards[0::2] - rewards[1::2]
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, margin.detach()


def orpo_loss(mean_A: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(loss [P], log odds ratio [P]) of P pairs from the mean log-probabilities of their 2 P answers."""
    log_odds = mean_A - torch.log(-torch.expm1(mean_A).clamp(max=-1e-7))  # exact where p is nearly 1, too
    margin = log_odds[0::2] - log_odds[1::2]
    return -mean_A[0::2] - beta * F.logsigmoid(margin), margin.detach()


def kto_loss(
    policy_A: Tensor, reference_A: Tensor, moved: Tensor, beta: float, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """(loss [P], reward margin [P]) of P pairs from the summed log-probabilities of their 2 P answers, and z."""
    ratios = policy_A - reference_A
    chosen, rejected = kto_losses(ratios[0::2], ratios[1::2], moved, beta, weights)
    return (chosen + rejected) / 2, beta * (ratios[0::2] - ratios[1::2]).detach()


def kto_losses(
    desirable_D: Tensor, undesirable_U: Tensor, moved: Tensor, beta: float, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Losses [D] and [U] of desirable and undesirable answers from their log-ratios to the reference, and z."""
    return (
        weights[0] * (1 - torch.sigmoid(beta * (desirable_D - moved))),
        weights[1] * (1 - torch.sigmoid(beta * (moved - undesirable_U))),
    )


ROTATION = 2
"""Every prompt gets the answer so many places before its own: that of another pair's same side."""
ROTATION_UNPAIRED = 1


def _rotation(batch: MicroBatch) -> int:
    return ROTATION if batch.desirable is None else ROTATION_UNPAIRED


def mismatched(batch: MicroBatch, rotation: int, by_row: bool = False) -> tuple[MicroBatch, Tensor]:
    """The batch's prompts under each other's answers, as one row of the same number of tokens, and the places of those
    prompts whose answer is not their own. by_row: answers come from a prompt's own row, whatever lies beside it."""
    ids, labels, positions = (t.reshape(-1) for t in (batch.input_ids, batch.labels, batch.position_ids))
    bounds = document_bounds(batch.position_ids)
    prompts, answers, rest, rows, answered = [], [], [], [], []
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        trained = torch.nonzero(labels[start:end] != NO_LOSS)
        if len(trained):
            first = start + int(trained[0])
            prompts.append((ids[start:first], labels[start:first]))
            answers.append((ids[first:end], labels[first:end]))
            rows.append(start // batch.input_ids.shape[1] if by_row else 0)
            answered.append(document)
        else:
            rest.append((ids[start:end], labels[start:end]))
    of: list[int] = []  # whose answer each prompt gets
    for _, places in itertools.groupby(range(len(rows)), rows.__getitem__):
        group = list(places)
        of += group[-rotation:] + group[:-rotation] if len(group) > rotation else group
    documents = [
        tuple(torch.cat(parts) for parts in zip(prompt, answers[other], strict=True))
        for prompt, other in zip(prompts, of, strict=True)
    ] + rest
    found = MicroBatch(
        torch.cat([tokens for tokens, _ in documents])[None],
        torch.cat([trained for _, trained in documents])[None],
        torch.cat([torch.arange(len(tokens)) for tokens, _ in documents]).to(positions.dtype)[None],
        reference=None if batch.reference is None else batch.reference[answered, 1],
    )
    return found, torch.tensor([place for place, other in enumerate(of) if place != other], dtype=torch.long)


def loss_module(model: nn.Module, objective: str, preference: PreferenceConfig) -> nn.Module:
    """The module whose forward is the sum of a batch's losses: of its trained tokens (sft), pairs or answers."""
    if objective == "sft":
        return SummedLoss(model)
    return PreferenceLoss(model, objective, preference)


FIGURES = 7
"""Sums over a batch: pairs, correct (the chosen answer preferred), margin; and of labelled answers, whose rewards have
no partner: desirable, undesirable, reward of the desirable, reward of the undesirable."""


def preference_figures(loss: Any) -> Tensor | None:
    """The FIGURES of the last batch, where `loss` (or what it wraps) is a PreferenceLoss."""
    while not isinstance(loss, PreferenceLoss) and hasattr(loss, "module"):
        loss = loss.module
    return loss.figures if isinstance(loss, PreferenceLoss) else None


def mean_figures(sums: Tensor) -> dict[str, float]:
    """Of summed FIGURES: the share of pairs in which the chosen answer is preferred, and the mean margin.

    Of labelled answers the mean rewards of those that there are, and if there are both, the margin between them.
    """
    pairs, correct, margin, desirable, undesirable, *rewards = sums.tolist()
    if not desirable + undesirable:
        return {"reward_accuracy": correct / max(pairs, 1), "reward_margin": margin / max(pairs, 1)}
    counted = zip(("desirable", "undesirable"), rewards, (desirable, undesirable), strict=True)
    found = {f"reward_{name}": reward / count for name, reward, count in counted if count}
    if len(found) == 2:
        found["reward_margin"] = found["reward_desirable"] - found["reward_undesirable"]
    return found


class PreferenceLoss(nn.Module):
    """A model whose forward is the sum of its batch's preference losses: what takes SummedLoss's place in the loop.

    After each forward `figures` holds the batch's FIGURES.
    """

    def __init__(self, model: nn.Module, objective: str, preference: PreferenceConfig):
        super().__init__()
        self.module = model
        # Two answers under two masks would differ by the masks. Not by eval(), in which layers are not checkpointed.
        dropout.switch_off(model)
        self.objective, self.beta, self.label_smoothing = objective, preference.beta, preference.label_smoothing
        self.weights = preference.desirable_weight, preference.undesirable_weight
        self.figures = torch.zeros(FIGURES)

    def forward(self, batch: Any, answers_only: bool = False) -> Tensor:
        """answers_only: the answers' summed log-probabilities [A] instead, compared with nothing; of KTO [A, 2], those
        of the same prompts under others' answers beside them."""
        if answers_only:
            sums = answer_log_probs(self.module, batch).sums
            if self.objective != "kto":
                return sums
            other, _ = mismatched(batch, _rotation(batch), by_row=True)
            return torch.stack([sums, answer_log_probs(self.module, other).sums], dim=1)
        ask = self.objective in NEED_REFERENCE and batch.reference is None
        reference = self._reference(batch) if ask else None
        moved = self._moved(batch) if self.objective == "kto" else None
        policy = answer_log_probs(self.module, batch)
        if batch.reference is not None:
            known = batch.reference if moved is None else batch.reference[:, 0]
            reference = put(known[policy.documents], policy.sums.device)
        if batch.desirable is not None:
            return self._unpaired(batch.desirable[policy.documents], policy.sums - reference, moved)
        if moved is not None:
            loss, margin = kto_loss(policy.sums, reference, moved, self.beta, self.weights)
        elif reference is not None:
            loss, margin = dpo_loss(policy.sums, reference, self.beta, self.label_smoothing)
        else:
            loss, margin = orpo_loss(policy.sums / policy.tokens, self.beta)
        pairs = torch.stack([margin.new_full((), len(margin)), (margin > 0).sum().to(margin), margin.sum()])
        self.figures = F.pad(pairs, (0, FIGURES - len(pairs)))
        return loss.sum()

    def _unpaired(self, desirable_A: Tensor, ratios_A: Tensor, moved: Tensor) -> Tensor:
        """KTO's loss of answers with labels [A] on the host."""
        places = (torch.nonzero(side).squeeze(-1) for side in (desirable_A, ~desirable_A))
        sides = [ratios_A[put(place, ratios_A.device)] for place in places]
        rewards = [self.beta * side.detach().sum() for side in sides]
        counts = [ratios_A.new_full((), len(side)) for side in sides]
        self.figures = F.pad(torch.stack([*counts, *rewards]), (FIGURES - 4, 0))
        return torch.cat(kto_losses(*sides, moved, self.beta, self.weights)).sum()

    def _moved(self, batch: Any) -> Tensor:
        """KTO's z. The passes are made in any case: ranks that share weights gather them together."""
        known = batch.reference is not None
        other, apart = mismatched(batch, _rotation(batch), by_row=known)
        with torch.no_grad():
            policy = answer_log_probs(self.module, other).sums
            ratios = policy - (put(other.reference, policy.device) if known else self._reference(other))
        if not len(apart):
            return ratios.new_zeros(())
        return ratios[put(apart, ratios.device)].mean().clamp(min=0)

    def _reference(self, batch: Any) -> Tensor:
        """The base's log-probabilities of the answers [A]: the same model with its adapter switched off."""
        with torch.no_grad(), without_adapter(self.module):
            return answer_log_probs(self.module, batch).sums
