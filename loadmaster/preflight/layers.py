"""Decoder layers, the top of the model and the loss, as the engine runs them, on a replay tape."""

from __future__ import annotations

from loadmaster.preflight import attending, blocks
from loadmaster.preflight.activations import activation, relu, squared
from loadmaster.preflight.blocks import Blocks, Linear, Weights
from loadmaster.preflight.graph import Split, Storage, Tensor
from loadmaster.preflight.mixture import halves, mixture

LOSS_CHUNK_TOKENS = 1024
"""Rows of logits that the engine has alive at a time."""


def decoder_layer(b: Blocks, weights: Weights, x: Tensor, experts: bool) -> Tensor:
    places, scaled = b.shape.norm_places, b.shape.scaled_residual

    def normed(h: Tensor, place: int) -> Tensor:
        return b.norm(h, weights.norms[sum(places[:place])], b.n) if places[place] else h

    residual = x
    h = normed(x, 0)
    del x
    h = attention(b, weights, h)
    h = normed(h, 1)
    h = b.add(residual, b.elementwise(h) if scaled else h)
    residual = h
    h = normed(h, 2)
    h = mixture(b, weights.experts, h) if experts else mlp_by_pieces(b, weights, h)
    h = normed(h, 3)
    h = b.add(residual, b.elementwise(h) if scaled else h)
    return b.elementwise_in_place(h) if b.shape.layer_scalar else h


def attention(b: Blocks, weights: Weights, h: Tensor) -> Tensor:
    shape, linears, norms = b.shape, weights.linears, weights.query_key_norms
    late = shape.late_norm  # Gemma 3 norms heads after all three products, Qwen 3 those of each after its own

    def product(name: str, heads: int) -> Tensor:
        in_order = heads == 1 or (shape.whole_norm and name != "v_proj")  # a single head lies in token order already
        return b.linear(h, linears[name], contiguous=in_order)

    def normed(x: Tensor, place: int, heads: int) -> Tensor:
        if shape.whole_norm:
            x = b.norm(x, norms[place], b.n)
            return x if heads == 1 else b.restride(x)
        return b.norm(x, norms[place], b.n * heads) if norms else x

    if shape.fused:
        q, k, v = fused_query_key_value(b, h, linears)
    elif shape.value_norm:
        return b.linear(attention_with_value_norm(b, weights, h), linears["o_proj"])
    else:
        q = product("q_proj", shape.heads)
        q = q if late else normed(q, 0, shape.heads)
        k = product("k_proj", shape.key_value_heads)
        k = k if late else normed(k, 1, shape.key_value_heads)
        v = product("v_proj", shape.key_value_heads)
        q, k = (normed(q, 0, shape.heads), normed(k, 1, shape.key_value_heads)) if late else (q, k)
    q, k = b.rotate(q, weights.rotary), b.rotate(k, weights.rotary)
    if shape.scaled_query:
        q = b.times_constant(q, b.tape.alloc(b.w * b.n))
    out = attending.attention(b, q, k, v)
    if shape.fused and shape.heads > 1:  # q was joined head by head, so the result lies so and is put in token order
        out = b.copy(out)
    return b.linear(out, linears["o_proj"])


def attention_with_value_norm(b: Blocks, weights: Weights, h: Tensor) -> Tensor:
    """Gemma 4's, whose heads are normed and turned as they lie, token by token; values are normed last of all."""
    shape, linears, (q_norm, k_norm) = b.shape, weights.linears, weights.query_key_norms
    rows = b.n * shape.key_value_heads

    def product(name: str) -> Tensor:
        return b.linear(h, linears[name])

    q = b.rotate(b.norm(product("q_proj"), q_norm, b.n * shape.heads), weights.rotary)
    k = product("k_proj")
    v = k if shape.keys_as_values else product("v_proj")
    k = b.rotate(b.norm(k, k_norm, rows), weights.rotary)
    return attending.attention(b, q, k, b.norm(v, None, rows))


def fused_query_key_value(b: Blocks, h: Tensor, linears: dict[str, Linear]) -> tuple[Tensor, Tensor, Tensor]:
    shape = b.shape
    whole = b.linear(h, linears["qkv_proj"])
    width = shape.query_size + 2 * shape.key_value_size
    q = b.slice(whole, shape.query_size / width)
    k = b.slice(whole, shape.key_value_size / width)
    v = b.slice(whole, shape.key_value_size / width)
    return q, k, v


