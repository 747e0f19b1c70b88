"""What is made from the merged bf16 folder as a whole, in a process of its own: calibrated formats, and GGUF.

    int4-gptq   INT4 weights, roundings chosen to keep each layer's output on calibration data
                (Frantar et al. 2022, arXiv 2210.17323)
    int4-awq    INT4 weights, channels scaled first by what their inputs weigh (Lin et al. 2023, arXiv 2306.00978)
    nvfp4       FP4 weights and activations with an FP8 scale for every 16, and a scale a tensor from calibration data
    gguf        loadmaster.export.gguf

The first three by llm-compressor, layer by layer, in the compressed-tensors format; embeddings, norms and the head
stay bf16. GPTQ with calibration data unlike the task is worse than no calibration (SmolLM2-135M: perplexity 26.9
against 24.1, 2026-11-23), so it calibrates on training conversations, and rounding to nearest is scored beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from loadmaster import collector

if __name__ == "__main__":  # before what takes long to import
    collector.pause()

import torch
from torch import nn

from loadmaster.data import Conversation
from loadmaster.export.int4 import Int4, group_size
from loadmaster.export.process import progress, read_spec, step, write_result
from loadmaster.export.sidecars import token_ids
from loadmaster.models.bf16_products import quicken
from loadmaster.models.capped import own_attention
from loadmaster.models.forward import decoder_layers

FEW_TOKENS, STRONG, USUAL = 7, 1.0, 0.01
"""Of calibration, for each input of the widest layer; and GPTQ's dampening below that and above it, as a share of the
mean of the Hessian's diagonal. 0.01 is llm-compressor's. With two tokens an input it fits the few conversations that
it sees: mean KL on others 0.037, with 1.0 it was 0.008, and 0.018 by rounding to nearest."""
SHRINKAGE = 0.3
"""Of the Hessian's correlations, from FEW_TOKENS on. H is an estimate from N tokens: its diagonal is good where each
correlation off it still carries noise of about 1 / sqrt(N), and the inverse makes most of what is noise. Shrinking
towards the diagonal (Ledoit and Wolf 2004; the target of Schaefer and Strimmer 2005) keeps each input's own scale,
which dampening by one number for all does not: where one input is 49 times the mean, it drowns the small ones.
Figures: benchmarks/results/2026-11-24_exports_good_and_broken.md."""

EVERY_S = 20.0
"""Between two lines of progress."""


def calibration_tokens(
    conversations: Sequence[Conversation], tokenizer: Any, rows: int, sequence_length: int
) -> list[list[int]]:
    """Token ids of `rows` training conversations taken evenly from the whole set, through the chat template."""
    count = min(rows, len(conversations))
    picked = [conversations[index * len(conversations) // count] for index in range(count)]
    return [token_ids(tokenizer, conversation)[:sequence_length] for conversation in picked]


def main(arguments: list[str]) -> None:
    """spec: model (bf16 folder), targets (candidate -> folder), calibration (token ids of each row), gguf, result."""
    told = read_spec(arguments)
    _quiet()
    results = {}
    for candidate, folder in told["targets"].items():
        start = time.perf_counter()
        progress(f"writing {candidate}" if candidate == "gguf" else f"quantizing {candidate}")
        if candidate == "gguf":
            from loadmaster.export.gguf import export_gguf

            facts = export_gguf(Path(told["model"]), Path(folder), **told["gguf"])
        else:
            facts = calibrate(Path(told["model"]), candidate, Path(folder), told["calibration"])
        results[candidate] = {**facts, "seconds": time.perf_counter() - start}
    write_result(told, results)


def calibrate(source: Path, candidate: str, target: Path, calibration: list[list[int]]) -> dict[str, Any]:
    """Quantize the model in `source` into `target`: weights and config.json. Returns facts for the manifest.

    Raises ExportRejected where this machine or this model cannot.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoConfig, AutoModelForCausalLM

    if not torch.accelerator.is_available():
        # AWQ asks for page-locked memory, which speeds the copy to a GPU and cannot be had without one.
        IntermediatesCache.pin_memory = lambda *_: None
    quicken()
    attention = own_attention(AutoConfig.from_pretrained(str(source)))
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16, attn_implementation=attention)
    recipe, facts = _recipe(candidate, quantized_layers(model), sum(map(len, calibration)))
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration])
    with _attention_as_loaded(), _told_of_layers(candidate, decoder_layers(model)):
        oneshot(
            model=model, dataset=rows, num_calibration_samples=len(calibration),
            max_seq_length=max(map(len, calibration)), recipe=recipe,
        )
    model.save_pretrained(str(target))
    # The files beside the weights are the bf16 export's; only the weights and their config come from here.
    for path in target.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
            path.unlink()
    return facts | {"calibration_rows": len(calibration), "calibration_tokens": sum(map(len, calibration))}


