"""Matmuls over frozen nf4 and fp8 weights (models/frozen.py) on a replay tape: what they make and let go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadmaster.preflight.replay import Storage, Tensor
from loadmaster.preflight.shape import Matrix

WIDE = 512
"""loadmaster.models.recompute.WIDE; a test holds the two equal."""

if TYPE_CHECKING:
    from loadmaster.preflight.blocks import Blocks


def nf4_matmul(b: Blocks, x: Tensor, m: Matrix) -> Tensor:
    """models/frozen.py: the weight is dequantized for each use, in the forward inside its kernel call."""
    tape, w, n, kept = b.tape, b.w, b.n, m.inputs >= WIDE
    dequantized, absmax = w * m.weight, 4 * -(-m.weight // 64)

    def work() -> None:
        tape.work.matmul_flops += 2.0 * n * m.weight
        tape.moved(m.weight / 2, dequantized)
        tape.work.kernels += 2

    def backward(g: Storage, _: list) -> list:
        work()
        with tape.tagged("quantization"):
            scales = tape.alloc(absmax)
            full = tape.alloc(dequantized)
            del scales
        gx = tape.alloc(w * n * m.inputs)
        del full
        return [gx]

    runs = tape.runs(kept)
    if runs:
        work()
    if tape.in_place and runs:
        with tape.tagged("quantization"):
            scratch = [tape.alloc(dequantized), tape.alloc(absmax)]
        tape.alloc(w * n * m.outputs)
        del scratch
    return tape.op(w * n * m.outputs, [x], [], backward, kept)


def fp8_matmul(b: Blocks, x: Tensor, m: Matrix) -> Tensor:
    """models/frozen.py: x is cast to fp8 by row through fp32; the backward casts the weight to bf16."""
    tape, w, n, kept = b.tape, b.w, b.n, m.inputs >= WIDE

    def backward(g: Storage, _: list) -> list:
        tape.work.matmul_flops += 2.0 * n * m.weight
        tape.moved(m.weight, w * m.weight, g.bytes, g.bytes)
        tape.work.kernels += 2
        with tape.tagged("quantization"):
            full = tape.alloc(w * m.weight)
            scaled = tape.alloc(g.bytes)
        gx = tape.alloc(w * n * m.inputs)
        del full, scaled
        return [gx]

    tape.work.fp8_flops += 0.0 if not tape.runs(kept) else 2.0 * n * m.weight
    tape.moved(x.bytes, x.bytes, 4 * 4 * n * m.inputs, n * m.inputs)
    tape.work.kernels += 6
    with tape.tagged("quantization"):
        scale = tape.alloc(4 * n)
        wide = tape.alloc(4 * n * m.inputs)
        codes = tape.alloc(n * m.inputs)
        del wide
    out = tape.op(w * n * m.outputs, [x], [], backward, kept)
    del codes, scale
    return out
