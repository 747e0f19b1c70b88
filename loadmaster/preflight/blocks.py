"""The engine's modules on a replay tape: transformers' eager decoder layers, peft adapters, nf4, the chunked loss.

Each function is the module of the same name, line by line, with sizes in place of values. N tokens, w bytes an
activation (2 in bf16, 4 in fp32), h hidden, f feed-forward, r rank. What one kernel needs inside itself, and a
trace therefore cannot see, is allocated and let go at once where `tape.in_place` is set; it is that of CUDA kernels.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from loadmaster.config.job_rules import MLP_TOKENS
from loadmaster.preflight import dora, saved
from loadmaster.preflight.activations import squared
from loadmaster.preflight.frozen import (
    WIDE,
    fp8_as_numbers,
    fp8_matmul,
    fp8_training_matmul,
    nf4_matmul,
    on_fp8_units,
)
from loadmaster.preflight.graph import Storage, Tensor
from loadmaster.preflight.replay import Tape
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import Matrix, ModelShape
from loadmaster.preflight.stepping import Stepping

MERGED = 256
"""Highest rank of adapters whose products over one input are one in compiled layers (models/merged.py): wider ones keep
a GPU busy by themselves."""
NARROW = 512
"""A matmul with fewer columns than this may be bound by the bytes that it moves, which the card decides (speed.py)."""
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
BLOCK = 128
"""Tokens of a block of attention with capped scores."""


class Linear(NamedTuple):
    """The base of an adapter is frozen."""

    matrix: Matrix
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    magnitudes: Tensor | None
    """DoRA's."""


@dataclass
class Weights:
    """Parameters of one layer as tensors."""

    linears: dict[str, Linear]
    """By name."""
    norms: list[Tensor]
    query_key_norms: list[Tensor]
    rotary: Storage
    """cos and sin, shared by all layers."""
    experts: list[Tensor]
    """Router, gate and up of all experts, down; empty in a dense layer."""