@contextmanager
def _attention_as_loaded() -> Iterator[None]:
    """Within the block llm-compressor leaves a model's attention alone. It makes all calibrate with eager attention, 10
    bytes a head for each pair of a row's tokens, for models whose traced code adds a mask to what it has: none that
    transformers has now does, for masks are made outside what is traced, and layers are not looked into."""
    from llmcompressor.utils import helpers

    forced = helpers.use_eager_attention
    helpers.use_eager_attention = lambda model: nullcontext()
    try:
        yield
    finally:
        helpers.use_eager_attention = forced


@contextmanager
def _told_of_layers(candidate: str, layers: list[nn.Module]) -> Iterator[None]:
    """Within the block it is said now and then how many layers llm-compressor, which takes one by one, is through."""
    from llmcompressor.core import LifecycleCallbacks

    ended, done, said = LifecycleCallbacks.sequential_epoch_end, set(), time.monotonic()

    def end(modules: list[nn.Module], **options: Any) -> Any:
        nonlocal said
        state = ended(modules, **options)
        before = len(done)
        done.update(set(layers).intersection(modules))
        if len(done) > before and time.monotonic() - said >= EVERY_S:
            progress(f"quantizing {candidate}: {len(done)} of {len(layers)} layers")
            said = time.monotonic()
        return state

    LifecycleCallbacks.sequential_epoch_end = end
    try:
        yield
    finally:
        LifecycleCallbacks.sequential_epoch_end = ended


def trust(widest: int, tokens: int) -> tuple[float, float]:
    """(dampening, shrinkage) of GPTQ's Hessian. widest: inputs of the widest layer; tokens: of calibration."""
    return (STRONG, 0.0) if tokens < FEW_TOKENS * widest else (USUAL, SHRINKAGE)


def shrink(hessian: torch.Tensor, share: float) -> None:
    """Everything off the diagonal of `hessian` [inputs, inputs] becomes 1 - share of itself, in place."""
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - share).diagonal().copy_(diagonal)


def _recipe(candidate: str, layers: list[nn.Linear], tokens: int) -> tuple[Any, dict[str, Any]]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    ignore = ["lm_head"]
    if candidate == "nvfp4":
        return QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=ignore), {"scheme": "NVFP4"}
    size = group_size(layer.in_features for layer in layers)
    weights, _ = Int4(size).arguments()
    groups = {"group_0": {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}}
    facts = {"scheme": "W4A16", "group_size": size}
    if candidate == "int4-gptq":
        dampening, shrinkage = trust(max(layer.in_features for layer in layers), tokens)

        class ShrunkGPTQModifier(GPTQModifier):
            def compress_modules(self) -> None:
                for hessian in self._hessians.values():
                    shrink(hessian, shrinkage)
                super().compress_modules()

        modifier = ShrunkGPTQModifier(config_groups=groups, ignore=ignore, dampening_frac=dampening)
        return modifier, {**facts, "dampening": dampening, "shrinkage": shrinkage}
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)], facts


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers but the head."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    step(main, sys.argv[1:])
