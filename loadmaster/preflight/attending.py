"""Attention on a replay tape: what its kernels keep, and what they have inside themselves."""

from __future__ import annotations

from loadmaster.preflight.blocks import BLOCK, Blocks
from loadmaster.preflight.graph import Storage, Tensor
from loadmaster.preflight.shape import FLASH_HEAD


def attention_blocks(b: Blocks) -> Storage:
    """What FlexAttention reads besides q, k, v: each token's document, and four tables of blocks for each window
    that layers have (models/capped.py). Nothing where scores are not capped."""
    rows = b.n // BLOCK
    tables = 4 * 4 * rows * (rows + 1) * len(set(b.shape.windows))
    return b.tape.alloc(4 * b.n + tables if b.shape.attention_softcap else 0)


def attention(b: Blocks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Variable-length flash attention over q, k, v of one row; indexing the row gives each a copied gradient.
    Of capped scores FlexAttention, and of heads too wide for flash kernels another, which take them as they are."""
    tape, n, shape = b.tape, b.n, b.shape
    capped, wide = shape.attention_softcap, shape.head_dim > FLASH_HEAD
    if not (capped or wide):
        q, k, v = (b.slice(t, 1.0) for t in (q, k, v))
    size = q.bytes
    statistics = tape.alloc_kept(4 * n * shape.heads)
    sizes = [q.bytes, k.bytes, v.bytes]

    def work(share: float) -> None:
        tape.work.attention_flops += share * 4.0 * n * b.attended * shape.query_size
        tape.moved(*sizes, size, fused=False)

    def backward(g: Storage, _: list) -> list:
        work(2.5)
        # Of the flash kernel's logsumexp a gradient of zeros; inside FlexAttention rowsum(dO O).
        zeros = tape.alloc(4 * n * shape.heads) if tape.in_place or not (capped or wide) else None
        if tape.in_place and not (capped or wide):
            tape.alloc(attention_scratch(b))
        results = [tape.alloc(s) for s in sizes]
        if tape.in_place and wide:  # documents' gradients are put into these
            tape.alloc(attention_scratch(b))
        del zeros
        return results

    runs = tape.runs(kept=True)
    if runs:
        work(1.0)
    output = tape.op(size, [], [], backward, kept=True)
    if runs and tape.in_place and wide:  # keys and values repeated, a document's output in 16 bits and in fp32
        tape.alloc(n * shape.query_size * (3 * b.w + 4))
    saved = [q.storage, k.storage, v.storage, output.storage, statistics]
    return tape.link(output, [q, k, v], saved, backward)


def attention_scratch(b: Blocks) -> int:
    """Inside the backward kernel: dq in fp32, the row sums, and k, v gradients of every query head if grouped.
    Of wide heads (models/wide_heads.py, a row that is one document): k and v repeated, the gradient of the output
    laid out anew, three gradients of every query head, and these in fp32."""
    shape, n = b.shape, b.n
    if shape.head_dim > FLASH_HEAD:
        return n * (shape.query_size * (6 * b.w + 3 * 4) + 2 * 4 * shape.heads)
    grouped = 2 * b.w * shape.query_size if shape.key_value_heads != shape.heads else 0
    return n * (4 * shape.query_size + 4 * shape.heads + grouped)
