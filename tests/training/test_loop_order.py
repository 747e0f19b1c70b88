"""What the loop asks of whom, and in which order: on a session that trains nothing."""

from __future__ import annotations

import contextlib
import io
import math
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from rich.console import Console

from loadmaster.config.schema import CheckpointConfig
from loadmaster.data import packed_rows
from loadmaster.errors import StoppedOnRequest, TrainingFailed
from loadmaster.training import loop
from loadmaster.training.batches import longest_stretch
from loadmaster.training.display import Display
from loadmaster.training.loop import Training, train
from loadmaster.training.metrics import read_metrics
from loadmaster.training.rehearsal import Rehearsed
from loadmaster.training.start import Start
from loadmaster.training.stop import STARTED, StopSignal
from loadmaster.training.world import World
from tests.training.test_loop import JOB, PLAN, rows

FIGURES = {"count": 2, "gib": 0.0, "stall_s_mean": 0.0, "stall_s_max": 0.0, "write_s_mean": 0.0, "behind": True}
SHORT = replace(JOB, max_steps=3, checkpoint=CheckpointConfig(every_steps=2, keep_last=5, keep_best=7))


class Saves:
    """In the place of Checkpoints."""

    error: TrainingFailed | None = None

    def __init__(self, *_):
        self.saved, self.states, self.stalls_s = [], [], []

    @property
    def failed(self) -> bool:
        return self.error is not None

    def save(self, folder, trained, optimizer, state, keep):
        self.wait()
        self.saved.append((folder.name, state["step"], keep))
        self.states.append(state)
        self.stalls_s.append(0.5)

    def wait(self):
        if self.error is not None:
            raise self.error

    def figures(self):
        return FIGURES


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the steps of a run, and what stands around them; `made.said()` is what the user read."""
    log = io.StringIO()
    given = SimpleNamespace(tracker=MagicMock(), watch=MagicMock(), stop=StopSignal(), path=tmp_path)
    given.watch.straggler.return_value = None
    monkeypatch.setattr(loop, "Checkpoints", Saves)
    monkeypatch.setattr(loop, "open_tracker", lambda *_: given.tracker)
    given.session = SimpleNamespace(
        job=SHORT, plan=PLAN, world=World(), strategy=MagicMock(), model=None, trained=[], optimizer=MagicMock(),
        loss=None, skipped=[], preference={}, worked_s=0.25, device=torch.device("cpu"), split=list, fixed_length=None,
        gradients=MagicMock(return_value=(torch.tensor(2.0), torch.tensor(1.0))),
    )
    given.prepared = SimpleNamespace(train=rows(), validation=rows(6, seed=1))
    given.said, given.display = log.getvalue, Display(Console(file=log, width=200))
    given.held_out = lambda session, stopping: {"loss": 1.0}
    given.training = lambda: Training(
        given.session, given.prepared, tmp_path, "hash", given.held_out, given.stop, given.display, given.watch,
        Start(),
    )
    return given


def test_who_hears_of_a_step(made):
    training = made.training()
    training.run()
    at = [(1, "step"), (2, "step"), (2, "evaluate"), (2, "save"), (3, "step"), (3, "evaluate"), (3, "save")]
    assert [call.args for call in made.watch.at.call_args_list] == [*at, (3, "save")]
    assert [call.args for call in made.watch.worked.call_args_list] == [(0.25,)] * 3
    assert made.session.strategy.settle.call_count == 2
    assert training.checkpoints.saved == [("step-2", 2, (5, 7)), ("step-3", 3, (5, 7))]
    logged = read_metrics(made.path / "metrics.jsonl")
    assert [row.get("save_stall_s") for row in logged] == [None, 0.5, 0.5]
    assert not any("step_s_by_rank" in row for row in logged)  # of one process
    told = [call.args for call in made.tracker.log.call_args_list]
    assert told == [({k: v for k, v in row.items() if k not in ("step", "steps")}, row["step"]) for row in logged]
    made.tracker.close.assert_called_once()
    assert "checkpoints: 2 of 0.000 GiB" in made.said() and "compiled anew" not in made.said()


def test_a_checkpoint_has_its_own_steps_loss_and_row_also_once_the_loop_has_gone_on(made):
    made.session.job = replace(SHORT, max_steps=4, checkpoint=CheckpointConfig(every_steps=1))
    training = made.training()
    training.run()
    states = training.checkpoints.states
    assert [state["eval_loss"] for state in states] == [None, 1.0, None, 1.0]
    assert [(state["row"]["step"], "save_stall_s" in state["row"]) for state in states] == [
        (step, False) for step in (1, 2, 3, 4)
    ]


def test_another_seed_is_another_order(made):
    orders = []
    for seed in (1, 1, 2):
        made.session.job = replace(SHORT, seed=seed)
        orders.append([*made.training().sampler.order(0)])
    assert orders[0] == orders[1] != orders[2]


def test_a_figure_that_is_no_number_is_null_and_no_trackers(made):
    made.session.preference = {"margin": math.nan, "accuracy": 0.5}
    made.training().run()
    row = read_metrics(made.path / "metrics.jsonl")[0]
    assert (row["margin"], row["accuracy"]) == (None, 0.5)
    told = made.tracker.log.call_args_list[0].args[0]
    assert "margin" not in told and told["accuracy"] == 0.5


def test_a_step_without_a_trained_token_is_divided_by_one(made):
    made.prepared.train = packed_rows([([1] * 9, [False] * 9)] * 4, 9)
    made.training().run()
    assert [call.args[1] for call in made.session.gradients.call_args_list] == [1] * 3


@pytest.mark.parametrize("compiles", [True, False])
def test_graphs_that_are_compiled_after_the_rehearsal_are_told_once(made, monkeypatch, compiles):
    numbers = iter([5, 5, 7, 7])  # as the run begins, and after each step
    monkeypatch.setattr(loop, "graphs_compiled", lambda: next(numbers))
    made.session.plan = replace(PLAN, compile=compiles)
    training = made.training()
    training.run()
    assert training.recompilations == (2 if compiles else 0)
    assert made.said().count("compiled anew") == made.said().count("step 2 compiled anew (2 graphs since") == compiles


@pytest.mark.parametrize("rank", [0, 1])
def test_a_straggler_is_named_by_the_lead(made, rank):
    made.session.world = World(rank=rank)
    made.watch.straggler.side_effect = [None, "straggler: rank 2", None]
    made.training().run()
    assert made.said().count("straggler: rank 2\n") == (rank == 0)


def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_its_next_step(made):
    def failing(session, stopping):
        training.checkpoints.error = TrainingFailed("could not be written")
        return {"loss": 1.0}

    made.held_out, made.display.stop = failing, MagicMock()
    made.session.job = replace(SHORT, checkpoint=CheckpointConfig(every_steps=3), max_steps=9)
    training = made.training()
    with pytest.raises(TrainingFailed, match="could not be written"):
        training.run()
    assert [row["step"] for row in read_metrics(made.path / "metrics.jsonl")] == [1]
    made.tracker.close.assert_called_once()
    made.display.stop.assert_called_once()  # else the terminal would be left to the progress


def test_it_is_not_said_that_a_checkpoint_is_saved_before_it_is_there(made):
    training = made.training()
    training.checkpoints.error = TrainingFailed("could not be written")
    with pytest.raises(TrainingFailed, match="could not be written"):
        training.stop_if(True, "checkpoint saved after step 1 of 3")
    training.stop_if(False, "")
    training.checkpoints.error = None
    with pytest.raises(StoppedOnRequest, match=r"\(here\)$") as stopped:
        training.stop_if(True, "here")
    assert stopped.value.agreed  # else the first rank that is gone would take the others with it


def test_what_passes_between_steps_is_no_part_of_their_rate(made, monkeypatch):
    clock = MagicMock()
    clock.update.return_value = 5.0
    monkeypatch.setattr(loop, "Throughput", lambda: clock)
    made.training().run()
    assert [call[0] for call in clock.method_calls] == ["update", "pause"] * 3


def test_skipped_steps_count_in_a_row_only(made):
    made.session.skipped.append({"step": 1})
    made.training().run()
    assert made.session.skipped == []


@pytest.mark.parametrize(("loss", "told"), [(1.0, {"eval_loss": 1.0}), (math.nan, {})])
def test_an_evaluation_that_is_made_up_for_is_logged_told_and_saved(made, loss, told):
    (made.path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n')
    made.held_out = lambda session, stopping: {"loss": loss}
    training = made.training()
    training.resumed_after, training.left_out = 2, True
    training.run()
    assert made.tracker.log.call_args_list[0].args == (told, 2)
    assert [name for name, *_ in training.checkpoints.saved] == ["step-2", "step-3"]
    assert read_metrics(made.path / "metrics.jsonl")[1]["eval_loss"] == told.get("eval_loss")


def test_an_evaluation_that_a_second_stop_leaves_out_again_is_still_to_be_made(made):
    made.stop.requested, made.held_out = True, lambda session, stopping: None
    training = made.training()
    training.resumed_after, training.left_out = 2, True
    with pytest.raises(StoppedOnRequest, match="step 2 of 3 is yet to be evaluated"):
        training.run()
    made.session.gradients.assert_not_called()
    assert training.checkpoints.saved == []


def test_an_evaluation_that_is_no_more_asked_for_is_not_made_up_for(made):
    made.session.job = replace(SHORT, evaluation=replace(JOB.evaluation, every_steps=None))
    training = made.training()
    training.resumed_after, training.left_out = 2, True
    training.run()
    assert [name for name, *_ in training.checkpoints.saved] == ["step-3"]


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("load_best", [True, False])
def test_an_end_before_the_last_step_is_said_with_what_would_take_the_best_weights(made, steps, load_best):
    losses = iter([1.0, 2.0])
    made.held_out = lambda session, stopping: {"loss": next(losses)}
    made.session.job = replace(
        SHORT, max_steps=steps, evaluation=replace(JOB.evaluation, every_steps=1, patience=1),
        checkpoint=replace(SHORT.checkpoint, load_best=load_best),
    )
    made.training().run()
    assert ("training ends after step 2 of 3" in made.said()) == (steps == 3)
    assert ("checkpoint.load_best=true takes" in made.said()) == (steps == 3 and not load_best)


@pytest.mark.parametrize("lowest", [1.0, 0.5])
def test_a_best_checkpoint_that_is_gone_is_said(made, monkeypatch, lowest):
    state = {"step": 1, "eval_loss": 1.0}
    monkeypatch.setattr(loop, "best_whole", lambda *_: SimpleNamespace(folder=None, state=state))
    monkeypatch.setattr(Saves, "load", lambda *_: state, raising=False)
    training = made.training()
    training.losses.add(lowest, 2)
    training.load_best()
    gone = "step 2 had the lowest held-out loss, 0.5000, and no checkpoint of it is there"
    assert (gone in made.said(), "no checkpoint" in made.said()) == (lowest == 0.5, lowest == 0.5)
    assert "step 1 of 3 has the lowest held-out loss, 1.0000: its weights are taken" in made.said()


def test_the_last_checkpoint_is_not_read_again_where_it_is_the_best(made, monkeypatch):
    state = {"step": 3, "eval_loss": 1.0}
    monkeypatch.setattr(loop, "best_whole", lambda *_: SimpleNamespace(folder=None, state=state))
    training = made.training()
    training.load_best()
    assert training.taken is None and made.said() == ""


@pytest.fixture
def trained(made, monkeypatch):
    """`train` on such a session; what it asks before the first step is made.asked."""
    made.cache, made.reference = MagicMock(), MagicMock()
    made.asked = asked = MagicMock()
    asked.rehearse_run.return_value = Rehearsed(0.0, 0.0, 0.0, seconds=0.0)
    monkeypatch.setattr(loop, "make_session", lambda *_: made.session)
    for name in ("refuse_dynamic", "rehearse_run", "try_family", "causal_lm"):
        monkeypatch.setattr(loop, name, getattr(asked, name))
    monkeypatch.setattr("loadmaster.training.session.config_of", asked.config_of)
    monkeypatch.setattr(loop, "attention_kernel", lambda *_: contextlib.nullcontext("by_document"))
    monkeypatch.setattr(loop, "own_code", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(loop, "CompileCache", lambda *_: made.cache)
    monkeypatch.setattr(loop, "Reference", lambda *_: made.reference)
    return lambda world=None: train(
        made.session.job, made.session.plan, made.prepared, SimpleNamespace(pad_token_id=0), made.path, made.path,
        "hash", made.held_out, made.stop, made.display, world, made.watch,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_an_attention_kernel_that_compiles_itself_is_kept_with_the_run(fused, made, trained, monkeypatch):
    monkeypatch.setattr("loadmaster.training.session.runs_fused", lambda *_: fused)
    trained()
    assert (made.cache.open.called, made.cache.close.called, made.cache.share.called) == (fused, fused, fused)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_compilers_of_a_gpus_kernels_are_woken_before_the_model_is_loaded(
    made, trained, monkeypatch, device, filled, compiled
):
    order = []
    made.session.plan = replace(PLAN, compile=compiled)
    made.cache.is_filled, world = filled, World(device=torch.device(device))
    monkeypatch.setattr(loop, "compiles_some", lambda plan, *_: plan.compile)
    made.cache.open.side_effect = lambda: order.append("cache")  # processes inherit where it is
    monkeypatch.setattr(loop, "wake_compilers", lambda: order.append("compilers"))
    monkeypatch.setattr(loop, "peak_memory", lambda _: {"peak_allocated_gib": 0.0})
    monkeypatch.setattr(loop, "make_session", lambda *_: order.append("model") or made.session)
    trained(world)
    woken = ["compilers"] * (compiled and device == "cuda" and not filled)
    assert order == [*["cache"] * compiled, *woken, "model"]


PARTS = {"first_step": 20.0, "second_step": 0.5, "evaluation": 3.0, "checkpoint": 1.0}


def test_a_start_is_told_part_by_part_once(made, trained, monkeypatch):
    parts, made.session.plan = PARTS, replace(PLAN, compile=True)
    made.asked.rehearse_run.side_effect = lambda *_: time.sleep(0.1) or made.asked.rehearse_run.return_value
    made.asked.rehearse_run.return_value = Rehearsed(0.0, 0.0, 0.0, seconds=24.5, parts_s=parts)
    monkeypatch.setenv(STARTED, str(time.time() - 1000))
    _, outcome = trained()
    said = made.said()
    assert said.count("first step taken 100") == 1 and "compiling, and what is done once: 19.5 s" in said
    told = outcome.start_s
    of_all = ["before_training", "load", "rehearsal", "resume", "records", "first_step"]
    assert list(told) == [*of_all, *(f"rehearsal_{name}" for name in parts), "total"]
    assert told["before_training"] >= 1000 and told["rehearsal_first_step"] == 20.0
    assert told["total"] == pytest.approx(sum(map(told.get, of_all)), abs=0.01)


@pytest.mark.parametrize(("once", "said"), [(20.0, "rehearsal (what is done once: 19.5 s)"), (0.5, "s rehearsal, ")])
def test_where_nothing_is_compiled_no_start_says_so(made, trained, once, said):
    made.asked.rehearse_run.side_effect = lambda *_: time.sleep(0.1) or Rehearsed(
        0.0, 0.0, 0.0, seconds=0.1, parts_s=PARTS | {"first_step": once}
    )
    made.session.gradients.side_effect = lambda *_: time.sleep(0.1) or (torch.tensor(2.0), torch.tensor(1.0))
    trained()
    assert said in made.said() and "compiling" not in made.said()


def test_a_run_that_begins_does_not_say_that_it_went_on_from_a_checkpoint(made, trained, monkeypatch):
    """A tracker's library is imported as it is opened, which takes longer than to see that there is no checkpoint."""
    opened = loop.open_tracker
    monkeypatch.setattr(loop, "open_tracker", lambda *given: time.sleep(0.1) or opened(*given))
    _, outcome = trained()
    assert outcome.start_s["records"] >= 0.1 > outcome.start_s["resume"]
    assert " s opening the log and the tracker" in made.said() and "going on from" not in made.said()


