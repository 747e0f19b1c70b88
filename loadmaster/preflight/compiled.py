"""What a compiled decoder layer keeps for its backward pass: what the compiler's partitioner chose, family by family.

torch.compile cuts a layer's forward from its backward where least has to be kept, and makes the rest again inside fused
kernels (min-cut partitioning). Read off the compiled functions' saved tensors (tests/preflight/test_compiled_memory.py
does it again, on the meta device), a token of a layer in bf16 keeps

    2 h    for its input and the sum after attention (three, where a norm comes after the MLP)
    4      for each norm                            (1 / root mean square)
    4 dq + 4 dk + 4 heads                           (q and the output; k and v; logsumexp)
    2 dq + 2 dk + 4 heads + 4 key-value heads       with norms on q and k (8 where those are over all heads together)
    4 key-value heads                               with a norm on v, unless v is k before its norm
    2 dq + 2 dk                                     fused (Phi-3): v is a part of q, k and v, which stay whole
    2                                               the number that queries are multiplied with (Ministral 3)
    4 f                                             (gate and up; their product and the norms' outputs are made again)
    2 f                                             in its place, without a gate
    k (4 e + 2 h + 29) + 4 E                        in its place, of k of E experts of size e: gate and up, results,
                                                    places; the router's logits. Trained whole 2 k h more: their inputs
    2 r    for each adapter
    3      for each input of an adapter with dropout: the mask, and what is left of the input; over an nf4 base that is
           made again for q, o, gate (or up alone) and down, of which a byte stays
    2 h    where DoRA's magnitudes scale down's result, and 2 dq + 2 dk where q's and k's that no norm has kept; with
           four norms down's has been, and where q and k have norms as well, 4 dq if q, k and v are all scaled

A layer that is checkpointed selectively (models/recompute.py) keeps those products and attention as they come, and
makes again what is between: it keeps nothing of norms, those of q and k among them.

On an H100 a sketch of such an engine took 32.9 GiB (LoRA 8B, 2 x 2048), 23.2 over nf4, and 38.6 (full 3B, 4 x 2048), or
32.5 in FP8: benchmarks/reference_runs.py has them beside this. Fused kernels' own temporaries are not known.
"""

from __future__ import annotations

from functools import cache

from loadmaster.preflight import saved
from loadmaster.preflight.blocks import MERGED
from loadmaster.preflight.frozen import WIDE
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape

MADE_AGAIN = ("q_proj", "qkv_proj", "o_proj", "gate_proj", "gate_up_proj", "up_proj", "down_proj")
"""Matrices over nf4 whose adapter's input, after dropout, is not kept where it is no other one's before as well."""

PLACES = 29
"""Bytes of each expert that a token is sent to: three indices, whether it is one of this process, its weight."""

SPLIT = 64 * 188
"""Outputs below which the compiler may take sums over tokens in two passes: 64 for each processor of the card, of which
the one with most has 188 (RTX PRO 6000; an H100 132)."""


@cache
def kept_bytes(shape: ModelShape, setup: Setup, second: bool = False) -> int | None:
    """Of one token and layer of a kind; None where it is not known: fp32, norms trained beside an
    adapter, dropout or DoRA where norms come after attention and MLP, and selectively those of `_unseen`."""
    shape, experts = shape.view(second), second and bool(shape.experts)
    if setup.adapters and saved.layer_parameters(shape, setup.modules_to_save):
        return None
    if setup.precision == "fp32":
        return None
    if shape.estimate and "multimodal" not in shape.estimate:  # layers like none of those that were looked at
        return None
    if shape.norms_after and (setup.lora_dropout or setup.dora):  # not looked at
        return None
    selective = setup.checkpointing == "selective"
    if selective and _unseen(shape, setup):
        return None
    h, f, dq, dk = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size
    adapted = shape.adapted(setup.lora_targets, experts) if setup.adapters else ()
    kept = 2 * h * (3 if shape.norm_places[3] else 2) + 4 * dq + 4 * dk + 4 * shape.heads
    kept += 0 if selective else 4 * shape.norms
    if shape.query_key_norm and not selective:
        kept += 2 * dq + 2 * dk + 4 * (2 if shape.whole_norm else shape.heads + shape.key_value_heads)
    if shape.value_norm and not shape.keys_as_values:
        kept += 4 * shape.key_value_heads
    if shape.fused and not selective:
        kept += 2 * dq + 2 * dk
    kept += 2 * shape.scaled_query
    kept += 2 * setup.lora_rank * len(adapted)
    if experts:
        kept += shape.experts_per_token * (4 * shape.expert_size + 2 * h * (1 if setup.adapters else 2) + PLACES)
        kept += 4 * shape.experts
    else:
        kept += (4 if shape.gated else 2) * f
    if setup.dora:
        scaled = ("q_proj", "k_proj") * (not (shape.query_key_norm or selective)) + ("down_proj",) * (shape.norms == 2)
        kept += sum(2 * m.outputs for m in adapted if m.name in scaled)
        together = {"q_proj", "k_proj", "v_proj"} <= {m.name for m in adapted}
        kept += 4 * dq if together and shape.norms == 4 and shape.late_norm else 0
    if setup.lora_dropout and not selective:
        again = MADE_AGAIN if setup.method == "qlora" else ()
        kept += sum((1 if m.name in again and not m.shared else 3) * m.inputs for m in adapted)
    return kept


