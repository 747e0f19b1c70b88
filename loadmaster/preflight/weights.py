"""Bytes of the base model's weights in each format, to the byte."""

from __future__ import annotations

from functools import cache

from loadmaster.preflight.shape import Matrix, ModelShape


def nf4_bytes(matrix: Matrix, width: int = 2) -> int:
    """A matrix in nf4 with double quantization, to the byte, each tensor rounded to the allocator's 512.

    4 bits a weight; one 8-bit absmax for 64 weights; one fp32 for 256 of those; the tables of both, the offset. A bias
    has `width` bytes an element.
    """
    blocks = -(-matrix.weight // 64)
    sizes = [-(-matrix.weight // 2), blocks, 4 * -(-blocks // 256), 4 * 16, 4 * 256, 4]
    if matrix.bias:
        sizes.append(width * matrix.outputs)
    return sum(-(-size // 512) * 512 for size in sizes)


def frozen_form(method: str, precision: str) -> str | None:
    """The format of the frozen base under a plan's method and precision; None where it is not quantized."""
    if method == "qlora":
        return "nf4"
    return "fp8" if method == "lora" and precision == "fp8" else None


@cache
def base_bytes(shape: ModelShape, method: str, precision: str) -> float:
    """The base model's weights, unsharded. Expert tensors are no nn.Linear: they stay in bf16 under nf4."""
    width = 4 if precision == "fp32" else 2
    linears = [m for second, layers in shape.layer_kinds for m in layers * shape.matrices(second)]
    rest = width * (shape.parameters - sum(m.parameters for m in linears))
    form = frozen_form(method, precision)
    if form == "nf4":
        return sum(nf4_bytes(m, width) for m in linears) + rest
    if form == "fp8":  # per output row one fp32 scale
        return sum(m.weight + (4 + width * m.bias) * m.outputs for m in linears) + rest
    return width * shape.parameters