def test_what_the_model_said_before_is_a_part_of_its_own(made, trained, monkeypatch):
    monkeypatch.setattr(loop, "asked_once", lambda *_: True)
    made.reference.ask.side_effect = lambda *_: time.sleep(0.3) or True
    _, outcome = trained()
    assert outcome.start_s["reference"] >= 0.3
    assert " s for what the model said before" in made.said() and " going on from" not in made.said()


def test_graphs_of_an_earlier_run_in_this_process_are_not_this_runs(made, trained, monkeypatch):
    counts = iter([{"found": 3, "made": 40}, {"found": 5, "made": 41}])
    monkeypatch.setattr(loop, "cache_counts", lambda: next(counts))
    _, outcome = trained()
    assert outcome.compiler_cache == {"found": 2, "made": 1}


def test_a_start_with_no_step_left_has_none(made):
    made.session.job = replace(SHORT, max_steps=3)
    training = made.training()
    training.resumed_after = 3
    training.run()
    assert "first step taken" not in made.said() and "first_step" not in training.start.figures()


def test_a_request_before_the_rehearsal_is_not_answered_behind_it(made, trained):
    made.stop.requested = True
    with pytest.raises(StoppedOnRequest, match=r"\(before the first step\)"):
        trained()
    made.asked.rehearse_run.assert_not_called()


