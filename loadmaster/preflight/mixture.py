"""Gated feed-forward pieces and mixtures of experts by grouped matmuls, on a replay tape.

transformers' `grouped_mm` experts: each token is copied once for each of its experts, the copies are sorted by
expert, and two grouped matmuls run over all of them: k x N rows whatever the routing. (Its other two
implementations are out: `eager` waits for the device at each expert, `batched_mm` gathers the weights of every
token, 1,802 GiB for two layers of Mixtral at 2048 tokens.)
"""

from __future__ import annotations

from loadmaster.preflight.activations import activation
from loadmaster.preflight.blocks import Blocks
from loadmaster.preflight.graph import Split, Storage, Tensor


def halves(b: Blocks, x: Tensor) -> tuple[Tensor, Tensor]:
    """chunk(2): views whose gradients are joined again by one concatenation."""
    tape, whole = b.tape, x.bytes
    first, second = Tensor(x.storage, None, whole // 2), Tensor(x.storage, None, whole // 2)
    if tape.needs(x):

        def backward(g: list[Storage], _: list) -> list:
            tape.moved(whole, whole)
            return [tape.alloc(whole)]

        tape.order += 1
        first.node = second.node = Split(tape.order, [x.node], backward, [])
    return first, second


def mixture(b: Blocks, weights: list[Tensor], h: Tensor) -> Tensor:
    """Router, then the experts of each token, then their weighted sum."""
    tape, shape, w, n = b.tape, b.shape, b.w, b.n
    k, e, hidden = shape.experts_per_token, shape.expert_size, shape.hidden_size
    rows = k * n
    routing, gate_up, down = weights
    logits, scores, chosen = router(b, routing, h)
    sorted_experts, order = tape.alloc(8 * rows), tape.alloc(8 * rows)
    token_of_row = tape.alloc(8 * rows)
    picked = index(b, h, w * rows * hidden, token_of_row)
    del token_of_row
    share = index(b, scores, scores.bytes, order)
    counted = tape.alloc(4 * rows)
    mask = tape.alloc(rows)
    picked = masked(b, picked, mask, in_place=True)
    x = b.matmul(picked, gate_up, hidden, 2 * e, rows, shape.experts)
    x = masked(b, x, mask)
    gate, up = halves(b, x)
    x = b.mul(activation(b, gate), up)
    del gate, up
    x = b.matmul(x, down, e, hidden, rows, shape.experts)
    x = masked(b, x, mask)
    weighted = weigh(b, x, share)
    inverse = tape.alloc(8 * rows)
    tape.alloc(8 * rows)
    weighted = index(b, weighted, weighted.bytes, inverse)
    out = total(b, weighted, weighted.bytes // k)
    del logits, chosen, sorted_experts, counted
    return b.elementwise(out, w * n * hidden) if out.bytes != w * n * hidden else out


def weigh(b: Blocks, x: Tensor, share: Tensor) -> Tensor:
    """Each row times its router weight; Mixtral's weights are fp32, and then so is the product."""
    tape, narrow = b.tape, x.bytes
    wide = narrow * share.bytes // (b.w * b.n * b.shape.experts_per_token)
    needs_share = share.node is not None
    tape.moved(narrow, wide)

    def backward(g: Storage, saved: list) -> list:
        tape.moved(wide, wide, narrow, wide)
        gx = tape.alloc(wide)
        gs = tape.alloc(wide) if needs_share else None
        saved.clear()  # what a checkpoint made again is gone before the results are cast and summed
        gx = gx if wide == narrow else tape.alloc(narrow)
        return [gx, tape.alloc(share_bytes) if gs is not None else None]

    share_bytes = share.bytes
    return tape.op(wide, [x, share], [share.storage, *([x.storage] if needs_share else [])], backward)


def router(b: Blocks, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Storage]:
    """(logits of all experts [N, E], weights of the chosen ones [N, k], their numbers)."""
    tape, shape, w, n = b.tape, b.shape, b.w, b.n
    k, size = shape.experts_per_token, 4 * n * shape.experts
    logits = b.matmul(h, weight, shape.hidden_size, shape.experts, n)
    wide = b.elementwise(logits, size) if w != 4 else logits

    def softmax_backward(g: Storage, _: list) -> list:
        tape.moved(size, size, size)
        return [tape.alloc(size)]

    tape.moved(size, size)
    probabilities = tape.op(size, [], [], softmax_backward)
    tape.link(probabilities, [wide], [probabilities.storage], softmax_backward)
    del wide
    chosen = tape.alloc(8 * k * n)

    def top_backward(g: Storage, _: list) -> list:
        zeros = tape.alloc(size)
        full = zeros if tape.in_place else tape.alloc(size)
        tape.moved(size)
        return [full]

    top = tape.op(4 * k * n, [probabilities], [chosen], top_backward)
    if shape.normalised_routing:
        top = normalise(b, top)
    if w != 4 and shape.family != "mixtral":
        top = b.elementwise(top, w * k * n)
    return logits, top, chosen


def normalise(b: Blocks, x: Tensor) -> Tensor:
    """x /= x.sum(-1): in place, so the graph keeps a copy of what x was."""
    tape, size = b.tape, x.bytes
    summed = tape.alloc(4 * b.n)
    before = tape.alloc(size) if tape.needs(x) else summed

    def backward(g: Storage, _: list) -> list:
        parts = [tape.alloc(size) for _ in range(3)]
        return [parts[-1]]

    return tape.link(Tensor(x.storage, x.node), [x], [summed, before], backward)


def index(b: Blocks, x: Tensor, size: int, where: Storage) -> Tensor:
    """x[where]; the gradient is added to zeros of x's size."""
    tape, whole = b.tape, x.bytes
    tape.moved(size, size)

    def backward(g: Storage, _: list) -> list:
        tape.moved(whole, size, size)
        zeros = tape.alloc(whole)
        return [zeros if tape.in_place else tape.alloc(whole)]

    return tape.op(size, [x], [where], backward)


def masked(b: Blocks, x: Tensor, mask: Storage, in_place: bool = False) -> Tensor:
    """masked_fill: rows of experts that are elsewhere become zero."""
    tape, size = b.tape, x.bytes
    tape.moved(size, size)

    def backward(g: Storage, _: list) -> list:
        tape.moved(size, size)
        return [tape.alloc(size)]

    if in_place:
        return tape.link(Tensor(x.storage, x.node), [x], [mask], backward)
    return tape.op(size, [x], [mask], backward)


def total(b: Blocks, x: Tensor, size: int) -> Tensor:
    """Sum over a token's experts; its gradient is a view that the next operation copies."""
    tape, whole = b.tape, x.bytes
    tape.moved(whole, size)

    def backward(g: Storage, _: list) -> list:
        tape.moved(size, whole)
        return [tape.alloc(whole)]

    return tape.op(size, [x], [], backward)
