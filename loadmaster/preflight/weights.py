"""Bytes of the base model's weights in each format, to the byte."""

from __future__ import annotations

from functools import cache

from loadmaster.preflight.shape import Matrix, ModelShape


def nf4_bytes(matrix: Matrix) -> int:
    """A matrix in nf4 with double quantization, to the byte, each tensor rounded to the allocator's 512.

    4 bits a weight; one 8-bit absmax for 64 weights; one fp32 for 256 of those; the tables of both, the offset.
    """
    blocks = -(-matrix.weight // 64)
    sizes = [-(-matrix.weight // 2), blocks, 4 * -(-blocks // 256), 4 * 16, 4 * 256, 4]
    if matrix.bias:
        sizes.append(2 * matrix.outputs)
    return sum(-(-size // 512) * 512 for size in sizes)


@cache
def base_bytes(shape: ModelShape, method: str, precision: str) -> float:
    """The base model's weights, unsharded. Expert tensors are no nn.Linear: they stay in bf16 under nf4."""
    width = 4 if precision == "fp32" else 2
    rest = shape.parameters - shape.linear_weights - _biases(shape)
    if method == "qlora":
        quantized = shape.dense_layers * sum(map(nf4_bytes, shape.matrices()))
        quantized += shape.expert_layers * sum(map(nf4_bytes, shape.matrices(experts=True)))
        return quantized + width * rest
    if precision == "fp8" and method == "lora":  # per output row one fp32 scale
        rows = shape.layers * sum(m.outputs for m in shape.matrices())
        return shape.linear_weights + 4 * rows + width * (rest + _biases(shape))
    return width * shape.parameters


def _biases(shape: ModelShape) -> int:
    return sum(m.outputs for m in shape.matrices() if m.bias) * shape.layers