def test_a_request_in_the_rehearsal_is_answered_before_the_first_step(made, trained):
    def rehearse(*_):
        made.stop.requested = True
        return Rehearsed(0.0, 0.0, 0.0, seconds=0.0)

    made.asked.rehearse_run.side_effect = rehearse
    with pytest.raises(StoppedOnRequest, match=r"\(after the rehearsal, before the first step\)"):
        trained()
    made.session.gradients.assert_not_called()


def test_the_rehearsal_steps_at_the_rate_of_the_first_step(made, trained):
    """What the warm-up would have saved is not refused, and at rate 0 no weight would change."""
    made.session.job = replace(SHORT, optimizer=replace(JOB.optimizer, warmup_steps=2))
    trained()
    rates = [row["lr"] for row in read_metrics(made.path / "metrics.jsonl")]
    assert made.asked.rehearse_run.call_args.args[4] == rates[0] == rates[1] / 2 > 0


def test_rates_are_of_what_this_process_trained(made, trained, monkeypatch):
    position = made.training().sampler.state_dict()
    state = {"step": 1, "sampler": position, "tokens": 10**6, "trained_tokens": 10**6}
    monkeypatch.setattr(loop, "newest_whole", lambda *_: SimpleNamespace(folder=None))
    monkeypatch.setattr(Saves, "load", lambda *_: state, raising=False)
    _, outcome = trained()
    logged = read_metrics(made.path / "metrics.jsonl")
    assert (outcome.resumed_after, [row["step"] for row in logged]) == (1, [2, 3])
    done, trained_on = (logged[-1][name] - 10**6 for name in ("tokens", "trained_tokens"))
    assert 0 < trained_on < done < 3 * 4 * 64
    assert outcome.trained_tokens_per_second / outcome.tokens_per_second == pytest.approx(trained_on / done)
    assert "resuming after step 1 of 3" in made.said()


