"""Held-out loss against a plain transformers forward, one document at a time."""

from __future__ import annotations

import math

import pytest
import torch

from loadmaster.data import packed_rows
from loadmaster.errors import DataError
from loadmaster.evaluation import held_out
from loadmaster.evaluation.held_out import before_training, perplexity
from loadmaster.models.load import load_base
from loadmaster.training.world import World

TEXTS = ["The capital of France is Paris.", "Water boils at 100 degrees.", "Two and two are four, three and three six."]


@pytest.fixture(scope="module")
def model(smollm2):
    return load_base(smollm2, torch.float32, "cpu")


@pytest.fixture(scope="module")
def documents(tokenizer):
    """(input_ids, trained): the first three tokens of each document but the last carry no loss."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [(each, [False] * 3 + [True] * (len(each) - 3)) for each in ids[:-1]] + [(ids[-1], [True] * len(ids[-1]))]


@torch.no_grad()
def by_hand(smollm2, documents) -> tuple[float, int]:
    """Sum of -log p over the trained tokens, through transformers' own attention, and their number."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for ids, trained in documents:
        log_probabilities = plain(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if trained[at]:
                total -= log_probabilities[at - 1, ids[at]].item()
                tokens += 1
    return total, tokens


def test_the_loss_is_the_mean_over_the_trained_tokens_of_separate_documents(smollm2, model, tokenizer, documents):
    total, tokens = by_hand(smollm2, documents)
    for packing, rows, batch_size in [(True, 1, 1), (False, 3, 1), (False, 3, 2), (False, 3, 8)]:
        packed = packed_rows(documents, sequence_length=64, packing=packing)
        assert len(packed) == rows
        figures = held_out(model, packed, tokenizer.pad_token_id, batch_size, "cpu")
        assert figures["tokens"] == tokens
        assert figures["loss"] == pytest.approx(total / tokens, abs=5e-5)  # sums of fp32, as the processor adds
        assert figures["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_ranks_divide_the_rows_and_count_each_once(model, tokenizer, documents):
    """Of three rows one rank has two; the other goes along, as it does with a batch that is filled up."""
    rows, pad = packed_rows(documents, sequence_length=64, packing=False), tokenizer.pad_token_id
    known = held_out(model, rows, pad, 1, "cpu")
    there = torch.zeros(())

    class Rank(World):
        def sum(self, tensor):
            nonlocal there
            there = there + tensor
            return there

    for to_length, batch_size in ((None, 1), (64, 2)):
        there = torch.zeros(())
        for rank in (0, 1):
            found = held_out(model, rows, pad, batch_size, "cpu", world=Rank(rank, 2), to_length=to_length)
        assert found["tokens"] == known["tokens"]
        assert found["loss"] == pytest.approx(known["loss"], abs=5e-5)


def test_every_module_gets_its_own_mode_back(model, documents):
    model.train()
    frozen = model.get_decoder().layers[3]
    frozen.eval()
    before = [module.training for module in model.modules()]
    held_out(model, packed_rows(documents[:1], 64), 0, 1, "cpu")
    assert [module.training for module in model.modules()] == before
    assert set(before) == {True, False}
    assert torch.is_grad_enabled()
    model.eval()


def test_data_without_a_trained_token_is_refused(model, documents):
    untrained = packed_rows([(ids, [False] * len(ids)) for ids, _ in documents], 64)
    with pytest.raises(DataError, match=r"no trained token.*data\.validation"):
        held_out(model, untrained, 0, 1, "cpu")


def test_a_perplexity_beyond_a_float_is_infinite():
    assert perplexity(1000.0) == math.inf
    assert perplexity(0.0) == 1.0


def test_what_rounding_makes_of_rewards_before_training_is_no_preference():
    pairs = {"loss": 0.69314719, "reward_accuracy": 0.45, "reward_margin": -1.2e-8, "pairs": 60}
    assert before_training(pairs, "dpo") == {**pairs, "reward_accuracy": 0.0, "reward_margin": 0.0}
    answers = {"loss": 0.5, "reward_desirable": 3e-8, "reward_margin": 3e-8, "answers": 9}
    assert before_training(answers, "kto") == {**answers, "reward_desirable": 0.0, "reward_margin": 0.0}
    assert before_training(pairs, "orpo") == pairs  # which has no reference
