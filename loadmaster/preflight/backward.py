"""What a compiled decoder layer's backward pass has at once: the most of what it has at any of its kernels.

Of the kernel of the gated product compiled.py has a token's bytes; here is what has other sizes than tokens (matrices
dequantized or turned, gradients of parameters), and the kernels before and after it. Read off the code that inductor
generates for an H100, of torch 2.11 and 2.13 the larger (benchmarks/generated_steps.py,
tests/preflight/test_three_layers.py).
"""

from __future__ import annotations

from loadmaster.preflight import saved
from loadmaster.preflight.attending import attention_scratch
from loadmaster.preflight.blocks import Blocks
from loadmaster.preflight.compiled import in_backward_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape


def in_backward(b: Blocks, second: bool, kind: str, kept: int) -> int:
    """Bytes that a compiled layer's backward pass has at once beyond what it kept and its output's gradient, where that
    is known: what it has inside, and what it makes again before, if anything."""
    shape, setup, n = b.shape, b.setup, b.n
    inside = in_backward_bytes(shape, setup, second) * n
    if not inside:
        return 0
    if shape.experts and b.full:
        inside = max(inside, _after_experts(b, gradient_bytes(shape, setup, second)))
    elif shape.experts:  # those of the experts, which come first, are gone by the time of attention's
        dequantized = b.w * max(m.weight for m in shape.attention_matrices) * (setup.method == "qlora")
        product = dequantized + b.w * n * shape.hidden_size
        inside = max(inside, product, _at_adapted_attention(b), gradient_bytes(shape, setup, second))
    elif b.full and shape.fused:
        inside = max(inside + b.w * shape.hidden_size * shape.intermediate_size, _at_fused_attention(b))
        inside = max(inside, gradient_bytes(shape, setup, second))
    elif b.full:
        inside = max(inside, _at_last_product(b), _at_attention(b), _at_the_end(b, second) - kept)
    else:
        inside += b.w * setup.lora_rank * _of_down(b) + _dequantized_before(b)
        inside = max(inside, _at_adapted_product(b), _at_adapted_attention(b), gradient_bytes(shape, setup, second))
    if kind in ("none", "selective"):
        return inside
    return inside + kept + {"full": -1, "offload": 1}[kind] * b.w * n * shape.hidden_size  # fetched: the next one's


def _at_adapted_product(b: Blocks) -> int:
    """At the product before the gated one's gradient: that, and the matrix dequantized, or its codes turned, beside
    codes of the layer's gradient; selective, what was made again before: adapters' parts of gate and up, and the
    product for down's. At the MLP's last product, where tokens are few: a matrix as well, the gradients of all of the
    MLP's adapters, what is multiplied (in FP8 its codes), and three of hidden size; gate and up are gone."""
    shape, setup, n = b.shape, b.setup, b.n
    fp8, f = setup.precision == "fp8", shape.intermediate_size
    m = max(shape.mlp_matrices, key=lambda matrix: matrix.weight)
    matrix = {"qlora": b.w * m.weight}.get(setup.method, m.weight if fp8 else 0)
    adapted = [m for m in shape.adapted(setup.lora_targets) if m in shape.mlp_matrices]
    again = len(adapted) * (setup.checkpointing == "selective" and not shape.fused)
    first = matrix + b.w * n * f * (1 + again) + n * shape.hidden_size * fp8
    gradients = b.w * setup.lora_rank * sum(m.inputs + m.outputs for m in adapted)
    read = (1 + shape.fused) * f // (1 + fp8) - (1 + shape.gated) * f
    return max(first, matrix + gradients + b.w * n * (3 * shape.hidden_size + read))


def _of_down(b: Blocks) -> int:
    """What one rank of down's adapter has of gradients by then: of its B, or of its A, whose input dropout has kept."""
    kept = b.setup.lora_dropout and b.setup.method != "qlora" and b.setup.checkpointing != "selective"
    adapted = any(m.name == "down_proj" for m in b.shape.adapted(b.setup.lora_targets))
    return b.shape.intermediate_size if kept and adapted else b.shape.hidden_size


def _dequantized_before(b: Blocks) -> int:
    """Over an nf4 base, where none of the MLP's matrices has an adapter, or gate alone with dropout or of rank 1, the
    one that its gradients are multiplied with next is there before them; not where gate and up are one."""
    adapted = {m.name for m in b.shape.adapted(b.setup.lora_targets) if m in b.shape.mlp_matrices}
    adapted -= {"gate_proj"} if (b.setup.lora_dropout or b.setup.lora_rank == 1) and len(adapted) == 1 else set()
    if b.setup.method != "qlora" or b.shape.fused or adapted:
        return 0
    return b.w * max(m.weight for m in b.shape.mlp_matrices)


