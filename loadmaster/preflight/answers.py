"""What greedy answers take beside the model (evaluation/generate.py): prompts of a batch at once, then token by token.

    prompts     the cache, what a layer makes of all their tokens, and a mask of pairs, for prompts are padded
    tokens      the cache as long as it gets, and a layer's keys and values repeated for the heads that share them
    choosing    the cache, and scores of the vocabulary, in fp32 twice

All of it is proportional to the number of answers. Held against traces (tests/evaluation/test_answer_memory.py).
"""

from __future__ import annotations

from loadmaster.preflight.calibration import SCORE_BYTES, in_layer
from loadmaster.preflight.shape import ModelShape

SAMPLES, SAMPLE_TOKENS, LONGEST_SAMPLE_PROMPT = 8, 128, 1024
"""Held-out prompts that are answered to be read, before and after training: of each at most so many tokens."""


def answer_bytes(shape: ModelShape, width: int, answers: int, prompt: float, new: int) -> float:
    """Of so many answers at a time, `prompt` and `new` tokens long; width: bytes of a weight."""
    each = 2.0 * width * sum(layers * view.key_value_size for view, layers in shape.views)
    turns = 2 * sum(view.head_dim for view, _ in shape.views)
    beside = width * prompt * (4 * shape.hidden_size + turns) + 3 * 8 * prompt
    masks = len(set(shape.windows) or {None}) * prompt**2
    shape = shape.widest
    if shape.attention_softcap:
        beside += width * masks
        attending = 2 * width * prompt * shape.query_size + SCORE_BYTES * shape.heads * prompt**2
    else:
        beside += masks
        attending = 5 * width * prompt * shape.query_size + 2 * prompt**2  # the mask once more, to be added
    prompts = beside + max(width * prompt * in_layer(shape), attending)
    tokens = (2.0 * width * shape.query_size + 6 * 8) * (prompt + new)
    choosing = (width + 2 * 4.0) * shape.vocabulary_size
    return answers * max(each * prompt + prompts, each * (prompt + new) + max(tokens, choosing))
