"""The dropout (and a router's noise) that a model's own config.json asks for, switched off and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from loadmaster.models.forward import causal_lm


def switch_off(model: nn.Module) -> None:
    """Modules' own dropout, and what layers read from the config on each pass, as Persimmon's and Falcon's do.

    The config says 0 from here on, also to who asks which kernel attention runs; `as_loaded` has the file's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _noise(module):
            setattr(module, name, 0.0)
    lm = causal_lm(model)
    if not hasattr(lm, "own_dropout"):
        lm.own_dropout = [(config, _noise(config)) for config in _configs(lm)]
    _set(lm, off=True)


@contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """The config as it was loaded within the block, to be written."""
    _set(causal_lm(model), off=False)
    try:
        yield
    finally:
        _set(causal_lm(model), off=True)


def _set(lm: nn.Module, off: bool) -> None:
    for config, noise in getattr(lm, "own_dropout", []):
        for name, value in noise.items():
            setattr(config, name, 0.0 if off else value)


def _configs(lm: nn.Module) -> list[Any]:
    text = lm.config.get_text_config()
    return [lm.config] if text is lm.config else [lm.config, text]


def _noise(holder: Any) -> dict[str, float]:
    named = vars(holder).items()
    return {name: v for name, v in named if isinstance(v, float) and v and ("drop" in name or "jitter" in name)}