def test_a_run_whose_log_is_lost_has_no_rate_and_no_loss(made):
    training = made.training()
    training.tokens = training.resumed_tokens = 4
    training.trained_tokens = training.resumed_trained_tokens = 2
    outcome = training.outcome(Rehearsed(0.0, 0.0, 0.0, seconds=0.0), "by_document")
    assert (outcome.tokens_per_second, outcome.trained_tokens_per_second, outcome.train_loss) == (0.0, 0.0, None)
    assert (outcome.input_share, outcome.taken_step, outcome.attention_kernel) == (0.0, 3, "by_document")


def test_held_out_rows_too_are_looked_at_for_the_longest_document(made, trained):
    few, many = (packed_rows([([1] * size, [True] * size)], 64) for size in (9, 40))
    for train_rows, held_out_rows in ((few, many), (many, few)):
        made.prepared = SimpleNamespace(train=train_rows, validation=held_out_rows)
        trained()
        assert made.asked.refuse_dynamic.call_args.args[1] == longest_stretch(many, None) == 40


@pytest.mark.parametrize(
    ("plan", "uses"), [({}, False), ({"compile": True}, True), ({"optimizer": "adamw_bf16"}, True)]
)
def test_what_compiles_keeps_and_shares_what_it_has_compiled(made, trained, plan, uses):
    made.session.plan = replace(PLAN, **plan)
    trained()
    assert [call[0] for call in made.cache.method_calls] == ["open", "share", "close"] * uses


def test_the_model_before_training_is_asked_of_the_rows_that_the_run_comes_to(made, trained, monkeypatch):
    monkeypatch.setattr(loop, "asked_once", lambda *_: True)
    made.reference.ask.return_value = False
    with pytest.raises(StoppedOnRequest, match="what the model said so far is kept"):
        trained()
    assert made.session.strategy.settle.call_count == 1
    asked_of = made.reference.ask.call_args.args[-1]
    assert len(asked_of) == 3 * 4
    made.reference.ask.return_value = True
    _, outcome = trained()
    assert outcome.steps == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_draw_dropout_of_their_own_and_one_of_them_clears_up(made, trained, monkeypatch, rank):
    seeds, cleared = [], []
    monkeypatch.setattr(loop, "seed_everything", seeds.append)
    monkeypatch.setattr(loop, "clear", cleared.append)
    trained(World(rank=rank, size=2))
    assert seeds == ([JOB.seed + 1] if rank else [])
    assert cleared == ([] if rank else [made.path / "checkpoints"])
