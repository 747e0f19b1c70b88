"""Bytes that compiled decoder layers move in the kernels that the compiler makes of what lies between their products.

Such a kernel reads and writes whole tensors: hidden states [N, h], queries [N, q], keys or values [N, kv], what lies
between an MLP's matrices [N, f], or the same of the k experts of each token, [k N, h] and [k N, e]. So what it moves is
counted in passes over each of these, as they were read off the code that inductor 2.13 generates for an H100, kernel by
kernel: layers of each family are within 3% of it (tests/models/test_gpu_code.py). Products, attention, and casts to
fewer bits have kernels of their own, which the replay counts.
"""

from __future__ import annotations

from typing import NamedTuple

from loadmaster.preflight.blocks import MERGED
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import Matrix, ModelShape


class Passes(NamedTuple):
    hidden: int = 0
    query: int = 0
    key_value: int = 0
    between: int = 0
    sent: int = 0
    """Hidden states, once for each expert of a token."""
    between_sent: int = 0

    def numbers(self, shape: ModelShape, experts: bool) -> int:
        """Of one token."""
        k, between = shape.experts_per_token, 0 if experts else shape.intermediate_size
        sizes = shape.hidden_size, shape.query_size, shape.key_value_size, between, k * shape.hidden_size
        return sum(passes * size for passes, size in zip(self, (*sizes, k * shape.expert_size), strict=True))


NONE = Passes()


def kinds(shape: ModelShape, setup: Setup, experts: bool) -> list[tuple[bool, Passes, Passes]]:
    """(whether a layer is of this kind, how many passes more its forward code has, and its backward code)."""
    whole, fp8, late = not setup.adapters, setup.precision == "fp8", shape.query_key_norm and shape.gemma_norm
    selective, four = setup.checkpointing == "selective", shape.norms == 4
    return [
        # Norms, rotary embeddings, sums with the residual, the gated product; v's gradient is laid out for its own.
        (True, Passes(9, 2, 2, 3), Passes(8, 2, 4, 5)),
        (four, NONE, Passes(hidden=4 if fp8 and not whole else 8)),
        (shape.query_key_norm, NONE, Passes(query=1, key_value=1)),
        (shape.late_norm, Passes(query=1, key_value=1), NONE),  # after all products: a kernel before rotary's
        (shape.value_norm and not shape.keys_as_values, Passes(key_value=3), Passes(key_value=4)),
        (shape.value_norm and shape.keys_as_values, Passes(key_value=2), Passes(key_value=2)),  # read once for both
        (shape.norms_after, Passes(hidden=-3), Passes(hidden=1 if whole else 3)),  # what products read is given
        (shape.scaled_residual, NONE, Passes(hidden=3)),  # what products are given is written besides
        (shape.fused, NONE, Passes(query=2, key_value=2, between=2)),  # gradients of its parts are joined
        (shape.fused and shape.rotary_fraction < 1, Passes(query=2), Passes(query=2)),
        (not shape.gated, Passes(between=-2 if fp8 and whole else -1), Passes(between=-2)),
        (shape.attention_softcap, NONE, Passes(key_value=-2)),  # its kernel lays v's gradient out
        (shape.query_key_value_bias and not (whole or fp8 or shape.fused), Passes(key_value=2), NONE),  # v's is added
        # Tokens are gathered, masked three times, weighed and summed; Mixtral's weights are in fp32.
        (experts, Passes(sent=4, between_sent=7), Passes(hidden=5, sent=7, between_sent=5)),
        (experts and shape.family == "mixtral", NONE, Passes(sent=4)),
        (experts and whole, NONE, Passes(hidden=2, between_sent=3)),
        # Gradients of norms' weights, of which Gemma's and heads' are made in fp32, and of biases.
        (whole, NONE, Passes(hidden=12 if four else 5)),
        (whole and shape.query_key_norm, NONE, Passes(query=5, key_value=5) if late else Passes(query=3, key_value=3)),
        (whole and shape.query_key_value_bias, NONE, Passes(query=1, key_value=2)),
        # In FP8: sums and casts that have kernels of their own, and gradients in fp32 on their way.
        (fp8 and not whole and shape.query_key_norm, NONE, Passes(query=1, key_value=1)),
        (fp8 and not whole and four, Passes(hidden=2), NONE),
        (fp8 and whole and four, NONE, Passes(hidden=4)),
        (fp8 and whole and shape.norms_after, Passes(hidden=3), Passes(hidden=2)),
        (fp8 and whole and (shape.gelu or shape.fused), NONE, Passes(between=6)),
        # What magnitudes scale is kept as it was; what a selective checkpoint does not keep is made again.
        (setup.dora, Passes(3, 2, 3, 0), Passes(10, 4, 9, 1 + shape.gated)),
        (selective, NONE, Passes(query=2, key_value=2) if whole else Passes(2, 3, 6, 1 + shape.gated)),
    ]


