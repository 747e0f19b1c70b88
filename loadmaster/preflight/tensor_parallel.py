"""Over how many cards vLLM divides a model."""

from __future__ import annotations

from loadmaster.preflight.shape import ModelShape

INT4_GROUPS = (128, 64, 32)
"""Inputs that share a scale of int4: the sizes that vLLM's kernels know, best compression first."""
FP8_BLOCK = 128
"""Weights of a side of fp8_block's squares."""
NVFP4_GROUP = 16
"""Inputs that share a scale of nvfp4."""


def divides(shape: ModelShape, count: int, block: int = 1) -> bool:
    """Whether vLLM divides the model over so many cards.

    Heads go to one card each, those of keys and values else to equally many cards each, and a block of weights that
    share a scale (`block` along a matrix's inputs) is not cut. (It pads the vocabulary.)
    """
    inner = {view.query_size for view, _ in shape.views}
    inner.add(shape.expert_size if shape.experts else shape.intermediate_size)
    if shape.experts and shape.dense_at:
        inner.add(shape.intermediate_size)
    heads = shape.heads % count == 0 and all(
        view.key_value_heads % count == 0 or count % view.key_value_heads == 0 for view, _ in shape.views
    )
    return count == 1 or (heads and all(size % (count * block) == 0 for size in inner))


def block_of(shape: ModelShape, form: str) -> int:
    """Weights along a matrix's inputs that share a scale where the model is stored so; 1 where a whole row does."""
    if not form.startswith("int4"):
        return {"fp8_block": FP8_BLOCK, "nvfp4": NVFP4_GROUP}.get(form, 1)
    experts = shape.expert_size if shape.experts else shape.hidden_size
    inputs = [experts, *(matrix.inputs for matrix in shape.all_matrices)]
    return next((size for size in INT4_GROUPS if all(each % size == 0 for each in inputs)), INT4_GROUPS[-1])
