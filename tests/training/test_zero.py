"""ZeRO's edges: rows that are cut between ranks, steps that are left out, plans that DeepSpeed does not follow."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import moe

from loadmaster.errors import ConfigError
from loadmaster.models import recompute
from loadmaster.training import flat, zero, zero_patches
from loadmaster.training.flat import Cut, FlatPlaced
from tests.training.parity import plan
from tests.training.test_parity import case, model  # noqa: F401  (a fixture)
from tests.training.worlds import spawn

SPREADS = [("zero1", "none"), ("zero2", "optimizer"), ("zero3", "none"), ("zero3", "all")]


@pytest.mark.parametrize(
    ("shape", "bounds"),
    [
        ((4, 6), (0, 9, 18, 24)),  # two rows are cut
        ((2, 12), (0, 4, 8, 24)),  # one row is on three ranks, and one rank has no first element of any
        ((7,), (0, 3, 3, 7)),  # a rank without elements
        ((3, 2, 5), (0, 0, 17, 30)),
    ],
)
def test_rows_cut_between_ranks_are_put_together_and_read_back(shape, bounds, monkeypatch):
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    parameter, ranks = nn.Parameter(whole.clone()), len(bounds) - 1
    placed, copies = [], []
    for rank in range(ranks):
        part = whole.view(-1)[bounds[rank] : bounds[rank + 1]]
        placed.append(FlatPlaced(rank, ranks, True, lambda p: p))
        placed[-1].enter(parameter, Cut(whole.shape, bounds), lambda part=part: part)
        copies.append({"weights/w": placed[-1].copy(parameter, part)} if part.numel() else {})
    given = []

    def take(mine):
        given.append(mine)
        raise StopIteration

    monkeypatch.setattr(flat, "exchange", take)
    for rank in range(ranks):
        with pytest.raises(StopIteration):
            placed[rank].complete(copies[rank])
    written = torch.full(shape, torch.nan)
    for rank in range(ranks):
        monkeypatch.setattr(flat, "exchange", lambda mine, rank=rank: [each[rank] for each in given])
        for rows in placed[rank].complete(copies[rank]).values():
            first = rows.offsets[0]
            assert written[first : first + len(rows.part)].isnan().all(), "written twice"
            written[first : first + len(rows.part)] = rows.part
    assert torch.equal(written, whole)
    for rank in range(ranks):
        if not copies[rank]:
            continue
        rows = placed[rank].empty(parameter, torch.float32)
        rows.part.copy_(whole[rows.offsets[0] : rows.offsets[0] + len(rows.part)])
        assert torch.equal(placed[rank].filled(parameter, rows), placed[rank].part(parameter))
        assert placed[rank].holds(parameter, lambda start, end: whole[start:end])
        assert not placed[rank].holds(parameter, lambda start, end: whole[start:end] + 1)


def test_without_deepspeed_zero_is_refused_with_the_remedy_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    zero.refuse_missing_deepspeed(plan(case("any", "full", "fsdp", 2)))
    with pytest.raises(ConfigError, match=r"pip install 'deepspeed") as raised:
        zero.refuse_missing_deepspeed(plan(case("any", "full", "zero3", 2)))
    assert "sharding=fsdp" in str(raised.value)


def test_a_bias_is_in_what_a_selective_checkpoint_makes_again_once(monkeypatch):
    """Qwen 2 under zero3: losses were right, and gradients of all that comes before a biased layer were not."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    zero.add_biases_once()
    monkeypatch.setattr(recompute, "WIDE", 4)
    weight, bias = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    x = torch.randn(1, 3, 4, requires_grad=True)

    def gradients(linear, run):
        out = run(lambda x: torch.tanh(linear(x, weight, bias)), x)
        return torch.autograd.grad(out.square().sum(), (x, weight, bias))

    kept = gradients(zero3_linear_wrap, partial(checkpoint, use_reentrant=False, context_fn=recompute._contexts))
    plain = gradients(nn.functional.linear, lambda layer, x: layer(x))
    for found, right in zip(kept, plain, strict=True):
        torch.testing.assert_close(found, right)