LEADS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Matrices whose input may be another one's as well, and that one."""
SUMMED = {"v_proj": 2, "gate_proj": 1, "up_proj": 1, "gate_up_proj": 2, "qkv_proj": 3}
"""Where a kernel makes the sum of base and adapter: passes over it beyond the adapter's part being read. What is kept
is written, v too, and a fused one is read whole, or made, for each of its parts."""


def layer_bytes(shape: ModelShape, setup: Setup, second: bool = False) -> tuple[int, int]:
    """(of the forward code, of the backward code) for one token of one layer of a kind."""
    shape, experts = shape.view(second), second and bool(shape.experts)
    found = [kind for kind in kinds(shape, setup, experts) if kind[0]]
    forward, backward = (setup.width * sum(kind[at].numbers(shape, experts) for kind in found) for at in (1, 2))
    adapted = {m.name: m for m in shape.adapted(setup.lora_targets, experts)} if setup.adapters else {}
    joined = setup.precision != "fp8" and setup.lora_rank <= MERGED  # models/added.py
    sums = {} if joined and not setup.dora and setup.checkpointing != "selective" else dict(SUMMED)
    if sums and shape.query_key_norm:
        sums |= dict.fromkeys(("q_proj", "k_proj"), 1 if shape.gemma_norm else 2)
    if not shape.gated:
        sums["up_proj"] = 1  # what the ReLU gives is written, and kept
    if setup.checkpointing == "selective":
        sums |= {"gate_proj": 0, "up_proj": 0}
    for name, m in adapted.items():
        forward += setup.width * m.outputs * (1 + sums.get(name, 0))
        forward += bool(setup.lora_dropout) * m.inputs * (3 + 2 * (name == "o_proj"))
        backward += bool(setup.lora_dropout) * m.inputs
    trained = [m for m in (adapted.values() if setup.adapters else shape.matrices(experts)) if m.name != "o_proj"]
    if not setup.lora_dropout or setup.method == "qlora":  # otherwise kept as it is after dropout
        backward += setup.width * sum({_lead(m): m.inputs for m in trained}.values())  # made again
    backward += setup.width * _gradient_sums(shape, setup, experts, adapted, joined)
    return forward, backward


def _gradient_sums(shape: ModelShape, setup: Setup, experts: bool, adapted: dict[str, Matrix], joined: bool) -> int:
    """Numbers read of one token beyond one product, because an input's gradient is the sum of several; the gradient of
    a norm's weight reads them once more. That of attention's output is written where a kernel makes it."""
    sums = sum(m.inputs for m in shape.matrices(experts) if m.shared) * (1 if setup.adapters else 2)
    narrow = {name if setup.lora_dropout else _lead(m): m.inputs for name, m in adapted.items()}
    written = 0 if joined and not setup.lora_dropout else 2 * narrow.get("o_proj", 0)
    return sums + sum(narrow.values()) + written


def _lead(m: Matrix) -> str:
    return LEADS[m.name] if m.shared else m.name


def fused_bytes(shape: ModelShape, setup: Setup) -> int:
    """Of one token in all passes of a micro-batch through all layers."""
    again = shape.layers - setup.layers_kept(shape) if setup.checkpointing in ("full", "offload") else 0
    each, total = {second: layer_bytes(shape, setup, second) for second, _ in shape.layer_kinds}, 0
    for layer in range(shape.layers):
        forward, backward = each[shape.is_second(layer)]
        total += forward * (1 + setup.forwards + (layer < again)) + backward
    return total
