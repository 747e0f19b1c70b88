"""Quantize a bf16 folder with llm-compressor, in a process of its own.

    fp8    weights FP8 (E4M3), one scale an output channel; activations FP8, one scale a token, found at run time
    int4   weights INT4, one scale a group of 128 inputs (64 or 32 where 128 does not divide); activations bf16

Both in the compressed-tensors format; embeddings, norms and the head stay bf16. int4 is built twice: GPTQ
(Frantar et al. 2022, arXiv 2210.17323), which chooses roundings that keep the layer's output on calibration
data, and plain round-to-nearest. GPTQ with calibration data unlike the task is worse than no calibration
(SmolLM2-135M: perplexity 26.9 against 24.1, 2026-11-23), so it calibrates on training conversations, and
verification takes whichever of the two is closer to the trained model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loadmaster.data import Conversation
from loadmaster.errors import ExportRejected
from loadmaster.export.process import progress, read_spec, step, write_result
from loadmaster.export.sidecars import token_ids

GROUP_SIZES = (128, 64, 32)
"""Sizes that vLLM's INT4 kernels know, best compression first."""

MIN_QUANTIZED_SHARE = 0.9
"""Of the weights besides embeddings and head; below it the architecture keeps weights outside linear layers."""

CANDIDATES = {"fp8": ("fp8",), "int4": ("int4-gptq", "int4-rtn")}
"""Candidates that are built for each format."""


def group_size(input_sizes: Iterable[int]) -> int:
    """The largest group size that divides the number of inputs of every quantized layer.

    Raises ExportRejected where none does.
    """
    sizes = sorted(set(input_sizes))
    for size in GROUP_SIZES:
        if all(inputs % size == 0 for inputs in sizes):
            return size
    odd = [inputs for inputs in sizes if inputs % GROUP_SIZES[-1]]
    raise ExportRejected(
        f"int4 needs layers whose number of inputs is a multiple of {GROUP_SIZES[-1]}; this model has {odd}. "
        "Take export.formats=[bf16, fp8] instead."
    )


def calibration_tokens(
    conversations: Sequence[Conversation], tokenizer: Any, rows: int, sequence_length: int
) -> list[list[int]]:
    """Token ids of `rows` training conversations taken evenly from the whole set, through the chat template."""
    count = min(rows, len(conversations))
    picked = [conversations[index * len(conversations) // count] for index in range(count)]
    return [token_ids(tokenizer, conversation)[:sequence_length] for conversation in picked]


def main(arguments: list[str]) -> None:
    """spec: model (bf16 folder), targets (candidate -> folder), calibration (token ids of each row), result."""
    told = read_spec(arguments)
    _quiet()
    results = {}
    for candidate, folder in told["targets"].items():
        start = time.perf_counter()
        progress(f"quantizing {candidate}")
        results[candidate] = {
            **_quantize(Path(told["model"]), candidate, Path(folder), told["calibration"]),
            "seconds": time.perf_counter() - start,
        }
    write_result(told, results)


def _quantize(source: Path, candidate: str, target: Path, calibration: list[list[int]]) -> dict[str, Any]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16)
    layers = quantized_layers(model)
    ignore = ["lm_head"]
    if candidate == "fp8":
        facts: dict[str, Any] = {"scheme": "FP8_DYNAMIC"}
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore))
    else:
        size = group_size(layer.in_features for layer in layers)
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        facts = {"scheme": "W4A16", "group_size": size}
        if candidate == "int4-rtn":
            oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=ignore))
        else:
            oneshot(
                model=model, dataset=_dataset(calibration), num_calibration_samples=len(calibration),
                max_seq_length=max(map(len, calibration)), recipe=GPTQModifier(config_groups=groups, ignore=ignore),
            )  # fmt: skip
            facts |= {"calibration_rows": len(calibration), "calibration_tokens": sum(map(len, calibration))}
    model.save_pretrained(str(target))
    # The files beside the weights are the bf16 export's; only the weights and their config come from here.
    for path in target.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
            path.unlink()
    return facts


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers but the head; raises ExportRejected where they hold too little of the model."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    outside = {id(module.weight) for module in (head, embedding) if module is not None}
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outside)
    share = sum(layer.weight.numel() for layer in layers) / total
    if share < MIN_QUANTIZED_SHARE:
        raise ExportRejected(
            f"only {share:.0%} of this model's weights are in linear layers, the rest would be left in bf16 without "
            "a word (experts of a mixture, most often). Take export.formats=[bf16] instead."
        )
    return layers


def _dataset(calibration: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration])


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    step(main, sys.argv[1:])
