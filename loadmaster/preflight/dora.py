"""DoRA's part of a layer (models/dora.py) on a replay tape: the norms of its rows, and what they scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadmaster.preflight.frozen import WIDE
from loadmaster.preflight.graph import Storage, Tensor
from loadmaster.preflight.shape import Matrix

if TYPE_CHECKING:
    from loadmaster.preflight.blocks import Blocks
    from loadmaster.preflight.setup import Setup
    from loadmaster.preflight.shape import ModelShape

FP32 = 4


def scale(b: Blocks, m: Matrix, magnitudes: Tensor) -> Tensor:
    """m / |V|, in the dtype of what it scales."""
    found = divided(b, magnitudes, norms(b, m))
    return b.elementwise(found, b.w * m.outputs) if b.w != FP32 else found


def norms(b: Blocks, m: Matrix) -> Storage:
    """|W + s B A| in fp32, without gradients; its products are small, and W is read twice."""
    tape, w, rank, outputs, kept = b.tape, b.w, b.setup.lora_rank, m.outputs, m.inputs >= WIDE
    with tape.gradients(False):
        tape.moved(w * m.weight, fused=False)
        squares = tape.alloc(FP32 * outputs)
        wide = [tape.alloc(FP32 * rank * size) for size in ((m.inputs, outputs) if w != FP32 else ())]
        if tape.runs(kept):
            tape.moved(w * m.weight, w * rank * (m.inputs + outputs), fused=False)
            tape.work.matmul_flops += 2.0 * rank * m.weight
        alloc = tape.alloc_kept if kept else tape.alloc
        crossed = alloc(w * rank * outputs)
        crossed = tape.alloc(FP32 * rank * outputs) if w != FP32 else crossed
        parts = [tape.alloc(FP32 * rank * outputs)]
        among = alloc(FP32 * rank * rank)  # A A^T
        parts.append((tape.alloc_kept if rank >= WIDE else tape.alloc)(FP32 * rank * outputs))  # B (A A^T)
        del among
        parts.append(tape.alloc(FP32 * rank * outputs))
        tape.work.kernels += 12
        del squares, wide, crossed, parts
    return tape.alloc(FP32 * outputs)


def divided(b: Blocks, magnitudes: Tensor, norm: Storage) -> Tensor:
    tape, size = b.tape, magnitudes.bytes

    def backward(g: Storage, _: list) -> list:
        tape.moved(size, size, size)
        return [tape.alloc(size)]

    tape.moved(size, size, size)
    return tape.op(size, [magnitudes], [norm], backward)


def beyond_width(shape: ModelShape, setup: Setup) -> int:
    """Bytes of all magnitudes beyond what they would take in the dtype of the rest: they are in fp32."""
    return (FP32 - setup.width) * setup.magnitudes(shape)