def mlp(b: Blocks, weights: Weights, h: Tensor) -> Tensor:
    linears = weights.linears
    if b.shape.fused:
        gate, up = halves(b, b.linear(h, linears["gate_up_proj"]))
        up = b.mul(up, activation(b, gate))
        return b.linear(up, linears["down_proj"])
    if not b.shape.gated:
        x = b.linear(h, linears["up_proj"])
        x = activation(b, x) if b.shape.gelu else squared(b, relu(b, x))
        return b.linear(x, linears["down_proj"])
    return b.linear(
        b.mul(activation(b, b.linear(h, linears["gate_proj"])), b.linear(h, linears["up_proj"])), linears["down_proj"]
    )


def mlp_by_pieces(b: Blocks, weights: Weights, h: Tensor) -> Tensor:
    """models/recompute.py: under offload, pieces of so many tokens, each checkpointed by itself."""
    tape = b.tape
    if b.pieces == 1:
        return mlp(b, weights, h)
    whole, total, most = h.bytes, b.n, blocks.MLP_TOKENS
    sizes = [min(most, total - start) for start in range(0, total, most)]
    node = None
    if tape.needs(h):

        def split_backward(g: list[Storage], _: list) -> list:
            tape.moved(whole, whole)
            return [tape.alloc(whole)]

        tape.order += 1
        node = Split(tape.order, [h.node], split_backward, [])
    parts = []
    for size in sizes:
        piece = Tensor(h.storage, node, b.w * size * b.shape.hidden_size)
        piece = tape.link(piece, [piece], [], lambda g, _: [g])  # a result's gradients are added as they come

        def run(x: Tensor, size: int = size) -> Tensor:
            b.n = size
            try:
                return mlp(b, weights, x)
            finally:
                b.n = total

        parts.append(tape.checkpoint(run, piece) if tape.enabled or node is not None else run(piece))
    del piece
    tape.moved(whole, whole)
    return tape.op(whole, parts, [], lambda g, _: [g] * len(sizes))


def embed(b: Blocks, table: Tensor, ids: Storage) -> Tensor:
    """Rows of the embedding; its gradient is as large as the table."""
    tape, size = b.tape, b.w * b.n * b.shape.hidden_size
    tape.moved(size, size, fused=False)

    def backward(g: Storage, _: list) -> list:
        tape.moved(size, table_bytes, fused=False)
        return [tape.alloc(table_bytes)]

    table_bytes = table.bytes
    out = tape.op(size, [table], [ids], backward)
    return b.elementwise(out) if b.shape.scaled_embedding else out


def gather(b: Blocks, hidden: Tensor, rows: int) -> Tensor:
    """Hidden states of the trained positions, by index; the gradient is added to zeros out of place."""
    tape, whole, size = b.tape, hidden.bytes, b.w * rows * b.shape.hidden_size
    index = tape.alloc(8 * rows)
    tape.moved(size, size, fused=False)

    def backward(g: Storage, _: list) -> list:
        tape.moved(whole, whole, size, fused=False)
        zeros = tape.alloc(whole)
        full = tape.alloc(whole)
        del zeros
        return [full]

    return tape.op(size, [hidden], [index], backward)