def test_a_frozen_linear_keeps_no_input_for_its_backward_pass():
    """LoRA on some linears under zero3, without checkpoints: inputs of the others took memory that was not planned."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    zero_patches.keep_no_input_of_what_is_frozen()
    weight, x = torch.randn(4, 4), torch.randn(1, 3, 4, requires_grad=True)
    out = zero3_linear_wrap(x, weight)
    assert out.grad_fn.saved_tensors[0] is None
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad((x @ weight.t()).sum(), x)[0])
    assert zero3_linear_wrap(x, weight.requires_grad_()).grad_fn.saved_tensors[0] is not None


def test_experts_that_are_cut_again_are_not_whole_to_the_backward_pass(monkeypatch):
    """Of Mixtral under zero3, without checkpoints, the experts of all layers were whole on every GPU."""
    monkeypatch.setattr(moe, "_grouped_linear", moe._grouped_linear)
    x, ends = torch.randn(20, 16), torch.tensor([7, 7, 20], dtype=torch.int32)
    weight, gone = nn.Parameter(torch.randn(3, 32, 16)), []

    def gradients(cut: bool) -> tuple[torch.Tensor, ...]:
        into = x.clone().requires_grad_()
        out = moe._grouped_linear(into, weight, ends)
        if cut:
            whole = weight.detach().clone()
            weakref.finalize(weight.untyped_storage(), gone.append, True)
            weight.data = torch.empty(0)  # as DeepSpeed does after a module has run, and before it runs backward
            assert gone == [True]
            weight.data = whole
        return out, *torch.autograd.grad(out, (into, weight), torch.ones_like(out))

    expected = gradients(cut=False)
    weight.ds_id = 0
    zero_patches.keep_experts_cut()
    assert all(map(torch.equal, gradients(cut=True), expected))
    weight.data = weight.data.bfloat16()
    out = moe._grouped_linear(x, weight, ends)  # of a float32 input, as transformers takes it
    assert torch.autograd.grad(out, weight, torch.ones_like(out))[0].dtype == torch.bfloat16


def test_only_matrices_decay_and_an_adapters_b_may_have_a_rate_of_its_own():
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(0))]
    parameters[1].ds_shape = torch.Size([4, 5])  # cut by zero3
    vector = nn.Parameter(torch.zeros(3))
    from loadmaster.config.schema import OptimizerConfig

    named = [("q.lora_A.w", parameters[0]), ("q.lora_B.w", parameters[1]), ("norm", vector)]
    made = zero.adamw(named, dataclasses.replace(OptimizerConfig(), weight_decay=0.1), 16.0).param_groups
    found = [(len(group["params"]), group["weight_decay"], group["lr_ratio"]) for group in made]
    assert found == [(1, 0.1, 1), (1, 0.1, 16), (1, 0, 1)]


@pytest.fixture(scope="module")
def edges(tmp_path_factory, model):  # noqa: F811
    folder = tmp_path_factory.mktemp("zero")
    cases = [case(f"{s}-{o}", "full", s, 2, offload=o, checkpointing="full") for s, o in SPREADS]
    placed = [{**c, "model": str(model / "odd"), "out": str(folder / f"{c['name']}.json")} for c in cases]
    spawn(folder, "edges", placed, 2, module="tests.training.zero_rank")
    return {c["name"]: json.loads((folder / f"{c['name']}.json").read_text()) for c in cases}


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"{s}-{o}" for s, o in SPREADS])
def test_a_step_that_is_left_out_leaves_no_trace(edges, name):
    assert len(edges[name]["good"]) == 3 and all(map(math.isfinite, edges[name]["good"]))
    assert edges[name]["left_out"] == pytest.approx(edges[name]["good"], rel=1e-6)


@pytest.mark.parametrize("name", [f"{s}-{o}" for s, o in SPREADS])
def test_a_plan_that_deepspeed_does_not_follow_stops_the_run(edges, name):
    said = edges[name]["said"]
    assert len(said) == (3 if name.startswith("zero3") else 2), said
    assert all(f"the plan says sharding={name.split('-')[0]} offload=" in each for each in said[:-1])
    assert "DeepSpeed does stage" in said[-1]


@pytest.mark.parametrize("name", [f"{s}-{o}" for s, o in SPREADS if s == "zero3"])
def test_an_evaluation_batch_leaves_no_layer_whole(edges, name):
    """The last two were kept for a backward pass, beside the first two of the next batch: more than the plan counts."""
    assert edges[name]["whole"] == 0


@pytest.mark.parametrize("name", [f"{s}-{o}" for s, o in SPREADS if s == "zero3"])
def test_deepspeed_keeps_nothing_of_a_backward_pass_or_of_a_model_that_is_gone(edges, name):
    """Of checkpointed layers its list of running modules grew with each micro-batch, and the weights before training
    stayed while those after it were evaluated."""
    assert edges[name]["kept"] == [0, 0]