class Blocks:
    """Modules of one model under one setup, on one tape."""

    def __init__(self, tape: Tape, shape: ModelShape, setup: Setup, accumulated: bool):
        self.tape, self.shape, self.setup = tape, shape, setup
        self.n = setup.tokens
        if shape.attention_softcap:  # padded to whole blocks (models/capped.py)
            self.n = -(-self.n // BLOCK) * BLOCK
        self.w = setup.width
        self.accumulated = accumulated
        self.stepping = Stepping(tape, setup) if setup.in_backward and tape.enabled else None
        self.full = not setup.adapters
        self.attended = shape.attended(setup.sequence_length)
        self.blocks: Storage | None = None
        """`attention_blocks` of this micro-batch, until its backward pass is over."""

    def of_kind(self, second: bool) -> Blocks:
        """Of layers of this kind (ModelShape.view), on the same tape."""
        if not self.shape.global_at:
            return self
        own = copy(self)
        own.shape = self.shape.view(second)
        own.attended = own.shape.attended(self.setup.sequence_length)
        return own

    # ------------------------------------------------------------ parameters

    def layer_weights(self, second: bool, rotary: Storage) -> Weights:
        shape, setup, w = self.shape, self.setup, self.w
        adapted = set() if self.full else {m.name for m in shape.adapted(setup.lora_targets, second)}
        linears, experts = {}, second and shape.experts
        for m in shape.matrices(second):
            a = b = magnitudes = None
            uses = self.pieces if m.name in MLP else 1
            if m.name in adapted:
                a, b = (self._parameter(w * setup.lora_rank * size, uses) for size in (m.inputs, m.outputs))
                magnitudes = self._parameter(dora.FP32 * m.outputs, uses) if setup.dora else None
            bias = self.base(w * m.outputs) if m.bias else None
            linears[m.name] = Linear(m, self.base(w * m.weight, uses), bias, a, b, magnitudes)
        each = w * shape.experts * shape.hidden_size
        mixed = [self.base(each * size) for size in (1, 2 * shape.expert_size, shape.expert_size)] if experts else []
        norms = [self.module(w * shape.hidden_size, name) for name in saved.layer_norms(shape)]
        heads = [self.module(w * size, name) for name, size in saved.head_norm_sizes(shape)]
        return Weights(linears, norms, heads, rotary, mixed)

    def base(self, size: float, uses: int = 1) -> Tensor:
        return self.tape.parameter(size, self.full, self.accumulated, uses)

    def module(self, size: float, *names: str, uses: int = 1) -> Tensor:
        """The weight of a module that no adapter is put on, under each of its names."""
        trained = any(map(self.setup.trains, names))
        return self.tape.parameter(size, trained, self.accumulated, uses)

    def _parameter(self, size: float, uses: int = 1) -> Tensor:
        return self.tape.parameter(size, True, self.accumulated, uses)

    @property
    def pieces(self) -> int:
        """In how many pieces an MLP runs (models/recompute.py)."""
        return -(-self.n // MLP_TOKENS) if self.setup.checkpointing == "offload" else 1

    # ------------------------------------------------------------ single operations

    def elementwise(self, x: Tensor, size: float | None = None) -> Tensor:
        """Multiplication with a constant, sign, cast: nothing saved, the gradient has the input's size."""
        tape, before = self.tape, x.bytes
        size = x.bytes if size is None else size
        tape.moved(before, size)

        def backward(g: Storage, _: list) -> list:
            tape.moved(g.bytes, before)
            return [tape.alloc(before)]

        return tape.op(size, [x], [], backward)

    def elementwise_in_place(self, x: Tensor) -> Tensor:
        """Multiplication with a stored number that lands where x was; the gradient is new. It is the last that a layer
        saves something for, so that a checkpointed one is run again to its end."""
        tape, size = self.tape, x.bytes
        tape.moved(size, size)
        number = tape.alloc(self.w)

        def backward(g: Storage, _: list) -> list:
            tape.moved(size, size)
            return [tape.alloc(size)]

        return tape.link(Tensor(x.storage, x.node, size), [x], [number], backward)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        self.tape.moved(x.bytes, y.bytes, x.bytes)
        return self.tape.op(x.bytes, [x, y], [], lambda g, _: [g, g])

    def mul(self, x: Tensor, y: Tensor, reduced: float | None = None) -> Tensor:
        """x * y; `reduced`: y is smaller and broadcast, so its gradient is summed to so many bytes."""
        tape, needs_x, needs_y = self.tape, x.node is not None, y.node is not None
        tape.moved(x.bytes, y.bytes, x.bytes)
        saved = ([y.storage] if needs_x else []) + ([x.storage] if needs_y else [])
        size = x.bytes

        def backward(g: Storage, _: list) -> list:
            tape.moved(g.bytes, size, size)
            gx = tape.alloc(size) if needs_x else None
            gy = None
            if needs_y:
                tape.moved(g.bytes, size, size)
                gy = tape.alloc(size)
                if reduced is not None:
                    gy = tape.alloc(reduced)
            return [gx, gy]

        return tape.op(size, [x, y], saved, backward)

    def matmul(
        self, x: Tensor, weight: Tensor, inputs: int, outputs: int, rows: int, groups: int = 1, merged: bool = False
    ) -> Tensor:
        """x [rows, inputs] @ weight^T -> [rows, outputs]; with groups, each row has one of so many weights.

        merged: narrow, and computed together with another product of x (models/merged.py), which has x's traffic.
        """
        tape, w, kept = self.tape, self.w, inputs >= WIDE
        needs_x, needs_w = x.node is not None, weight.node is not None
        saved = ([x.storage] if needs_w else []) + ([weight.storage] if needs_x else [])

        def work() -> None:
            if min(inputs, outputs) < NARROW:  # an adapter's
                read = 0 if merged else w * rows * inputs
                tape.narrow(2.0 * rows * inputs * outputs, read + w * rows * outputs + w * groups * inputs * outputs)
                return
            tape.work.matmul_flops += 2.0 * rows * inputs * outputs
            tape.work.kernels += 1

        def backward(g: Storage, _: list) -> list:
            gw = gx = None
            if needs_w:
                work()
                gw = tape.alloc(w * groups * inputs * outputs)
            if needs_x:
                work()
                gx = tape.alloc(w * rows * inputs)
            return [gx, gw]

        if tape.runs(kept):
            work()
        return tape.op(w * rows * outputs, [x, weight], saved, backward, kept)

    # ------------------------------------------------------------ linears

    def linear(self, x: Tensor, linear: Linear, contiguous: bool = True) -> Tensor:
        """A linear with its adapter, if it has one. contiguous=False: its gradient comes transposed and is copied."""
        m, weight, bias, a, b, magnitudes = linear
        if self.setup.method == "qlora":
            out = nf4_matmul(self, x, m)
        elif self.setup.precision == "fp8" and self.setup.adapters:
            out = fp8_matmul(self, x, m) if on_fp8_units(m) else fp8_as_numbers(self, x, m)
        elif self.setup.precision == "fp8" and on_fp8_units(m):
            out = fp8_training_matmul(self, x, weight, m)
        else:
            out = self.matmul(x, weight, m.inputs, m.outputs, self.n)
        if bias is not None:
            out = self.add_bias(out, bias)
            if self.setup.precision == "fp8":  # a kernel of its own
                self.tape.moved(out.bytes, out.bytes)
                out = Tensor(self.tape.alloc(out.bytes), out.node)
        if a is None:
            return out if contiguous else self.restride(out)
        rank, n = self.setup.lora_rank, self.n
        scale = None if magnitudes is None else dora.scale(self, m, magnitudes)
        dropped = self.dropout(x) if self.setup.lora_dropout and self.tape.enabled else x
        merged = self.setup.compiled and dropped is x and m.shared and rank <= MERGED
        narrow = self.matmul(dropped, a, m.inputs, rank, n, merged=merged)
        narrow = self.elementwise(narrow) if scale is None else narrow  # models/adapters.py, models/dora.py
        update = self.matmul(narrow, b, rank, m.outputs, n)
        update = update if scale is None else self.elementwise(update)
        del narrow
        result = out if scale is not None else None  # peft's own variable, as long as the layer runs
        out = self.add(out if scale is None or bias is None else self.elementwise(out), update)
        del update
        if scale is not None:
            out = self.mul(out, scale, reduced=scale.bytes)
            out = out if bias is None else self.elementwise(out)
        del result
        return out if contiguous else self.restride(out)

    def dropout(self, x: Tensor) -> Tensor:
        """The fused kernel of a GPU: keeps a mask of a byte an element (elsewhere, in a trace: of x's dtype)."""
        tape, size = self.tape, x.bytes
        mask = tape.alloc(size // self.w if tape.in_place else size)
        tape.moved(size, size, size // self.w)

        def backward(g: Storage, _: list) -> list:
            tape.moved(size, size)
            return [tape.alloc(size)]

        return tape.op(size, [x], [mask], backward)

    def add_bias(self, out: Tensor, bias: Tensor) -> Tensor:
        """addmm: the bias joins in the matmul's kernel; its gradient is a sum over rows."""
        tape, size = self.tape, bias.bytes
        needs = bias.node is not None

        def backward(g: Storage, _: list) -> list:
            if needs:
                tape.moved(g.bytes, size)
            return [g, tape.alloc(size) if needs else None]

        joined = Tensor(out.storage, out.node, out.bytes)
        return tape.link(joined, [out, bias], [], backward)

    def copy(self, x: Tensor) -> Tensor:
        self.tape.moved(x.bytes, x.bytes)
        return self.tape.op(x.bytes, [x], [], lambda g, _: [g])

    def restride(self, x: Tensor) -> Tensor:
        """A view whose gradient arrives in another layout and has to be copied before the matmul."""
        tape, size = self.tape, x.bytes

        def backward(g: Storage, _: list) -> list:
            tape.moved(size, size)
            return [tape.alloc(size)]

        return tape.link(Tensor(x.storage, x.node, x.bytes), [x], [], backward)

    # ------------------------------------------------------------ norm, rotary, attention

    def norm(self, x: Tensor, weight: Tensor | None, rows: int) -> Tensor:
        """RMSNorm in fp32; Gemma's multiplies by 1 + weight, or where it has none by nothing, before casting back."""
        w = self.w
        elements = x.bytes // w
        x32 = self.elementwise(x, 4 * elements) if w != 4 else x
        mean = self.mean_square(x32, 4 * rows)
        scale = self.rsqrt(self.elementwise(mean))
        x32 = self.mul(x32, scale, reduced=4 * rows)
        del scale
        if weight is None:
            return self.elementwise(x32, w * elements) if w != 4 else x32
        if self.shape.gemma_norm:
            width = weight.bytes // w
            gain = self.elementwise(self.elementwise(weight, 4 * width) if w != 4 else weight)
            x32 = self.mul(x32, gain, reduced=4 * width)
            return self.elementwise(x32, w * elements) if w != 4 else x32
        if self.shape.wide:  # the code has a name for what it multiplies with the weight, so that stays up to the end
            scaled = self.mul(x32, weight, reduced=4 * weight.bytes // w)
            return self.elementwise(scaled, w * elements) if w != 4 else scaled
        narrow = self.elementwise(x32, w * elements) if w != 4 else x32
        return self.mul(narrow, weight, reduced=weight.bytes)

    def mean_square(self, x: Tensor, size: int) -> Tensor:
        """x.pow(2).mean(-1)."""
        tape, whole = self.tape, x.bytes

        def average(g: Storage, _: list) -> list:
            tape.moved(whole)
            return [tape.alloc(whole)]

        power = squared(self, x)
        tape.moved(whole, size)
        return tape.op(size, [power], [], average)

    def rsqrt(self, x: Tensor) -> Tensor:
        tape, size = self.tape, x.bytes

        def backward(g: Storage, _: list) -> list:
            parts = [tape.alloc(size) for _ in range(3)]
            tape.work.kernels += 3
            return [parts[-1]]

        tape.moved(size, size)
        out = tape.op(size, [], [], backward)
        return tape.link(out, [x], [x.storage, out.storage] if self.shape.power_norm else [out.storage], backward)

    def rotate(self, x: Tensor, rotary: Storage) -> Tensor:
        """x * cos + rotate_half(x) * sin; where only a fraction of each head turns, the rest passes as it is."""
        fraction = self.shape.rotary_fraction
        if self.shape.fused:
            turned, passed = self.slice(x, fraction), self.slice(x, 1 - fraction)
            return self.join(self._rotated(turned, rotary), passed)
        return self._rotated(x, rotary)

    def _rotated(self, x: Tensor, rotary: Storage) -> Tensor:
        turned = self.times_constant(x, rotary)
        first, second = self.slice(x, 0.5), self.slice(x, 0.5)
        turned = self.add(turned, self.times_constant(self.join(self.elementwise(second), first), rotary))
        return self.elementwise(turned, x.bytes) if turned.bytes != x.bytes else turned

    def times_constant(self, x: Tensor, constant: Storage) -> Tensor:
        """Product with cos or sin, which are saved."""
        tape, size, result = self.tape, x.bytes, x.bytes * 4 // self.w if self.shape.wide else x.bytes
        tape.moved(size, result)

        def backward(g: Storage, _: list) -> list:
            tape.moved(result, size)
            whole = tape.alloc(result)
            return [whole if result == size else tape.alloc(size)]

        return tape.op(result, [x], [constant], backward)

    def slice(self, x: Tensor, fraction: float) -> Tensor:
        """A view of part of x; its gradient is x-sized, with zeros elsewhere."""
        tape, whole = self.tape, x.bytes

        def backward(g: Storage, _: list) -> list:
            tape.moved(whole, fraction * whole)
            return [tape.alloc(whole)]

        part = Tensor(x.storage, x.node, int(x.bytes * fraction))
        return tape.link(part, [x], [], backward)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Concatenation; its gradients are views."""
        self.tape.moved(*(2 * [x.bytes + y.bytes]))
        return self.tape.op(x.bytes + y.bytes, [x, y], [], lambda g, _: [g, g])
