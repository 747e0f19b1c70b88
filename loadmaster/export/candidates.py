"""What is built for each format, from what, and which of several is published. Pure decisions; stage.py does the work.

A format is one of: weights that stream through (`STREAMED`: FP8, INT4 by rounding), weights that llm-compressor
calibrates (`CALIBRATED`), a GGUF file, or the adapter. int4 is built twice and the better one taken; int4_gptq and
int4_awq are published whatever they score, with rounding to nearest scored beside them.

A QLoRA adapter can be merged into the weights that it was trained over, dequantize(nf4(W)), or into W. Which is nearer
to the live adapter depends on how large the update is beside the quantization error (unsloth-zoo pull request 810
reports both outcomes), so both are built and scored, and everything else is made from the better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from loadmaster.export.fp8 import Fp8, Fp8Block
from loadmaster.export.int4 import Int4, group_size
from loadmaster.export.linear import QuantizeLinears, Quantizer

CANDIDATES = {
    "bf16": ("bf16",),
    "fp8": ("fp8",),
    "fp8_block": ("fp8_block",),
    "int4": ("int4-gptq", "int4-rtn"),
    "int4_gptq": ("int4-gptq", "int4-rtn"),
    "int4_awq": ("int4-awq", "int4-rtn"),
    "nvfp4": ("nvfp4",),
    "gguf": ("gguf",),
}
"""Built for each format, in the order of preference between equals."""
BASELINES = {"int4_gptq": ("int4-rtn",), "int4_awq": ("int4-rtn",)}
"""Of those, what is scored and never published."""
STREAMED = ("fp8", "fp8_block", "int4-rtn")
CALIBRATED = ("int4-gptq", "int4-awq", "nvfp4")

MERGES = AS_TRAINED, STORED_BASE = "dequant(nf4) + delta", "bf16 base + delta"
"""The two merges of a QLoRA adapter."""


def needed(formats: Iterable[str]) -> list[str]:
    """Every candidate of these formats, once."""
    return list(dict.fromkeys(each for name in formats for each in CANDIDATES.get(name, ())))


def streamed(candidates: Iterable[str], linear: dict[str, tuple[int, int]]) -> dict[str, QuantizeLinears]:
    """How each streamed candidate is written. Raises ExportRejected for a model that one of them cannot hold.

    linear: name -> [outputs, inputs] of the linear layers.
    """
    make: dict[str, Callable[[], Quantizer]] = {
        "fp8": Fp8, "fp8_block": Fp8Block, "int4-rtn": lambda: Int4(group_size(shape[1] for shape in linear.values())),
    }
    return {name: QuantizeLinears(make[name](), linear, name) for name in candidates if name in STREAMED}


def said_of_merges(taken: str, scores: dict[str, dict[str, Any]]) -> str:
    """One line: which merge is taken, and the gap."""
    other = next(name for name in scores if name != taken)
    kl = {name: scores[name]["mean_kl"] for name in scores}
    return (
        f"{taken} is nearer to the live adapter: KL {kl[taken]:.5f} and top-1 {scores[taken]['top1_agreement']:.2%}, "
        f"against {kl[other]:.5f} and {scores[other]['top1_agreement']:.2%} of {other}"
    )


NEITHER_IS_CLOSE = (
    "Neither merge of this QLoRA adapter is close to the model as trained. The adapter over its 4-bit base is that "
    "model: serve adapter/ of the run directory over the base in nf4 (transformers with bitsandbytes, or vLLM with its "
    "plugin vllm-bnb-plugin). If you accept the loss, set export.thresholds.bf16."
)
"""Said where the better of the two merges does not reach the limits of bf16."""
