"""Experts of a mixture as transformers holds them, a layer's in one tensor, in a checkpoint that stores each by itself.

    mlp.experts.gate_up_proj [E, 2 f, h]   of each expert the rows of its gate, then those of its up projection
    mlp.experts.down_proj    [E, h, f]
    mlp.gate.weight          [E, h]        the router, which has another name in Mixtral's
"""

from __future__ import annotations

import itertools
from collections.abc import Container

LAYOUTS = (("mlp", "gate_proj", "up_proj", "down_proj"), ("block_sparse_moe", "w1", "w3", "w2"))
"""Qwen 3's and Mixtral's names of block, gate, up and down projection."""


def stored_as(name: str, stored: Container[str]) -> str | None:
    """The name in a checkpoint of a tensor that it holds as it is; None where it does not."""
    router = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    return next((each for each in (name, router) if each in stored), None)


def stored_experts(name: str, stored: Container[str]) -> list[list[str]]:
    """Of each expert in order the names of the tensors whose rows make up its part of `name`; else empty."""
    layer, _, part = name.rpartition(".mlp.experts.")
    for block, gate, up, down in LAYOUTS:
        kinds = {"gate_up_proj": (gate, up), "down_proj": (down,)}.get(part, ())
        experts = ([f"{layer}.{block}.experts.{n}.{kind}.weight" for kind in kinds] for n in itertools.count())
        found = list(itertools.takewhile(lambda names: names and all(each in stored for each in names), experts))
        if found:
            return found
    return []
