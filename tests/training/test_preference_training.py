"""Preference objectives through the loop: what they learn, and that a split of the batch changes nothing."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from loadmaster.config.schema import BatchConfig, DataConfig, OptimizerConfig, PreferenceConfig
from loadmaster.data import collate, prepare
from loadmaster.errors import StoppedOnRequest
from loadmaster.evaluation import held_out
from loadmaster.models import compiled
from loadmaster.models.load import load_base
from loadmaster.models.preference import FIGURES, PreferenceLoss, answer_log_probs
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.training import loop, reference
from loadmaster.training.batches import losses, micro_batches
from loadmaster.training.display import Display
from loadmaster.training.loop import make_session, train
from loadmaster.training.metrics import read_metrics
from loadmaster.training.reference import FILE, Reference
from loadmaster.training.stop import StopSignal
from loadmaster.training.world import World
from tests.runs import finish
from tests.training.test_loop import JOB, PLAN

TICKETS = Path(__file__).parents[2] / "data" / "tickets"


def job_of(objective: str, **changes):
    return dataclasses.replace(
        JOB,
        data=DataConfig(path=str(TICKETS / "pairs_train.jsonl"), validation=None, format="preference", max_rows=8),
        objective=objective,
        preference=PreferenceConfig(beta=0.5),
        method="lora",
        sequence_length=256,
        batch=BatchConfig(4),
        max_steps=12,
        optimizer=OptimizerConfig(lr=1e-2, warmup_ratio=0.0, schedule="constant"),
        **changes,
    )


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOADMASTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny(few_words):
    return few_words


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return prepare(job_of("dpo"), tokenizer)


@pytest.fixture(autouse=True)
def not_asked(pairs, answers):
    pairs.train.reference = answers.train.reference = None


@pytest.fixture(scope="module")
def answers(tokenizer):
    """Twelve labelled answers in rows of two, nine of them desirable."""
    data = DataConfig(path=str(TICKETS / "labels_train.jsonl"), validation=None, max_rows=12)
    return prepare(dataclasses.replace(job_of("kto"), data=data), tokenizer)


@pytest.mark.parametrize(
    "objective", ["dpo", pytest.param("orpo", marks=pytest.mark.slow), pytest.param("kto", marks=pytest.mark.slow)]
)
def test_the_chosen_answers_come_to_be_preferred(tiny, pairs, tmp_path, objective):
    plan = dataclasses.replace(PLAN, method="lora", sequence_length=256)

    session, _ = train(
        job_of(objective),
        plan,
        pairs,
        load_tokenizer(tiny),
        tiny,
        tmp_path,
        "hash",
        lambda session, stopping: None,
        StopSignal(),
        Display(Console(quiet=True)),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    figures = held_out(session.model, pairs.train, 0, 4, "cpu", session.loss)
    assert figures["pairs"] == 8 and "perplexity" not in figures
    if objective == "dpo":  # policy and reference start as the same model
        assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and rows[0]["reward_margin"] == 0
        assert figures["loss"] < 0.5 and figures["reward_margin"] > 0.5 and figures["reward_accuracy"] > 0.8
        # Of a pair: the mean of a convex function of margins is at least that of their mean.
        assert figures["loss"] >= math.log1p(math.exp(-figures["reward_margin"])) > 0.01
    elif objective == "kto":
        assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5) and rows[0]["reward_margin"] == 0
        assert figures["loss"] < 0.45 and figures["reward_margin"] > 0.3 and figures["reward_accuracy"] > 0.8
    else:  # its loss is for the most part the likelihood of the chosen answers
        assert figures["loss"] < rows[0]["loss"] - 0.3


def trained_whole(tiny, pairs, folder, held_out=lambda session, stopping: None, stop=None, max_steps=12):
    plan = dataclasses.replace(PLAN, method="full", sequence_length=256)
    job = dataclasses.replace(
        job_of("dpo"), method="full", optimizer=OptimizerConfig(lr=1e-3, warmup_ratio=0.0), max_steps=max_steps
    )
    return train(
        job, plan, pairs, load_tokenizer(tiny), tiny, folder, "hash", held_out, stop or StopSignal(),
        Display(Console(quiet=True)),
    )


def test_where_all_weights_are_trained_the_reference_is_asked_once(tiny, pairs, tmp_path, monkeypatch):
    """And equals that of a second model, which is kept beside the first one and asked in each step."""
    session, _ = trained_whole(tiny, pairs, tmp_path / "asked")
    asked = read_metrics(tmp_path / "asked" / "metrics.jsonl")
    assert asked[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and abs(asked[0]["reward_margin"]) < 1e-4
    figures = held_out(session.model, pairs.train, 0, 4, "cpu", session.loss)
    assert figures["reward_margin"] > 0.5 and figures["reward_accuracy"] > 0.8
    known = load_file(tmp_path / "asked" / FILE)["train"]
    assert known.shape == (16,) and np.isfinite(known).all()

    kept = load_base(tiny, torch.float32, "cpu")
    with torch.no_grad():
        assert answer_log_probs(kept, collate(list(pairs.train), 0)).sums.numpy() == pytest.approx(known, abs=1e-4)
    monkeypatch.setattr(loop, "asked_once", lambda job, method: False)
    monkeypatch.setattr(PreferenceLoss, "_reference", lambda self, batch: _without_gradient(kept, batch))
    pairs.train.reference = None
    trained_whole(tiny, pairs, tmp_path / "beside")
    beside = read_metrics(tmp_path / "beside" / "metrics.jsonl")
    for name in ("loss", "grad_norm", "reward_margin"):
        assert [row[name] for row in asked] == pytest.approx([row[name] for row in beside], rel=1e-4, abs=1e-5)


def test_kto_of_all_weights_compares_with_what_was_asked_once(tiny, answers, tmp_path, monkeypatch):
    """As with a second model beside the first; of micro-batches of one row, where that takes others' answers from the
    row alone as well."""
    plan = dataclasses.replace(PLAN, method="full", sequence_length=256, micro_batch_size=1)
    session = make_session(dataclasses.replace(job_of("kto"), method="full"), plan, World(), 0, tiny)
    asked = Reference(tmp_path, "hash", answers, World(), "kto")
    assert asked.ask(session.loss, session.split, 1, lambda *_: None, lambda: False, range(len(answers.train)))
    assert load_file(tmp_path / FILE)["train"].shape == (12, 2) and np.isfinite(answers.train.reference).all()
    generator = torch.Generator().manual_seed(1)
    for _, parameter in session.trained:
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator)

    def figures():
        micro_batches = session.split(list(answers.train)[:4])
        return session.backward(micro_batches, 8).item(), dict(session.preference)

    loss, rewards = figures()
    kept = load_base(tiny, torch.float32, "cpu")
    monkeypatch.setattr(PreferenceLoss, "_reference", lambda self, batch: _without_gradient(kept, batch))
    answers.train.reference = None
    beside, theirs = figures()
    assert loss == pytest.approx(beside, rel=1e-5) and rewards == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    assert abs(rewards["reward_desirable"]) > 0.01


def _without_gradient(model, batch):
    with torch.no_grad():
        return answer_log_probs(model, batch).sums


def test_a_reference_that_was_asked_in_part_is_gone_on_with(tiny, pairs, tmp_path, monkeypatch):
    """Only of rows that the steps come to; what another run left, or a damaged file, is asked for anew."""
    monkeypatch.setattr(reference, "MICRO_BATCHES", 1)
    rows, forward = [], PreferenceLoss.forward

    def counting(self, batch, answers_only=False):
        rows.extend(batch.input_ids if answers_only else [])
        return forward(self, batch, answers_only)

    monkeypatch.setattr(PreferenceLoss, "forward", counting)
    stop, ask = StopSignal(), Reference.ask

    def until_two_are_done(self, loss, micro_batches, size, told, stopping, trained_on):
        def stops(split, done, wanted):
            assert (split, wanted) == ("train", 4)
            stop.requested = done >= 2

        return ask(self, loss, micro_batches, size, stops, stopping, trained_on)

    with monkeypatch.context() as patched, pytest.raises(StoppedOnRequest, match="what the model said so far is kept"):
        patched.setattr(Reference, "ask", until_two_are_done)
        trained_whole(tiny, pairs, tmp_path, stop=stop, max_steps=1)
    assert len(rows) == 2 and np.isfinite(load_file(tmp_path / FILE)["train"]).sum() == 4
    trained_whole(tiny, pairs, tmp_path, max_steps=1)
    assert len(rows) == 4 and np.isfinite(load_file(tmp_path / FILE)["train"]).sum() == 8
    trained_whole(tiny, pairs, tmp_path, max_steps=1)
    assert len(rows) == 4
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-3])
    trained_whole(tiny, pairs, tmp_path, max_steps=1)
    assert len(rows) == 8
    Reference(tmp_path, "another run's", pairs, World(), "dpo")
    assert np.isnan(pairs.train.reference).all()


def test_desirable_answers_rise_and_undesirable_ones_fall_without_pairs(tiny, answers, tmp_path):
    plan = dataclasses.replace(PLAN, method="lora", sequence_length=256)
    session, _ = train(
        job_of("kto"), plan, answers, load_tokenizer(tiny), tiny, tmp_path, "hash", lambda session, stopping: None,
        StopSignal(), Display(Console(quiet=True)),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5) and "reward_accuracy" not in rows[0]
    assert rows[0]["reward_desirable"] == rows[0]["reward_undesirable"] == rows[0]["reward_margin"] == 0
    figures = held_out(session.model, answers.train, 0, 4, "cpu", session.loss)
    assert figures.keys() == {"loss", "reward_desirable", "reward_undesirable", "reward_margin", "answers"}
    assert figures["answers"] == 12 and figures["loss"] < 0.47 and figures["reward_margin"] > 0.3
    # However the answers are batched, each counts once.
    assert held_out(session.model, answers.train, 0, 5, "cpu", session.loss)["answers"] == 12


def test_a_skipped_step_has_no_figures_and_the_run_goes_on(tiny, pairs, tmp_path, monkeypatch):
    calls, forward = [], PreferenceLoss.forward

    def first_step_diverges(self, batch, answers_only=False):
        calls.append(batch)
        loss = forward(self, batch)
        if len(calls) == 5:  # four of the calls are the rehearsal's
            self.figures *= math.nan
            return loss * math.nan
        return loss

    monkeypatch.setattr(PreferenceLoss, "forward", first_step_diverges)
    plan = dataclasses.replace(PLAN, method="lora", sequence_length=256, micro_batch_size=4)
    train(
        dataclasses.replace(job_of("dpo"), max_steps=2), plan, pairs, load_tokenizer(tiny), tiny, tmp_path, "hash",
        lambda session, stopping: None, StopSignal(), Display(Console(quiet=True)),
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    figures = ("loss", "reward_margin")
    assert [[row[name] is None for name in figures] for row in rows] == [[True, True], [False, False]]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_any_split_of_a_step_gives_the_same_gradients(tiny, pairs, answers, objective, monkeypatch):
    """Of kto's answers too, but for the move, which each micro-batch tells by itself."""
    monkeypatch.setattr(PreferenceLoss, "_moved", lambda self, batch: torch.tensor(0.4))
    plan = dataclasses.replace(PLAN, method="lora", sequence_length=256)
    session = make_session(job_of(objective), plan, World(), 0, tiny)
    for name, parameter in session.trained:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    rows = answers.train if objective == "kto" else pairs.train
    batch = [rows[i] for i in range(5)]
    count = sum(losses(row, objective) for row in batch)
    results = []
    for size, ranks in [(5, 1), (1, 1), (2, 1), (2, 3), (1, 8)]:
        session.optimizer.zero_grad()
        split = [micro_batches(batch, size, rank, ranks, 0, None) for rank in range(ranks)]
        loss, counted = 0.0, torch.zeros(FIGURES)
        for part in split:  # a rank each
            loss += session.backward(part, count).item()
            for micro_batch in part:
                with torch.no_grad():
                    session.loss(micro_batch)
                counted += session.loss.figures
        results.append((loss, [p.grad.clone() for _, p in session.trained]))
        assert counted[0] + counted[3] + counted[4] == count, "filled-up copies counted"
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for gradient, first in zip(gradients, results[0][1], strict=True):
            assert (gradient - first).norm() <= 1e-5 * first.norm() + 1e-9