def _at_adapted_attention(b: Blocks) -> int:
    """At attention's kernel, under adapters: the gradient of the layer's output, which torch 2.11 holds to the end of
    the compiled backward pass (2.13 lets it go), that of attention's output and its own three results; in FP8
    besides codes and parts of a gradient of hidden size, and the output matrix's codes, turned; gate and up are
    gone."""
    shape = b.shape
    gone = (1 + shape.gated) * shape.intermediate_size
    if shape.experts:
        gone = shape.experts_per_token * (2 * shape.expert_size + shape.hidden_size)
    codes = shape.hidden_size * (5 * b.n + shape.query_size) * (b.setup.precision == "fp8")
    here = shape.hidden_size + 2 * shape.query_size + 2 * shape.key_value_size - gone
    return b.w * b.n * here + codes + attention_scratch(b)


def _at_last_product(b: Blocks) -> int:
    """At the last of the MLP's parameters' gradients, trained whole: all of them, what that is a product of, and four
    of hidden size; where norms come after attention and MLP two besides, as sums in fp32 for these norms' weights, and
    what they had kept is gone. gate and up are."""
    shape = b.shape
    here = (4 + 2 * shape.norm_places[3]) * shape.hidden_size - shape.gated * shape.intermediate_size
    return b.w * (b.n * here + sum(m.weight for m in shape.mlp_matrices))


def _at_attention(b: Blocks) -> int:
    """At attention's kernel, trained whole: gradients of the MLP's parameters, which all come out at the end; four of
    hidden size, the layer's output's among them (held by torch 2.11, as above) and in FP8 one turned,
    and codes of o's matrix; that of attention's output and its own three results; gate and up are gone."""
    shape = b.shape
    gone = (1 + shape.gated) * shape.intermediate_size
    here = 4 * shape.hidden_size + 2 * shape.query_size + 2 * shape.key_value_size - gone
    turned = (shape.hidden_size * (b.n + shape.query_size) + 4 * b.n) * (b.setup.precision == "fp8")
    return b.w * (b.n * here + sum(m.weight for m in shape.mlp_matrices)) + turned + attention_scratch(b)


def _at_fused_attention(b: Blocks) -> int:
    """At attention's kernel or before it, trained whole with gate and up in one matrix. Of what counts, in bf16: the
    gradients of both feed-forward matrices and three of hidden size, or besides attention's four gradients, either both
    and two of hidden size, where gate and up are gone, or down's and that of attention's output matrix and three. In
    FP8 one more in bytes, or seven and the turned codes of the gradient of gate and up, with no matrix's. The order is
    another at other numbers of tokens."""
    shape, n, h = b.shape, b.n, b.shape.hidden_size
    gone, down = 4 * shape.intermediate_size, h * shape.intermediate_size
    own = n * (4 * shape.query_size + 4 * shape.key_value_size) + attention_scratch(b)
    if b.setup.precision == "fp8":
        return own + max(6 * down + n * (5 * h - gone), n * (7 * h + gone // 2))
    early = 2 * down + 2 * h * shape.query_size + 6 * h * n
    late = n * (6 * shape.intermediate_size + 6 * h)  # with no matrix's either: Phi-4 14B at 4,096 tokens
    return max(6 * down + 6 * h * n, own + max(6 * down + n * (4 * h - gone), early, late))


def _after_experts(b: Blocks, gradients: int) -> int:
    """Where experts are trained whole, at attention's kernel: the gradients of gated products and of gate and up, and
    four of hidden size, attention's four besides; or matrices' gradients in the place of those: down's at the gated
    products, or all of them, and the experts' inputs laid out anew. The order is another at other numbers of tokens.
    When the layer has all its gradients, experts' results and what attention has kept are gone."""
    shape, n, h = b.shape, b.n, b.shape.hidden_size
    k, e, down = shape.experts_per_token, shape.expert_size, 2 * shape.experts * shape.expert_size * h
    attention = 4 * shape.query_size + 4 * shape.key_value_size
    own = n * (8 * h + attention) + attention_scratch(b)
    ends = max(3 * down - 2 * k * h * n, gradients - (2 * k * h + attention) * n)
    return max(own + 6 * k * e * n, down + k * (6 * e - 2 * h) * n, own + 3 * down - k * (4 * e + 2 * h) * n, ends)


def _at_the_end(b: Blocks, second: bool) -> int:
    """Trained whole, all parameters' gradients, of nothing that was kept but the input as the products read it: it, the
    gradients of the layer's output and input, and those of q, k and v."""
    here = 3 * b.shape.hidden_size + b.shape.query_size + 2 * b.shape.key_value_size
    return b.w * b.n * here + gradient_bytes(b.shape, b.setup, second)


def gradient_bytes(shape: ModelShape, setup: Setup, second: bool) -> int:
    """Of the trainable parameters of one layer of a kind."""
    if not setup.adapters:
        return setup.width * shape.layer_parameters(second)
    adapters = shape.layer_lora_parameters(setup.lora_rank, setup.lora_targets, setup.dora, second)
    beyond = (4 - setup.width) * sum(m.outputs for m in shape.adapted(setup.lora_targets, second)) * setup.dora
    return setup.width * (adapters + saved.layer_parameters(shape.view(second), setup.modules_to_save)) + beyond
