"""What lies between the matrices of a feed-forward layer, and squares, on a replay tape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadmaster.preflight.graph import Storage, Tensor

if TYPE_CHECKING:
    from loadmaster.preflight.blocks import Blocks


def activation(b: Blocks, x: Tensor) -> Tensor:
    """SiLU or GELU: keeps its input."""
    tape, size = b.tape, x.bytes
    tape.moved(size, size)

    def backward(g: Storage, _: list) -> list:
        tape.moved(size, size, size)
        return [tape.alloc(size)]

    return tape.op(size, [x], [x.storage], backward)


def relu(b: Blocks, x: Tensor) -> Tensor:
    """Keeps what it gives."""
    tape, size = b.tape, x.bytes
    tape.moved(size, size)

    def backward(g: Storage, _: list) -> list:
        tape.moved(size, size, size)
        return [tape.alloc(size)]

    out = tape.op(size, [], [], backward)
    return tape.link(out, [x], [out.storage], backward)


def squared(b: Blocks, x: Tensor) -> Tensor:
    """x.pow(2)."""
    tape, size = b.tape, x.bytes

    def backward(g: Storage, _: list) -> list:
        parts = []
        for _ in range(3):  # grad * (2 * x ** 1): each factor is a tensor
            tape.moved(size, size)
            parts.append(tape.alloc(size))
        return [parts[-1]]

    tape.moved(size, size)
    return tape.op(size, [x], [x.storage], backward)
