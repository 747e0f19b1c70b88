"""Modules that are trained whole beside an adapter (lora.modules_to_save): their names, and parameters by name.

peft keeps the frozen module and trains a copy of it, so each of them is there twice. A head that is tied to the
embedding stays so: one copy stands for both, whichever of the two is named.
"""

from __future__ import annotations

from collections.abc import Sequence

from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.preflight.shape import ModelShape

TABLES = ("embed_tokens", "lm_head")
FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Norms of a layer of Gemma 2 and 3, in the order in which it runs them; other families have the first two."""


def layer_norms(shape: ModelShape) -> tuple[str, ...]:
    """Norms of hidden_size in a layer, in order."""
    return FOUR[: shape.norms]


def head_norms(shape: ModelShape) -> tuple[str, ...]:
    return ("q_norm", "k_norm") if shape.query_key_norm else ()


def names(shape: ModelShape) -> tuple[str, ...]:
    """All that may be named."""
    return (*TABLES, "norm", *layer_norms(shape), *head_norms(shape))


def tables(shape: ModelShape, named: Sequence[str]) -> int:
    """How many matrices of vocabulary x hidden are trained."""
    count = len(set(TABLES) & set(named))
    return min(count, 1) if shape.tied else count


def layer_parameters(shape: ModelShape, named: Sequence[str]) -> int:
    """Of one layer."""
    norms = shape.hidden_size * len(set(layer_norms(shape)) & set(named))
    return norms + shape.head_dim * len(set(head_norms(shape)) & set(named))


def parameters(shape: ModelShape, named: Sequence[str]) -> int:
    outside = shape.embedding_parameters * tables(shape, named) + shape.hidden_size * ("norm" in named)
    return outside + shape.layers * layer_parameters(shape, named)


def refuse_unknown(shape: ModelShape, named: Sequence[str]) -> None:
    """Raises ConfigError for a name that this model has no such module for."""
    if unknown := [name for name in named if name not in names(shape)]:
        message = f"{', '.join(unknown)}: no embedding, head or norm of {shape.name} has this name"
        remedy = f"some of {', '.join(names(shape))}; linear layers are adapted by lora.targets"
        raise ConfigError([Problem("lora.modules_to_save", list(named), IN_THE_JOB, message, remedy)])
