"""A whole training step or evaluation batch on a replay tape: its peak by component, and its work.

Of layers that are alike a few are replayed one by one (alike.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial

from loadmaster.preflight.alike import HEAD_LAYERS, Alike, Kind, Place, places, stand_in
from loadmaster.preflight.attending import attention_blocks
from loadmaster.preflight.backward import gradient_bytes, in_backward
from loadmaster.preflight.blocks import Blocks, Weights
from loadmaster.preflight.compiled import forward_bytes, kept_bytes
from loadmaster.preflight.graph import Leaf, Storage, Tensor
from loadmaster.preflight.layers import chunked_loss, decoder_layer, embed, gather, preference_loss
from loadmaster.preflight.replay import Tape, Work
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.units import Units

PHASES = ("loss", "head", "layers", "first", "embedding", "end")
"""Of a training step: forward up to the loss's own backward function; what lies between the loss and the layers; the
backward passes of the layers but the first two; those of these; of the embedding; and when all is done. A phase begins
when a gradient gets there, so where nothing is trained below the one before it goes on."""


@dataclass(frozen=True)
class Replayed:
    peak: int
    """Bytes besides weights, optimizer states and gradients that were there before the micro-batch."""
    at_peak: dict[str, int]
    """The same by component."""
    work: Work
    """Of the micro-batch, all layers."""
    phases: dict[str, dict[str, int]]
    """The peak of each of PHASES by component, in a training step."""


def replay_key(setup: Setup, keep: bool) -> Setup:
    """The setup with all that does not change a replay set to one value, so that replays are shared.

    keep: gradients of an earlier micro-batch are there.
    """
    sharded = setup.shards > 1
    return replace(
        setup,
        optimizer=setup.optimizer if setup.in_backward else "",
        master_weights=setup.master_weights and setup.in_backward,
        sharding="zero1" if setup.stage == 1 else "fsdp" if sharded else "none",
        replicas=setup.replicas if sharded else 1,
        reshard_after_forward=not setup.keeps_weights,
        offload="all" if sharded and setup.offload == "all" else "none",
        gradient_accumulation_steps=2 if keep else 1,
        forwards=0,
        world_size=setup.world_size if sharded else 1,
        gpus_per_node=1,
    )


@cache
def training_step(shape: ModelShape, setup: Setup, in_place: bool = True, made: float = 0.0) -> Replayed:
    """Forward and backward of one micro-batch; every token trained, so the loss is as large as it can be.

    made: bytes of optimizer states that an element gets when it is stepped in the backward pass, the first time.
    """
    # Sharded gradients meet those of an earlier micro-batch after they were reduced, in units.py.
    accumulated = setup.gradient_accumulation_steps > 1 and not setup.shards > 1
    tape = Tape(in_place)
    tape.widens_gradients = setup.stage == 1 and setup.width < 4
    b = Blocks(tape, shape, setup, accumulated)
    if b.stepping is not None:
        b.stepping.made = made
    tape.enter("loss")
    loss, done, units = _forward(b, before=_reference(b))
    box = [tape.alloc(4)]
    node = loss.node
    del loss
    tape.backward(node, box)
    units.reduce_rest()
    if b.stepping is not None:
        b.stepping.finish()
    tape.enter("end")
    tape.enter("")
    most = max(tape.phases.values(), key=lambda at: sum(at.values()))
    return Replayed(sum(most.values()), most, done(tape.work), tape.phases)


def _reference(b: Blocks) -> bool:
    """DPO's and KTO's first pass: the base without its adapter, of which only the answers' log-probabilities stay.
    Says whether there is one.

    Its work is counted by Setup.forwards (speed.py). Where all weights are trained it comes before training, and KTO's
    first pass is of the model itself.
    """
    if b.setup.passes_first:
        with b.tape.gradients(False):
            _forward(b)
        b.tape.work = Work()
    return b.setup.passes_first


def evaluation_batch(shape: ModelShape, setup: Setup, in_place: bool = True) -> Replayed:
    """The loss of one micro-batch without gradients."""
    return _evaluation_batch(shape, replay_key(replace(setup, kept_layers=0), keep=False), in_place)


@cache
def _evaluation_batch(shape: ModelShape, setup: Setup, in_place: bool) -> Replayed:
    tape = Tape(in_place)
    b = Blocks(tape, shape, setup, False)
    with tape.gradients(False):
        # Of sharded weights the first batch gathers some, and others find them whole: either may need more.
        if before := setup.passes_first or setup.shards > 1:
            _forward(b)
            tape.work = Work()
        loss, done, _ = _forward(b, before)
    del loss
    tape.top()
    return Replayed(tape.peak, dict(tape.at_peak), done(tape.work), {})


def _places(b: Blocks) -> tuple[tuple[Place, ...], dict[Alike, Kind]]:
    """The decoder layers that are replayed, and what is known of each kind of them."""
    shape, setup = b.shape, b.setup
    first_kept = shape.layers - setup.layers_kept(shape)
    each = [[Alike(second, kind) for second in (False, True)] for kind in (setup.checkpointing, "none")]
    layers = tuple(each[i >= first_kept][second] for i, second in enumerate(shape.seconds))
    found = places(layers, setup.shards > 1 or setup.in_backward)
    skipped = Counter(alike for place in found for alike in place.skipped)
    return found, {alike: _kind(b.of_kind(alike.second), alike, skipped[alike]) for alike in dict.fromkeys(layers)}


def _kind(b: Blocks, alike: Alike, skipped: int) -> Kind:
    """b: of that kind."""
    kept = ((kept_bytes(b.shape, b.setup, alike.second) if b.setup.compiled else None) or 0) * b.n
    inside = in_backward(b, *alike, kept) if kept else 0
    return Kind(b, alike, skipped, kept, inside)


def _forward(b: Blocks, before: bool = False) -> tuple[Tensor, Callable[[Work], Work], Units]:
    """(loss, what the work of the replayed layers makes of all, what is sharded).

    before: whether a pass without gradients came before.
    """
    tape, shape = b.tape, b.shape
    units = Units(b, before)
    units.start()
    size = b.w * shape.embedding_parameters
    if shape.tied:
        table = head = b.module(size, "embed_tokens", "lm_head", uses=2)
    else:
        table, head = b.module(size, "embed_tokens"), b.module(size, "lm_head")
    b.blocks = attention_blocks(b)
    ids = tape.alloc(8 * b.n)
    x = embedded = _entering(b, embed(b, table, ids), "embedding")
    units.embedded()
    positions = tape.alloc(8 * b.n)
    width = 4 if shape.wide else b.w
    each = width * 2 * b.n * shape.rotary_fraction
    if shape.global_at:
        rotary = {second: tape.alloc(each * shape.view(second).head_dim) for second, _ in shape.layer_kinds}
    else:
        rotary = dict.fromkeys((False, True), tape.alloc(each * shape.head_dim * _rotary_sets(shape)))
    _stepped_alone(b, tape.leaves)
    tables = {"embedding": [table], "head": [head] * (not shape.tied)}
    units.outside = {name: [each.node for each in found if each.node] for name, found in tables.items()}
    found, kinds = _places(b)
    for index, place in enumerate(found):
        kind = kinds[place.alike]
        own, second, checkpointing = kind.b, *place.alike
        if index == HEAD_LAYERS:
            x = _entering(b, x, "first")
        if place.skipped:
            x = stand_in(b, x, [kinds[alike] for alike in place.skipped])
            x = units.skip(x, place.skipped[0].second, place.skipped[-1].second, second)
        activations, first = tape.by_tag["activations"], len(tape.leaves)
        if place.measures:
            before, work = tape.live - units.passing, copy(tape.work)
            x = kind.mark(x, "finished")
        weights = own.layer_weights(second, rotary[second])
        if b.stepping is not None and not units.sharded:
            b.stepping.group(tape.leaves[first:])
        layer = _layer(own, weights, second, positions)
        less = kind.less
        tape.correct(-less)
        x = kind.leave(units.begin(x, index, second, place.following))
        entered = [x.storage] if kind.kept and checkpointing in ("none", "selective") and tape.enabled else []
        checkpointed = checkpointing != "none" and tape.enabled
        inside = forward_bytes(own.shape, b.setup, second) * b.n if entered and kind.inside else 0
        # The backward code of selective checkpoints has more at once than their forward code.
        hidden = inside or (kind.inside and checkpointing == "selective" and tape.enabled)
        if hidden:
            tape.hide()
        x = tape.enter_layer(x) if b.setup.compiled else x
        how = checkpointing == "selective", checkpointing == "offload"
        x = tape.checkpoint(layer, x, *how) if checkpointed else layer(x)
        x = tape.leave_layer(x) if b.setup.compiled else x
        eager = tape.by_tag["activations"] - activations + less
        kind.less = eager - kind.kept if entered else 0
        tape.correct(less - kind.less)
        if hidden:
            tape.show()
        if inside:
            tape.alloc(inside)
        x = units.end(kind.enter(x, entered), index, tape.leaves[first:])
        del entered
        if place.measures:
            x = kind.mark(x, "started")
            _measure(kind, units, tape.live - units.passing - before, tape.work.plus(work, -1.0))
    x = _entering(b, x, "layers")
    norm = b.module(b.w * shape.hidden_size, "norm")
    units.outside["norm"] = [norm.node] if norm.node else []
    _stepped_alone(b, units.outside["norm"])
    x = b.norm(x, norm, b.n)
    # The decoder's own variables last as long as it runs.
    del weights, layer, rotary, positions, ids, embedded
    rows = b.setup.tokens - b.setup.micro_batch_size  # the last token of a row predicts nothing
    x = _entering(b, gather(b, b.slice(x, 1.0), rows), "head")
    loss = chunked_loss if b.setup.objective == "sft" else preference_loss
    return units.finish(loss(b, units.enter_head(x), head, rows)), partial(_total, tuple(kinds.values())), units


def _measure(kind: Kind, units: Units, stays: int, forward: Work) -> None:
    """What each skipped layer of the kind keeps and gets, of the one that has just run forward."""
    b, second = kind.b, kind.second
    trained = gradient_bytes(b.shape, b.setup, second)
    gradients = 0 if b.accumulated or b.stepping is not None else trained * (1 + b.tape.widens_gradients)
    kind.stays, kind.forward = stays, forward
    kind.gradients = units.shard_gradients(second) if units.sharded else gradients
    kind.stepped = (units.trained_shard(second) if units.sharded else trained) // b.w


def _total(kinds: tuple[Kind, ...], work: Work) -> Work:
    """Of all layers, where `work` is of the replayed ones."""
    for kind in kinds:
        work = kind.total(work)
    return work


def _stepped_alone(b: Blocks, leaves: list[Leaf]) -> None:
    if b.stepping is not None and b.setup.shards == 1:
        for leaf in leaves:
            b.stepping.group([leaf])


def _layer(b: Blocks, weights: Weights, second: bool, positions: Storage) -> Callable[[Tensor], Tensor]:
    """One layer as a function of its input; a checkpoint keeps all its arguments, the position ids too."""

    def layer(x: Tensor, positions: Storage = positions) -> Tensor:
        return decoder_layer(b, weights, x, second and bool(b.shape.experts))

    return layer


def _entering(b: Blocks, x: Tensor, phase: str) -> Tensor:
    """x; in the backward pass, a phase begins where its gradient is made."""
    return b.tape.on_gradient(x, partial(b.tape.enter, phase))


def _rotary_sets(shape: ModelShape) -> int:
    """Some turn local and global layers at different rates."""
    return len(set(shape.windows)) if shape.family in ("gemma3_text", "gemma4_text", "olmo3") else 1