def _unseen(shape: ModelShape, setup: Setup) -> bool:
    """Layers whose code was not looked at under selective checkpointing, or keeps and makes other things."""
    narrow = min(m.inputs for m in shape.matrices(False)) < WIDE  # products that are made again
    norms = shape.norms_after or shape.whole_norm or shape.value_norm or shape.scaled_query or shape.scaled_residual
    fused = shape.fused and (setup.dora or not setup.adapters)
    between = shape.experts or fused or not shape.gated or (shape.gelu and not shape.norm_places[3])
    biases = shape.output_bias or shape.mlp_bias
    return bool(narrow or norms or between or biases or shape.keys_as_values)


def in_backward_bytes(shape: ModelShape, setup: Setup, second: bool = False) -> int:
    """What one token of a layer has at once in its backward pass, beyond what is kept and its output's gradient.

    Under adapters, at the kernel of the gated product: its gradient, and the gradients of gate and up, in bf16. Where
    down is adapted besides the product made again (not where gate and up are one matrix, nor with dropout, whose
    result was kept; over nf4, where dropout is done again, that as well), in FP8 the other product of the gradient,
    and the codes of both, and a GELU's in fp32 (with dropout up's gradient, where gate is adapted and up is not);
    beyond the highest rank that is merged the adapter's part of the gradient, which no product is added to. In FP8
    where down is as it is codes of both gradients, and up's gradient where it is adapted and gate is not; else a
    GELU's in fp32, and gate's beside it where that alone is adapted. Under DoRA these lie beside what its magnitudes
    have scaled (of rank 1, with gate's, beside the adapters' parts as well), and where sums over tokens are taken in
    two passes beside gate's gradient for its magnitudes, a GELU's twice (under dropout, where down is adapted as well,
    with up's or not at all). With a norm after the MLP its input is gone. Without a gate, where down is as it is or
    its input was kept, the gradient and its product. Trained whole: one product of the gradient, the product, and both
    gradients; in FP8 the first in bf16, of the others five codes, and a GELU's in bf16 and fp32; with a norm after the
    MLP the gradient before it, without one the output's gradient in FP8, turned (2.11 makes that first, 2.13 later).
    Without a gate there is one gradient less. Read off the code that inductor generates for a GPU (2.11 and 2.13, the
    larger; tests/models/test_gpu_code.py). Fused and trained whole: one product of the gradient, the gradient of gate
    and up, and attention's result laid out anew; in FP8 that gradient and its codes twice. Experts: `_of_experts`;
    trained whole in FP8, under DoRA or dropout, or in a layer without any of a model that has some, a layer is counted
    amply as an eager one."""
    f = shape.intermediate_size
    if shape.experts:
        seen = not (setup.lora_dropout or setup.dora) and (setup.adapters or setup.precision == "bf16")
        return _of_experts(shape, setup) if second and seen else 0
    if shape.fused and not setup.adapters:
        return 6 * f + 2 * shape.query_size if setup.precision == "bf16" else 8 * f
    turned = shape.hidden_size * (setup.precision == "fp8" and not shape.norm_places[3])
    if not setup.adapters and not shape.gated:
        return (4 if setup.precision == "bf16" else 5) * f + turned
    if not setup.adapters:
        products = 8 if setup.precision == "bf16" else 11 if shape.gelu else 7
        return products * f + turned + 2 * shape.hidden_size * shape.norm_places[3]
    names = {m.name for m in shape.adapted(setup.lora_targets)}
    dropped = bool(setup.lora_dropout) and setup.method != "qlora"  # an nf4 base's are made again
    if setup.checkpointing == "selective":
        return _selective_inside(shape, setup, names)
    if not shape.gated:
        again = "down_proj" in names and not dropped
        bytes_ = 6 + 2 * setup.dora if again else 2 + 4 * (setup.dora and "up_proj" in names)
        return (bytes_ + (setup.precision == "fp8")) * f
    bytes_, beside = 6, names & {"gate_proj", "up_proj"}
    if "down_proj" in names and setup.precision == "fp8":
        if dropped and shape.fused:
            bytes_ += 6 * ("gate_up_proj" not in names)
        else:
            bytes_ += 6 - 2 * shape.fused + 4 * (shape.gelu and not dropped)
        bytes_ += 2 * (dropped and not shape.gelu and beside == {"gate_proj"})
    elif setup.precision == "fp8":
        bytes_ += 2 * ("gate_up_proj" not in names)  # of both gradients the codes, too: torch 2.11 makes them at once
        if beside == {"up_proj"}:
            bytes_ += 2
        elif shape.gelu:
            bytes_ += 4 + 2 * (beside == {"gate_proj"})
    elif "down_proj" in names:
        bytes_ += 2 * (not shape.fused and (setup.dora or not dropped))
        bytes_ += 2 * (setup.lora_rank > MERGED and not (setup.dora or setup.lora_dropout))  # models/added.py
        bytes_ += 2 * (bool(setup.lora_dropout) and not dropped)
    if setup.dora and shape.fused and "gate_up_proj" in names:
        bytes_ += 10 if dropped else 4
    elif setup.dora:
        bytes_ += 2 * len(beside) * (2 if setup.lora_rank == 1 and "gate_proj" in names else 1)
        if f < SPLIT and "gate_proj" in names:
            bytes_ += 4 * ("up_proj" in names) if dropped and "down_proj" in names else 2 + 2 * shape.gelu
    return bytes_ * f - 2 * shape.hidden_size * shape.norm_places[3]