def chunked_loss(b: Blocks, hidden: Tensor, head: Tensor, rows: int) -> Tensor:
    """models/loss.py: gradients of hidden states and head are made in the forward pass, chunk by chunk; beside compiled
    layers logits are in one buffer of a whole chunk, and their gradient takes their place."""
    tape, w, h, v = b.tape, b.w, b.shape.hidden_size, b.shape.vocabulary_size
    targets = tape.alloc(8 * rows)
    needs_hidden = tape.enabled and hidden.node is not None
    needs_head = tape.enabled and head.node is not None
    with tape.tagged("logits"):
        grad_hidden = tape.alloc(w * rows * h) if needs_hidden else None
        grad_head = tape.alloc(4 * v * h) if needs_head else None
        logits = grad = normaliser = None
        fused = b.setup.compiled and (needs_hidden or needs_head)
        if fused:
            buffer = [tape.alloc(w * LOSS_CHUNK_TOKENS * v), tape.alloc(8 * LOSS_CHUNK_TOKENS)]
        for c, times in chunks(rows):
            tape.work.matmul_flops += times * 2.0 * c * v * h * (1 + needs_hidden + needs_head)
            if fused:
                tape.moved(times * 4 * w * LOSS_CHUNK_TOKENS * v, fused=False)
                tape.work.kernels += 3 * times
                if needs_head:
                    tape.alloc(w * v * h)
                continue
            tape.moved(times * (10 * 4 * c * v if needs_hidden else 5 * 4 * c * v), fused=False)
            tape.work.kernels += 13 * times
            narrow = tape.alloc(w * c * v)
            logits = narrow if w == 4 else tape.alloc(4 * c * v)
            del narrow
            capped = logits if b.shape.logit_softcap else None  # tanh of them over the cap, beside the capped ones
            if capped is not None:
                logits = tape.alloc(4 * c * v)
                tape.moved(times * 4 * c * v * (15 if needs_hidden else 6), fused=False)
                tape.work.kernels += times * (7 if needs_hidden else 3)
            normaliser = tape.alloc(4 * c)
            if tape.in_place:
                tape.alloc(4 * c * v)  # logsumexp holds exp(logits - max)
            del capped
            if needs_hidden:
                if w != 4:
                    grad = tape.alloc(w * c * v)
                tape.alloc(w * c * h)
            if needs_head:
                tape.alloc(w * v * h)
            logits = grad = None
        del logits, grad, normaliser, targets
        if fused:
            del buffer
        loss = Tensor(tape.alloc(4))
        grad_head = tape.alloc(w * v * h) if needs_head and w != 4 else grad_head

        def backward(g: Storage, saved: list) -> list:
            with tape.tagged("logits"):
                first = tape.alloc(w * rows * h)
                tape.moved(2 * w * rows * h)
                return [first, tape.alloc(w * v * h) if needs_head else None]

        saved = [s for s in (grad_hidden, grad_head) if s is not None]
        return tape.link(loss, [hidden, head], saved, backward)


def chunks(rows: int) -> list[tuple[int, int]]:
    """(tokens of a chunk, how many such): whole ones are alike, so two of them are replayed, and what is left."""
    whole, rest = divmod(rows, LOSS_CHUNK_TOKENS)
    found = [(LOSS_CHUNK_TOKENS, whole - whole // 2), (LOSS_CHUNK_TOKENS, whole // 2), (rest, 1)]
    return [(tokens, times) for tokens, times in found if tokens and times]


def preference_loss(b: Blocks, hidden: Tensor, head: Tensor, rows: int) -> Tensor:
    """models/preference.py: log p of each token by chunks; the backward pass makes each chunk's logits again."""
    tape, w, h, v = b.tape, b.w, b.shape.hidden_size, b.shape.vocabulary_size
    targets = tape.alloc(8 * rows)
    needs_hidden, needs_head = hidden.node is not None, head.node is not None

    def logits_of(c: int, times: int) -> tuple[Storage, Storage | None]:
        """And, where they are capped, tanh of what they were over the cap."""
        tape.work.matmul_flops += times * 2.0 * c * v * h
        tape.moved(times * 5.0 * 4 * c * v, fused=False)
        tape.work.kernels += 6 * times
        narrow = tape.alloc(w * c * v)
        logits = narrow if w == 4 else tape.alloc(4 * c * v)
        del narrow
        return logits, tape.alloc(4 * c * v) if b.shape.logit_softcap else None

    def backward(g: Storage, saved: list) -> list:
        with tape.tagged("logits"):
            grad_hidden = tape.alloc(w * rows * h) if needs_hidden else None
            grad_head = tape.alloc(4 * v * h) if needs_head else None
            for c, times in chunks(rows):
                tape.work.matmul_flops += times * 2.0 * c * v * h * (needs_hidden + needs_head)
                logits, capped = logits_of(c, times)
                normaliser = tape.alloc(4 * c)
                if tape.in_place:
                    tape.alloc(4 * c * v)  # logsumexp holds exp(logits - max)
                del capped
                grad = tape.alloc(w * c * v) if w != 4 else logits
                if needs_hidden:
                    tape.alloc(w * c * h)
                if needs_head:
                    tape.alloc(w * v * h)
                del logits, grad, normaliser
            narrow = tape.alloc(w * v * h) if needs_head and w != 4 else grad_head
            return [grad_hidden, narrow]

    with tape.tagged("logits"):
        for c, times in chunks(rows):
            logits = logits_of(c, times)[0]
            probabilities = tape.alloc(4 * c * v)
            del logits, probabilities
        log_p = tape.op(4 * rows, [hidden, head], [hidden.storage, targets], backward)
    places = tape.alloc(8 * rows)

    def spread(g: Storage, _: list) -> list:
        return [tape.alloc(4 * rows)]

    return tape.op(4, [log_p], [places], spread)
