"""Which tensors of a checkpoint are quantized, and quantizing them in a stream; no model class is built.

The weights of linear layers, but not the head's, are the matrices named `*.weight` that are no embedding. What llm-
compressor finds by the class nn.Linear is the same set for the families that can be trained here (a test).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loadmaster.errors import ExportRejected
from loadmaster.export.weights import WHOLE, Shapes, shards, tensor_shapes
from loadmaster.files import read_json
from loadmaster.preflight.exports import MIN_QUANTIZED_SHARE

ARGUMENTS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "observer_kwargs": {},
    "scale_dtype": None, "symmetric": True, "zp_dtype": None,
}
"""Of compressed-tensors 0.19's QuantizationArgs, as llm-compressor 0.14 writes what is not given."""


class Quantizer(Protocol):
    """One way of storing the matrix of a linear layer."""

    name: str
    """compressed-tensors' name of the layout."""

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Why a matrix of this shape cannot be stored so."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Last part of the name -> dtype and shape of the tensors in its place."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The same tensors."""

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """QuantizationArgs of weights and of input activations, where they are not ARGUMENTS."""


def linear_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> [outputs, inputs] of the weight of each linear layer but the head.

    Raises ExportRejected where they hold too little of the model, as in a mixture of experts.
    """
    shapes = {name: shape for shard in shards(folder) for name, (_, shape) in tensor_shapes(shard).items()}
    outside = {name for name in shapes if name.endswith(WHOLE)}
    # The experts' router is a matrix too, and stored beside experts that servers fuse: none of them is touched.
    mixture = {name for name in shapes if ".experts." in name or ".block_sparse_moe." in name or ".router." in name}
    linear = {
        name: shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name not in outside | mixture
    }
    total = sum(math.prod(shape) for name, shape in shapes.items() if name not in outside)
    share = sum(map(math.prod, linear.values())) / max(1, total)
    if share < MIN_QUANTIZED_SHARE:
        raise ExportRejected(
            f"only {share:.0%} of this model's weights are in linear layers, the rest would be left in bf16 without "
            "a word (experts of a mixture, most often). Take export.formats=[bf16] instead."
        )
    if read_json(folder / "config.json").get("model_type") == "gpt2":
        raise ExportRejected(
            "this model keeps its weights transposed (GPT-2's Conv1D), which servers' quantized layers do not read. "
            "Take export.formats=[bf16] instead."
        )
    return linear  # type: ignore[return-value]


class QuantizeLinears:
    """For `stream.rewrite`: the linear layers of `names` through the quantizer, all else as it is."""

    def __init__(self, quantizer: Quantizer, names: dict[str, tuple[int, int]], format_name: str):
        self.quantizer, self.names = quantizer, names
        problems = [
            f"{name} {list(shape)}: {why}" for name, shape in names.items() if (why := quantizer.problem(shape))
        ]
        if problems:
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise ExportRejected(
                f"{format_name} cannot hold this model: {problems[0]}{more}. Take export.formats=[fp8] instead."
            )

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        weights, _ = self.quantizer.arguments()
        return {"scheme": self.quantizer.name, **weights, "data": "none: rounded to nearest"}

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Shapes:
        if name not in self.names:
            return {name: (dtype, shape)}
        module = name.removesuffix("weight")
        return {module + last: spec for last, spec in self.quantizer.layout(shape).items()}

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if name not in self.names:
            yield name, tensor
            return
        module = name.removesuffix("weight")
        for last, made in self.quantizer.quantize(tensor.to(torch.bfloat16)).items():
            yield module + last, made


def quantization_config(quantizer: Quantizer) -> dict[str, Any]:
    """config.json's `quantization_config`, the same that llm-compressor 0.14 writes with compressed-tensors 0.19."""
    weights, activations = quantizer.arguments()
    group = {
        "format": quantizer.name,
        "input_activations": None if activations is None else {**ARGUMENTS, "observer": None, **activations},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {**ARGUMENTS, "observer": "memoryless_minmax", **weights},
    }
    # Through JSON, so that no two configs share the empty dicts above.
    return json.loads(json.dumps({
        "config_groups": {"group_0": group}, "format": quantizer.name, "global_compression_ratio": None,
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {},
        "version": version("compressed-tensors"),
    }))
