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
"""Norms of a layer of Gemma 2 and 3, in the order in which it runs them (but the second is after attention); others
have the first two, or where norms come after attention and MLP the second and the last."""


def layer_norms(shape: ModelShape) -> tuple[str, ...]:
    """Norms of hidden_size in a layer, in order."""
    return FOUR[1::2] if shape.norms_after else FOUR[: shape.norms]


def head_norms(shape: ModelShape) -> tuple[str, ...]:
    return ("q_norm", "k_norm") if shape.query_key_norm else ()


def head_norm_sizes(shape: ModelShape) -> list[tuple[str, int]]:
    return list(zip(head_norms(shape), shape.query_key_norm_sizes, strict=True))


def names(shape: ModelShape) -> tuple[str, ...]:
    """All that may be named."""
    return (*TABLES, "norm", *layer_norms(shape), *head_norms(shape))


def tables(shape: ModelShape, named: Sequence[str]) -> int:
    """How many matrices of vocabulary x hidden are trained."""
    count = len(set(TABLES) & set(named))
    return min(count, 1) if shape.tied else count


def layer_parameters(shape: ModelShape, named: Sequence[str]) -> int:
    """Of one layer, in a view of its kind."""
    norms = shape.hidden_size * len(set(layer_norms(shape)) & set(named))
    return norms + sum(size for name, size in head_norm_sizes(shape) if name in named)


def parameters(shape: ModelShape, named: Sequence[str]) -> int:
    outside = shape.embedding_parameters * tables(shape, named) + shape.hidden_size * ("norm" in named)
    return outside + sum(layers * layer_parameters(view, named) for view, layers in shape.views)


def refuse_unknown(shape: ModelShape, named: Sequence[str]) -> None:
    """Raises ConfigError for a name that this model has no such module for."""
    if unknown := [name for name in named if name not in names(shape)]:
        message = f"{', '.join(unknown)}: no embedding, head or norm of {shape.name} has this name"
        remedy = f"some of {', '.join(names(shape))}; linear layers are adapted by lora.targets"
        raise ConfigError([Problem("lora.modules_to_save", list(named), IN_THE_JOB, message, remedy)])