def _of_experts(shape: ModelShape, setup: Setup) -> int:
    """Each token is there once for each of its experts, whatever the routing. At the kernel that weighs their results'
    gradients: those (fp32 in Mixtral, whose weights are) and what comes of them; at that of the gated products, whose
    results are gone by then: their gradient and those of gate and up. Beside them those of the weights. Trained whole
    the products are made again before, and results' gradients and the input's stay."""
    h, e, k = shape.hidden_size, shape.expert_size, shape.experts_per_token
    weighing = (6 if shape.family == "mixtral" else 4) * h + 4
    if setup.adapters:
        return k * max(weighing, 6 * e - 2 * h + 4)
    return max(k * (weighing + 2 * e) + 2 * h + 4 * shape.experts, 8 * k * e + 4 * h)


def forward_bytes(shape: ModelShape, setup: Setup, second: bool) -> int:
    """What one token of a layer with experts has at once in its forward pass beyond what it keeps: the gated product,
    and its output, besides a product's result before that is kept; in FP8 or nf4 what attention's linears have comes
    before most that is kept. 0 where what is replayed counts."""
    if not (shape.experts and in_backward_bytes(shape, setup, second)):
        return 0
    return 2 * shape.experts_per_token * shape.expert_size + 4 * shape.hidden_size


def _selective_inside(shape: ModelShape, setup: Setup, names: set[str]) -> int:
    """Under adapters, where products are kept as they come: a sum of base and adapter is made again in each kernel that
    reads it, and the adapter's part of it lies there.

    In bf16 gate's part, and up's where a GELU or a product made again for down's adapter reads it, and for that both
    parts of its gradient, too, and the product that dropout is done to again; under DoRA of gate and up what their
    magnitudes scale, and more where sums over tokens are taken in two passes, and with dropout; with a norm after the
    MLP its input is gone, but not under DoRA. In FP8 the same beside codes, the gradient in fp32 (a GELU's always), and
    the MLP's input where gate, up or the output of attention is adapted, and with dropout three more of that; a norm
    after the MLP has its input made again. Beside a GELU's gate, where down is as it is, gradients of hidden size, and
    the gate's codes. Read off 2.11's code, some of it off 2.13's too; the last of a GELU's, in FP8, off one shape
    (Gemma 3 1B)."""
    gate, up, down, o = (name in names for name in ("gate_proj", "up_proj", "down_proj", "o_proj"))
    f, h, q, dropped = shape.intermediate_size, shape.hidden_size, shape.query_size, bool(setup.lora_dropout)
    if shape.fused:
        return _selective_fused(shape, "gate_up_proj" in names, down, o, dropped, setup.precision == "fp8")
    if setup.precision == "bf16":
        products = 6 + 2 * (gate + down + (up and (down or shape.gelu)) + (down and dropped))
        if setup.dora:
            passes = 2 * (gate and up) if shape.gelu else 4 * gate + 2 * up
            products += 2 * (gate + up) + passes * (f < SPLIT)
            if dropped:
                products += 2 * ((gate and up) + (down and (gate or up)))
                products += 4 * (gate and up != down) if shape.gelu else 2 * (gate and up and not down and f >= SPLIT)
        return products * f - 2 * h * (shape.norm_places[3] and not setup.dora)
    again = 6 * q * (o and dropped)
    if shape.gelu:
        products = 10 + 2 * down + 2 * (up and (down or not gate)) + 4 * (gate and down and not up)
        products += 2 * (down and dropped and not gate)
        return products * f + (2 + (2 if up else 6) * (gate and not down)) * h + again
    alone = down and dropped and not (gate or up)
    return (12 + 4 * down - 2 * (gate and not up) - 2 * alone) * f + 2 * h * (gate or up or o) + again


def _selective_fused(shape: ModelShape, gates: bool, down: bool, o: bool, dropped: bool, fp8: bool) -> int:
    """The same where gate and up are one matrix."""
    f, h, q = shape.intermediate_size, shape.hidden_size, shape.query_size
    if fp8:
        return (12 - 2 * gates + 4 * (gates and down)) * f + 2 * h * (gates or o) + (6 if dropped else 2) * q * o
    return (6 + 4 * gates + (6 + 4 * gates) * (down and dropped)) * f
