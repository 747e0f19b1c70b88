"""lora.targets against a model's shape, by the names that its modules have in training, which refuses the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loadmaster.config.fields import nearest
from loadmaster.config.synonyms import VALUES
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.preflight.saved import head_norms, layer_norms
from loadmaster.preflight.shape import ModelShape, adapted_layers, full_name

WHOLE = "the embedding, the head and norms are trained whole by lora.modules_to_save"


def linears(shape: ModelShape) -> list[str]:
    """Of a layer, by name, what may have an adapter: beside experts attention's linears alone (models/adapters.py)."""
    if shape.experts:
        return [matrix.name for matrix in shape.matrices(second=True)]
    return list(dict.fromkeys(matrix.name for matrix in shape.all_matrices))


def in_some_layers_only(shape: ModelShape, targets: str | Sequence[str]) -> bool:
    """Whether a linear is adapted in some layers and in others not."""
    return any(0 < adapted_layers(name, targets, shape.layers) < shape.layers for name in linears(shape))


def refuse_unknown(shape: ModelShape, targets: str | Sequence[str], model: str) -> None:
    """Raises ConfigError for what is no linear of a layer, and for an expression that matches other modules besides.

    model: as the user named it. Of a model that is only estimated, whose modules may have other names, for targets of
    which nothing can be counted.
    """
    names = linears(shape)
    if message := _wrong(shape, targets, names, model):
        words = [targets] if isinstance(targets, str) else targets
        ours = VALUES["lora.targets"]
        guesses = (nearest(ours.get(word, word), names) for word in words if word not in names)
        guess = next((f"{guess}; " for guess in guesses if guess), "")
        every = "" if shape.experts else "all-linear, or "
        remedy = f"{guess}{every}some of {', '.join(names)}; {WHOLE}"
        value = targets if isinstance(targets, str) else list(targets)
        raise ConfigError([Problem("lora.targets", value, IN_THE_JOB, message, remedy)])


def _wrong(shape: ModelShape, targets: str | Sequence[str], names: list[str], model: str) -> str | None:
    if not targets:
        return "names no linear layer, so nothing would be trained"
    if targets in ("all-linear", *names):
        return None
    try:
        expression = re.compile(targets if isinstance(targets, str) else "")
    except re.error as error:
        return f"is no name of a linear layer, and no regular expression ({error})"
    if shape.estimate:
        counted = any(adapted_layers(name, targets, shape.layers) for name in names)
        return None if counted else f"names nothing that can be counted; {shape.estimate}"
    if not isinstance(targets, str):
        unknown = [t for t in targets if not any(t in (name, *full_names(name, shape)) for name in names)]
        return f"no linear layer of {model} is named {' or '.join(unknown)}" if unknown else None
    if not any(expression.fullmatch(full) for name in names for full in full_names(name, shape)):
        return f"is no name of a linear layer of {model}, nor an expression that matches one"
    other = [name for name in other_modules(shape) if expression.fullmatch(name)]
    return f"also matches {some_of(other)}, where no adapter is made" if other else None


def full_names(matrix: str, shape: ModelShape) -> Iterator[str]:
    return (full_name(matrix, layer) for layer in range(shape.layers))


def other_modules(shape: ModelShape) -> Iterator[str]:
    """Full names of modules that have no adapter."""
    yield from ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    feed_forward = ["mlp.activation_fn" if shape.fused else "mlp.act_fn"] if shape.dense_layers else []
    feed_forward += ["mlp.gate", "mlp.experts", "mlp.experts.act_fn"] if shape.expert_layers else []
    feed_forward += [f"mlp.{m.name}" for m in shape.mlp_matrices] if shape.experts and shape.dense_layers else []
    attention = [f"self_attn.{name}" for name in head_norms(shape)]
    parts = ("self_attn", *attention, "mlp", *feed_forward, *layer_norms(shape))
    for layer in range(shape.layers):
        yield f"model.layers.{layer}"
        yield from (f"model.layers.{layer}.{part}" for part in parts)


def some_of(names: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
