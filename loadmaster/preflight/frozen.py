"""Matmuls over nf4 and fp8 weights (models/frozen.py, torchao.float8) on a replay tape: what they make and let go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loadmaster.preflight.graph import Storage, Tensor
from loadmaster.preflight.shape import Matrix

if TYPE_CHECKING:
    from loadmaster.preflight.blocks import Blocks

WIDE = 512
"""Inputs of a product that selective checkpointing keeps; an adapter's second product has its rank."""


def nf4_matmul(b: Blocks, x: Tensor, m: Matrix) -> Tensor:
    """models/frozen.py: the weight is dequantized for each use, in the forward inside its kernel call."""
    tape, w, n, kept = b.tape, b.w, b.n, m.inputs >= WIDE
    dequantized, absmax = w * m.weight, 4 * -(-m.weight // 64)
    outside = m.inputs % 64 != 0  # no kernel takes rows whose blocks run over their ends: made anew by every pass

    def work() -> None:
        tape.work.matmul_flops += 2.0 * n * m.weight
        tape.moved(m.weight / 2, dequantized, fused=False)
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
    if outside or (tape.in_place and runs):
        with tape.tagged("quantization"):
            scratch = [tape.alloc(absmax), tape.alloc(dequantized)]
        if outside:
            del scratch[0]  # scales
        tape.alloc(w * n * m.outputs if runs else 0)
        del scratch
    return _made(b, x, m, backward)


def _made(b: Blocks, x: Tensor, m: Matrix, backward: Callable) -> Tensor:
    """The result, and after it the codes for the backward pass: a recomputation that ends with them makes both."""
    out = Tensor(_product(b, m))
    return b.tape.link(out, [x], [b.tape.alloc(0)], backward)


def _product(b: Blocks, m: Matrix) -> Storage:
    size = b.w * b.n * m.outputs
    return b.tape.alloc_kept(size) if m.inputs >= WIDE else b.tape.alloc(size)


def on_fp8_units(m: Matrix) -> bool:
    """Whether the units take a matrix of these sizes."""
    return m.inputs % 16 == 0 == m.outputs % 16


def fp8_matmul(b: Blocks, x: Tensor, m: Matrix) -> Tensor:
    """models/frozen.py: x, and the gradient times the weight's scales, are cast to fp8 by row through fp32; the
    backward copies the weight's codes turned. Compiled, the kernel that makes a row casts it, once for all that use it
    (but attention's output, and the gradient that comes from the next layer)."""
    tape, w, n, kept, compiled = b.tape, b.w, b.n, m.inputs >= WIDE, b.setup.compiled

    def cast(width: int, made_here: bool, shared: bool = False) -> list[Storage]:
        if not compiled:
            tape.moved(w * n * width, w * n * width, 4 * 4 * n * width, n * width)
            tape.work.kernels += 5
        elif not shared:
            tape.moved(0 if made_here else w * n * width, n * width, fused=False)
        scale = tape.alloc(4 * n)
        wide = tape.alloc(4 * n * width)
        codes = tape.alloc(n * width)
        del wide
        return [scale, codes]

    def backward(g: Storage, _: list) -> list:
        if not compiled:
            tape.moved(g.bytes, g.bytes)
        tape.moved(m.weight, m.weight, fused=False)
        tape.work.fp8_flops += 2.0 * n * m.weight
        tape.work.kernels += 1
        with tape.tagged("quantization"):
            scaled = tape.alloc(g.bytes)
            rows = cast(m.outputs, m.name != "down_proj")
            del scaled
            turned = [tape.alloc(m.weight), tape.alloc(4 * m.inputs)]
        gx = tape.alloc(w * n * m.inputs)
        del rows, turned
        return [gx]

    if tape.runs(kept):
        tape.work.fp8_flops += 2.0 * n * m.weight
        tape.work.kernels += 1
    with tape.tagged("quantization"):
        rows = cast(m.inputs, m.name != "o_proj", m.shared)
    out = _made(b, x, m, backward)
    del rows
    return out


def fp8_as_numbers(b: Blocks, x: Tensor, m: Matrix) -> Tensor:
    """models/frozen.py where the units do not take a layer, whose sizes are not multiples of 16: codes are cast to x's
    dtype for each product, and the scales come after the first and before the second."""
    tape, w, n = b.tape, b.w, b.n
    result = w * n * m.outputs

    def cast() -> Storage:
        tape.moved(m.weight, w * m.weight, fused=False)
        with tape.tagged("quantization"):
            return tape.alloc(w * m.weight)

    def backward(g: Storage, _: list) -> list:
        scaled = tape.alloc(g.bytes)
        wide = cast()
        tape.moved(g.bytes, g.bytes)
        tape.work.matmul_flops += 2.0 * n * m.weight
        tape.work.kernels += 1
        gx = tape.alloc(w * n * m.inputs)
        del scaled, wide
        return [gx]

    wide = cast()
    if tape.runs(m.inputs >= WIDE):
        tape.work.matmul_flops += 2.0 * n * m.weight
        tape.work.kernels += 1
    product = _product(b, m)
    del wide
    tape.moved(result, result)
    out = Tensor(tape.alloc(result))
    del product
    return tape.link(out, [x], [tape.alloc(0)], backward)


def fp8_training_matmul(b: Blocks, x: Tensor, weight: Tensor, m: Matrix) -> Tensor:
    """torchao's float8 linear, a scale for each tensor: factors are cast at each use, and nothing in fp8 is kept.

    Compiled, casts are parts of the kernels around them. Read off the code that inductor generates for a GPU (2.13), an
    element takes: of an input one byte in each pass, and before the forward one two more reads where attention made it,
    one where it is the gated product; of a gradient, which is laid out in both directions, three; of a weight five for
    its largest magnitude and its codes, and three for those of the backward pass.
    """
    tape, w, n, kept = b.tape, b.w, b.n, m.inputs >= WIDE
    needs_x = x.node is not None

    def cast(elements: float, moved: float) -> Storage:
        """Largest magnitude, product with the scale in fp32, clamped, rounded. moved: bytes an element, compiled."""
        if not b.setup.compiled:
            tape.moved(4 * w * elements, 6 * 4 * elements, elements)
            tape.work.kernels += 6
        elif moved:
            tape.moved(moved * elements, fused=False)
        with tape.tagged("quantization"):
            tape.alloc(w * elements)
            wide = tape.alloc(4 * elements)
            scaled = tape.alloc(4 * elements)
            del wide
            clamped = tape.alloc(4 * elements)
            codes = tape.alloc(elements)
            del scaled, clamped
        return codes

    def copied(codes: Storage) -> Storage:
        """In the layout that the units take."""
        if not b.setup.compiled:
            tape.moved(codes.bytes, codes.bytes)
        with tape.tagged("quantization"):
            return tape.alloc(codes.bytes)

    def product() -> None:
        tape.work.fp8_flops += 2.0 * n * m.weight
        tape.work.kernels += 1

    def backward(g: Storage, _: list) -> list:
        rows = n * m.outputs
        first, codes = cast(rows, 3), cast(m.weight, 3)
        laid = copied(codes)
        product()
        gx = tape.alloc(w * n * m.inputs)
        del laid
        second, inputs = cast(rows, 0), cast(n * m.inputs, 1)
        laid = [copied(second), copied(inputs)]
        product()
        gw = tape.alloc(w * m.weight)
        del laid, first, codes, second, inputs
        return [gx if needs_x else None, gw]

    reads = {"o_proj": 2, "down_proj": 1}.get(m.name, 0)
    codes = [cast(n * m.inputs, 1 + w * reads), cast(m.weight, 5)]
    if tape.runs(kept):
        product()
    out = Tensor(_product(b, m))  # before the factors are kept: a recomputation that ends with them has it, too
    del codes
    return tape.link(out, [x, weight], [x.storage, weight.storage], backward)
