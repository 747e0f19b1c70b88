"""The optimizer inside the backward pass takes the steps it would have taken after it, with few gradients at a time."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from loadmaster.config.schema import OptimizerConfig
from loadmaster.errors import ConfigError, TrainingFailed
from loadmaster.models import compiled
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.training.display import Display
from loadmaster.training.in_backward import BackwardOptimizer
from loadmaster.training.loop import train
from loadmaster.training.metrics import read_metrics
from loadmaster.training.session import make_session, refuse_unbuilt
from loadmaster.training.stop import StopSignal
from loadmaster.training.world import World
from tests.training.test_loop import JOB, PLAN, rows

UNCLIPPED = dataclasses.replace(JOB, optimizer=OptimizerConfig(lr=1e-3, max_grad_norm=0.0, weight_decay=0.1))
WHOLE = dataclasses.replace(PLAN, micro_batch_size=4, gradient_accumulation_steps=1)


@pytest.fixture(scope="module")
def tiny(few_words):
    return few_words


def trained(tiny, folder, in_backward: bool, job=UNCLIPPED, **changed):
    plan = dataclasses.replace(WHOLE, optimizer_in_backward=in_backward, **changed)
    session, _ = train(
        job, plan, SimpleNamespace(train=rows(), validation=None), load_tokenizer(tiny), tiny, folder, "hash",
        lambda session, stopping: None, StopSignal(), Display(Console(quiet=True)),
    )
    figures = [(row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]
    return session, figures, [parameter.detach().clone() for _, parameter in session.trained]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        pytest.param({"method": "lora"}, marks=pytest.mark.slow),
        pytest.param({"activation_checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param({"activation_checkpointing": "offload"}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16", "master_weights": True}, marks=pytest.mark.slow),
        {"precision": "bf16", "optimizer": "adamw_8bit"},
        pytest.param({"precision": "bf16", "optimizer": "adamw_bf16"}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16", "optimizer": "adafactor"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adafactor"}, marks=pytest.mark.slow),
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_that_would_follow_the_backward_pass(tiny, tmp_path, monkeypatch, changed):
    """Equal to the last bit: losses and weights of six steps. The norm is a sum in another order."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # all of compiling but the C++ compiler
    torch._dynamo.reset()
    _, figures, weights = trained(tiny, tmp_path / "after", False, **changed)
    session, stepped, others = trained(tiny, tmp_path / "inside", True, **changed)
    assert isinstance(session.optimizer, BackwardOptimizer) and len(figures) == len(stepped) == 6
    for (loss, norm), (other, other_norm) in zip(figures, stepped, strict=True):
        assert loss == other and norm == pytest.approx(other_norm, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_no_more_gradients_are_there_than_those_of_two_layers(tiny):
    session = make_session(UNCLIPPED, dataclasses.replace(WHOLE, optimizer_in_backward=True), World(), 0, tiny)
    largest, held = 0, {}
    for _, parameter in session.trained:
        parameter.register_post_accumulate_grad_hook(lambda p: held.__setitem__("now", gradients()))

    def gradients() -> int:
        nonlocal largest
        size = sum(p.grad.numel() for _, p in session.trained if p.grad is not None)
        largest = max(largest, size)
        return size

    picked = [rows()[i] for i in range(4)]
    session.gradients(session.split(picked), 100, 1e-3)
    groups = sorted(sum(p.numel() for p in bucket.parameters) for bucket in session.optimizer.buckets)
    assert 0 < largest <= sum(groups[-2:]) < sum(groups)
    assert gradients() == 0


def test_weights_and_states_go_with_the_session(tiny):
    session = make_session(UNCLIPPED, dataclasses.replace(WHOLE, optimizer_in_backward=True), World(), 0, tiny)
    session.gradients(session.split([rows()[0]]), 100, 1e-3)
    left = [weakref.ref(parameter) for _, parameter in session.trained]
    left += [weakref.ref(state) for state in session.optimizer.state()[0].values()]
    del session
    gc.collect()
    assert not any(each() is not None for each in left)


def test_a_layer_whose_gradients_are_not_finite_keeps_its_weights(tiny):
    session = make_session(UNCLIPPED, dataclasses.replace(WHOLE, optimizer_in_backward=True), World(), 0, tiny)
    before = {name: parameter.detach().clone() for name, parameter in session.trained}
    spoiled = next(p for n, p in session.trained if "layers.0." in n and "down_proj" in n)
    spoiled.register_hook(lambda gradient: gradient.fill_(torch.nan))
    loss, norm = session.gradients(session.split([rows()[0]]), 100, 1e-3)
    assert torch.isfinite(loss) and not torch.isfinite(norm)
    for name, parameter in session.trained:
        assert torch.equal(parameter, before[name]) == ("layers.0." in name), name


def test_the_end_of_a_run_says_which_layers_were_stepped(tiny, tmp_path, monkeypatch):
    from loadmaster.training import loop
    from loadmaster.training.rehearsal import Rehearsed

    monkeypatch.setattr(loop, "rehearse_run", lambda *_: Rehearsed(0.0, 0.0, 0.0, seconds=0.0))
    made = loop.make_session

    def spoilt(*arguments):
        session = made(*arguments)
        next(p for n, p in session.trained if "layers.0." in n).register_hook(lambda g: g.fill_(torch.inf))
        return session

    monkeypatch.setattr(loop, "make_session", spoilt)
    with pytest.raises(TrainingFailed, match="layers whose own gradients were finite were stepped"):
        trained(tiny, tmp_path, True)


def test_a_second_micro_batch_in_a_step_is_an_error(tiny):
    plan = dataclasses.replace(WHOLE, optimizer_in_backward=True)
    session = make_session(UNCLIPPED, plan, World(), 0, tiny)
    with pytest.raises(RuntimeError, match="second micro-batch"):
        session.gradients(session.split([rows()[0]]) * 2, 100, 1e-3)
    for changed in ({"gradient_accumulation_steps": 2}, {"sharding": "ddp"}, {"offload": "optimizer"}):
        with pytest.raises(ConfigError, match="optimizer_in_backward"):
            refuse_unbuilt(dataclasses.replace(plan, **changed))


def test_gradients_without_a_rate_are_an_error(tiny):
    session = make_session(UNCLIPPED, dataclasses.replace(WHOLE, optimizer_in_backward=True), World(), 0, tiny)
    with pytest.raises(RuntimeError, match="begin"):
        session.backward(session.split([rows()[0]]), 100)