@pytest.mark.slow
def test_compiled_layers_are_not_compiled_anew_when_the_adapter_goes_on_and_off(tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    losses = []
    for compiling in (False, True):
        plan = dataclasses.replace(PLAN, method="lora", sequence_length=256, compile=compiling)
        job = dataclasses.replace(job_of("kto"), max_steps=3)
        folder = tmp_path / str(compiling)
        _, outcome = train(
            job, plan, pairs, load_tokenizer(tiny), tiny, folder, "hash", lambda session, stopping: None, StopSignal(),
            Display(Console(quiet=True)),
        )
        assert outcome.recompilations == 0
        losses.append([row["loss"] for row in read_metrics(folder / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_train_py_learns_from_labels_and_says_what_it_held_out(few_words, tmp_path):
    done = finish(
        tmp_path, f"model.path={few_words}", "data=ticket_labels", "data.max_rows=12", "hardware=cpu", "method=lora",
        "sequence_length=256", "batch.global_size=4", "micro_batch_size=2", "max_steps=3", "stop_after=evaluate",
        "evaluation.max_rows=2", "evaluation.max_new_tokens=4", "tracker=none", "run_dir=run",
    )
    assert done.returncode == 0, done.stderr
    assert "rows read as unpaired" in done.stdout and "desirable and" in done.stdout
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3 and all("reward_desirable" in row and "reward_accuracy" not in row for row in rows)
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    before, after = figures["before"]["held_out"], figures["after"]["held_out"]
    assert before["answers"] == after["answers"] == 60
    assert before["loss"] == pytest.approx(0.5, abs=1e-6) and before["reward_margin"] == 0 != after["reward_margin"]
    assert figures["after"]["task"]["rows"] == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "per labelled answer; reward of desirable over undesirable" in page and "of a labelled answer" in page
