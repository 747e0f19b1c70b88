"""The least that a setup needs on one GPU: quick to say, without a replay, and it rules most plans out.

Never more than is needed (tests/preflight/test_memory.py): what is always there, and the part of a micro-batch's
activations, gathered weights and gradients that no order of operations can do without.
"""

from __future__ import annotations

from loadmaster.preflight.backward import gradient_bytes
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.memory import context_bytes, resident, state_bytes
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import units, whole


def least_bytes(shape: ModelShape, hardware: Hardware, setup: Setup) -> float:
    """Weights, states and what layers keep at least."""
    weights, gradients, local = resident(shape, setup)
    inputs = max(_kept_bytes(shape, setup, 0) + _gathered_bytes(shape, setup), _reducing_bytes(shape, setup))
    if setup.stage:
        return inputs if hardware.is_cpu or setup.offload == "all" else weights + inputs
    before = gradients if setup.gradient_accumulation_steps > 1 else 0.0  # else they come as inputs go
    if hardware.is_cpu:
        return weights + state_bytes(setup) * local + before + inputs
    if setup.offload == "all":
        return context_bytes(hardware) + inputs
    states = 0.0 if setup.states_on_host else state_bytes(setup) * local
    return weights + states + max(before + inputs, gradients) + context_bytes(hardware)


def _gathered_bytes(shape: ModelShape, setup: Setup) -> int:
    """Of whole units at least, where all layers have run forward: all of them, or the root and either what a layer's
    backward pass has or the head, with the buffer that it was copied out of and, trained, its gradient."""
    if setup.shards == 1:
        return 0
    if setup.keeps_weights:
        return whole(shape, setup).gathered
    head, at_loss = units(shape, setup).head, 0
    if head:
        trained = setup.trains("lm_head") and setup.objective == "sft"
        gradient = (4 + setup.width) * shape.embedding_parameters  # summed in fp32 (models/loss.py), and cast
        at_loss = units(shape, setup).root.gathered + 2 * head.gathered + trained * gradient
    return max(at_loss, _in_backward_bytes(shape, setup))


def _in_backward_bytes(shape: ModelShape, setup: Setup) -> int:
    """Of whole units in a layer's backward pass: the root, the layer's parameters and the buffer of the one before it
    (units.py)."""
    layers, root, *_ = units(shape, setup)
    return root.gathered + min(2, shape.layers) * min(layers[second].gathered for second, _ in shape.layer_kinds)


def _reducing_bytes(shape: ModelShape, setup: Setup) -> int:
    """At least, where the last layer but one has run backward: the same, with its own gradients, and those of the last
    one in the buffer of their reduction."""
    if setup.shards == 1 or setup.keeps_weights or shape.layers < 3:
        return 0
    layers = units(shape, setup).layers
    reduced = min(layers[second].reduced for second, _ in shape.layer_kinds)
    own = min(gradient_bytes(shape, setup, second) for second, _ in shape.layer_kinds)
    return _kept_bytes(shape, setup, 2) + _in_backward_bytes(shape, setup) + reduced + own


def _kept_bytes(shape: ModelShape, setup: Setup, done: int) -> int:
    """For the backward pass of all layers but the last `done`: their inputs; where nothing is recomputed, attention's
    queries, keys, values and results as well, and a dense layer's gate and what it gates. The first layer may have
    nothing to train before them."""
    each, layers = setup.width * setup.tokens, max(0, shape.layers - done)
    inputs = 0 if setup.checkpointing == "offload" else each * shape.hidden_size * layers
    if setup.checkpointing != "none":
        return inputs
    each_layer = min(view.query_size + view.key_value_size for view, _ in shape.views)
    attention = 2 * each_layer * max(0, layers - 1)
    between = (1 + shape.gated) * shape.intermediate_size
    return inputs + each * (attention + between * max(0, shape.dense_layers - done - 1))
