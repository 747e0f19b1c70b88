"""The loop's arithmetic and its ways to stop, in process on a tiny model."""

import contextlib
import dataclasses
import io
import json
import math
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from rich.console import Console

from loadmaster.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Job,
    OptimizerConfig,
    TrackerConfig,
)
from loadmaster.data import packed_rows
from loadmaster.errors import ConfigError, LoadmasterError, StoppedOnRequest, TrainingFailed
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.preflight.plan import HardwareSummary, MemoryGib, ModelSummary, PhasesGib, Plan
from loadmaster.training import loop
from loadmaster.training.batches import longest_stretch, micro_batches, trained_tokens, worst_rows
from loadmaster.training.display import Display
from loadmaster.training.loop import make_session, train
from loadmaster.training.metrics import MetricsLog, read_metrics
from loadmaster.training.rehearsal import Rehearsed, rehearse
from loadmaster.training.stop import StopSignal
from loadmaster.training.watchdog import Watchdog
from loadmaster.training.world import World
from tests.conftest import FEW_WORDS

PLAN = Plan(
    fits=True,
    model=ModelSummary("tiny", 0, 0, 2, 64, FEW_WORDS, "llama"),
    hardware=HardwareSummary("cpu", 1, 1, 8.0, 8.0),
    method="full",
    precision="fp32",
    sharding="none",
    offload="none",
    activation_checkpointing="none",
    optimizer="adamw",
    master_weights=False,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    sequence_length=64,
    memory_gib=MemoryGib(*[0.0] * 9),
    phases_gib=PhasesGib(*[0.0] * 5),
    budget_gib=8.0,
    host_memory_gib=0.0,
    disk_gib=0.0,
    tokens_per_second=None,
    hours=None,
    cost_usd=None,
)
JOB = Job(
    data=DataConfig(path="in memory"),
    sequence_length=64,
    batch=BatchConfig(4),
    max_steps=6,
    optimizer=OptimizerConfig(lr=1e-3),
    tracker=TrackerConfig("none"),
    checkpoint=CheckpointConfig(every_steps=2),
    evaluation=EvaluationConfig(every_steps=2),
)


@pytest.fixture(scope="module")
def tiny(few_words):
    return few_words


def rows(documents: int = 40, seed: int = 0):
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(documents):
        size = int(generator.integers(8, 40))
        made.append((generator.integers(3, FEW_WORDS, size).tolist(), (np.arange(size) >= size // 3).tolist()))
    return packed_rows(made, 64)


def session_on(tiny, job=JOB, plan=PLAN):
    return make_session(job, plan, World(), 0, tiny)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_any_split_of_a_batch_gives_the_same_gradients(tiny, checkpointing):
    batch = [rows()[i] for i in range(5)]
    total = sum(map(trained_tokens, batch))
    session = session_on(tiny, plan=dataclasses.replace(PLAN, activation_checkpointing=checkpointing))
    results = []
    for size, ranks in [(5, 1), (1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (1, 8)]:
        session.optimizer.zero_grad()
        loss = sum(
            session.backward(micro_batches(batch, size, rank, ranks, 0, None), total).item() for rank in range(ranks)
        )
        results.append((loss, [p.grad.clone() for _, p in session.trained]))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for gradient, first in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(gradient, first, rtol=1e-6, atol=1e-6)


def run(
    tiny, folder, job=JOB, prepared=None, stop=None, held_out=lambda session, stopping: {"loss": 1.0}, plan=None,
    console=None,
):
    prepared = prepared or SimpleNamespace(train=rows(), validation=rows(6, seed=1))
    return train(
        job,
        plan or PLAN,
        prepared,
        load_tokenizer(tiny),
        tiny,
        folder,
        "hash",
        held_out,
        stop or StopSignal(),
        Display(console or Console(quiet=True)),
    )


@pytest.mark.parametrize(
    ("compiles", "said"), [(False, "rehearsing"), (True, "rehearsing; layers are compiled meanwhile")]
)
def test_what_takes_long_before_the_first_step_is_said_as_it_begins(tiny, tmp_path, monkeypatch, compiles, said):
    def ended(*_):
        raise LoadmasterError(lines.getvalue())

    lines = io.StringIO()
    monkeypatch.setattr(loop, "rehearse_run", ended)
    with pytest.raises(LoadmasterError, match=f"^loading the model\n{said}\n$"):
        run(tiny, tmp_path, plan=replace(PLAN, compile=compiles), console=Console(file=lines))


def test_the_first_step_is_expected_to_take_the_rehearsals_time_for_each_micro_batch(tiny, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Watchdog, "expect", lambda watch, seconds: told.append((seconds, watch._beat.step)))
    _, outcome = run(tiny, tmp_path, dataclasses.replace(JOB, max_steps=1))
    assert told == [(2 * outcome.rehearsal.step_s, 0)]
    assert 0 < 4 * outcome.rehearsal.step_s < outcome.rehearsal.seconds  # two steps of two, without the rest


@pytest.mark.parametrize(("most", "refused"), [(46, False), (45, True)])
def test_documents_that_would_change_their_neighbours_rotation_are_refused(tiny, tmp_path, most, refused):
    """Of dynamic NTK scaling transformers takes the longest document's frequencies for all in a batch, or the longest
    padding's."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": most}
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps(config))
    assert rows().longest_document == 39 and longest_stretch(rows(), None) == 46
    with pytest.raises(LoadmasterError, match="sequence_length=45") if refused else contextlib.nullcontext():
        run(model, tmp_path / "run", dataclasses.replace(JOB, max_steps=1))


def test_a_rows_padding_counts_where_rows_are_padded():
    """It is a document of its own, and turned like one."""
    short = packed_rows([([1] * size, [True] * size) for size in (12, 10, 9)], 24)
    assert sorted(short.lengths) == [9, 22]
    batch = micro_batches(list(short), 2, 0, 1, 0, 64)[0]
    assert longest_stretch(short, 64) == batch.position_ids.max() + 1 == 55
    assert longest_stretch(short, None) == 13


def test_the_rate_of_the_first_steps_counts_nothing_that_came_before_them(tiny, tmp_path, monkeypatch):
    def slow(*given):
        time.sleep(3)
        return real(*given)

    real = loop.open_tracker
    monkeypatch.setattr(loop, "open_tracker", slow)
    run(tiny, tmp_path, dataclasses.replace(JOB, max_steps=1))
    (first,) = read_metrics(tmp_path / "metrics.jsonl")
    assert first["tokens_per_second"] > first["tokens"] / 3


def test_a_card_that_refuses_products_in_fp8_ends_the_rehearsal_with_a_way_out(tiny, tmp_path, monkeypatch):
    from loadmaster.models import frozen

    def refused(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`")

    monkeypatch.setattr(frozen, "_on_fp8_units", lambda *_: True)
    monkeypatch.setattr(frozen, "_on_units", refused)
    fp8 = replace(PLAN, method="lora", precision="fp8")
    monkeypatch.setitem(globals(), "PLAN", fp8)
    with pytest.raises(TrainingFailed, match=r"CUBLAS_STATUS_NOT_SUPPORTED(.|\n)*precision=bf16"):
        run(tiny, tmp_path / "run", job=replace(JOB, method="lora"))


def test_the_rehearsal_leaves_no_trace(tiny, tmp_path, monkeypatch):
    from loadmaster.training import loop

    run(tiny, tmp_path / "with")
    rehearsed = Rehearsed(0.0, 0.0, 0.0, seconds=0.0)
    monkeypatch.setattr(loop, "rehearse_run", lambda *_: rehearsed)
    run(tiny, tmp_path / "without")
    both = [
        [(r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / d / "metrics.jsonl")] for d in ("with", "without")
    ]
    assert both[0] == both[1] and len(both[0]) == 6
    assert not (tmp_path / "with" / "checkpoints" / ".rehearsal").exists()


def test_a_request_to_stop_saves_and_the_rest_continues_bit_for_bit(tiny, tmp_path):
    run(tiny, tmp_path / "whole")
    stop = StopSignal()

    def stop_at_four(session, stopping):
        stop.requested = len(read_metrics(tmp_path / "halves" / "metrics.jsonl")) >= 3
        return {"loss": 1.0}

    with pytest.raises(StoppedOnRequest, match="after step 4 of 6"):
        run(tiny, tmp_path / "halves", stop=stop, held_out=stop_at_four)
    with open(tmp_path / "halves/metrics.jsonl", "ab") as log:
        log.write(b'{"step": 5, "l\xffss": 1}\nnull\n{"loss": 2.0}\n{"step": 6')  # by a damaged disk, and a kill
    (tmp_path / "halves/checkpoints/.step-5.partial/tensors").mkdir(parents=True)  # of a process that was killed
    run(tiny, tmp_path / "halves")
    assert not any((tmp_path / "halves/checkpoints").glob(".*"))
    whole, halves = (
        [
            {k: v for k, v in row.items() if k not in ("tokens_per_second", "save_stall_s")}
            for row in read_metrics(tmp_path / d / "metrics.jsonl")
        ]
        for d in ("whole", "halves")
    )
    assert whole == halves and len(whole) == 6


def test_a_step_whose_checkpoint_is_there_is_logged_also_where_its_row_was_lost(tiny, tmp_path, monkeypatch):
    """By a kill between the two, or a disk that the checkpoint has filled."""
    append = MetricsLog.append

    def full(log, row):
        if row["step"] == 4:
            raise OSError(28, "No space left on device")
        append(log, row)

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(MetricsLog, "append", full)
        run(tiny, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints/step-4").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run(tiny, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[3].keys() | {"save_stall_s"} == rows[1].keys()


def test_non_finite_losses_are_skipped_then_stop_the_run_with_rows_and_checkpoint(tiny, tmp_path, monkeypatch):
    from loadmaster.training import loop

    calls = []
    backward = loop.Session.backward

    def poisoned(self, batches, total):
        loss = backward(self, batches, total)
        calls.append(loss)
        return loss * math.nan if len(calls) > 4 else loss  # two of the calls are the rehearsal's

    monkeypatch.setattr(loop.Session, "backward", poisoned)
    with pytest.raises(TrainingFailed, match=r"not finite in 3 steps in a row, from step 3 on.*document:") as caught:
        run(tiny, tmp_path)
    assert "checkpoints/step-4" in str(caught.value)
    assert (tmp_path / "checkpoints" / "step-4" / "checksums.json").exists()
    assert [row["loss"] is None for row in read_metrics(tmp_path / "metrics.jsonl")] == [False, False, True, True]


def test_after_a_run_that_gave_up_the_same_data_goes_on_to_the_last_step(tiny, tmp_path, monkeypatch):
    """The step that was not made gets its batch again; else the data of an epoch would end a step too soon."""
    from loadmaster.training import loop

    job = replace(JOB, max_steps=None, epochs=1.0)
    run(tiny, tmp_path / "whole", job)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    backward, calls = loop.Session.backward, []

    def poisoned(self, batches, total):
        calls.append(1)
        return backward(self, batches, total) * (math.nan if len(calls) > 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Session, "backward", poisoned)
        patched.setattr(loop, "rehearse_run", lambda *_: Rehearsed(0.0, 0.0, 0.0, seconds=0.0))
        with pytest.raises(TrainingFailed, match="not finite"):
            run(tiny, tmp_path / "cut", replace(job, optimizer=replace(job.optimizer, max_skipped_steps=0)))
    run(tiny, tmp_path / "cut", replace(job, optimizer=replace(job.optimizer, max_skipped_steps=0)))
    gone_on = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [row["step"] for row in gone_on] == [row["step"] for row in whole]
    assert [row["loss"] for row in gone_on] == pytest.approx([row["loss"] for row in whole], abs=1e-5)
    assert (tmp_path / "cut" / "checkpoints" / f"step-{len(whole)}" / "checksums.json").exists()


def test_one_bad_step_is_left_out_and_the_run_goes_on(tiny, tmp_path, monkeypatch):
    from loadmaster.training.optimizer import TrainingOptimizer

    calls = []
    clip = TrainingOptimizer.clip

    def poisoned(self, norm):
        calls.append(1)
        return clip(self, norm) * (math.inf if len(calls) == 5 else 1)

    monkeypatch.setattr(TrainingOptimizer, "clip", poisoned)
    _, outcome = run(tiny, tmp_path)
    assert [row["loss"] is None for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert math.isfinite(outcome.train_loss)


def test_a_gradient_that_is_not_finite_ends_the_rehearsal_also_where_no_weight_shows_it(tiny, tmp_path, monkeypatch):
    """On a GPU, rounding makes -0 of NaN."""
    from loadmaster.training.optimizer import TrainingOptimizer

    norms = iter([math.nan])
    clip = TrainingOptimizer.clip
    monkeypatch.setattr(TrainingOptimizer, "clip", lambda *given: clip(*given) * next(norms, 1.0))
    with pytest.raises(TrainingFailed, match="not finite"):
        run(tiny, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),  # asked for past PyTorch's allocator
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_running_out_in_the_rehearsal_says_what_to_change(tiny, tmp_path, monkeypatch, error):
    from loadmaster.training import loop

    def too_big(self, batches, total):
        raise error

    monkeypatch.setattr(loop.Session, "backward", too_big)
    monkeypatch.setattr("loadmaster.training.rehearsal.seen", lambda: " (30.0 GiB allocated, 1.0 of 79.2 free)")
    with pytest.raises(TrainingFailed, match=r"fullest micro-batch \(30.*Another program.*micro_batch_size"):
        run(tiny, tmp_path)


def test_a_rank_that_runs_out_of_memory_beside_others_ends_without_another_collective(tmp_path):
    """ZeRO's restore is one, and the others are in that of a backward pass: it would wait for them for half an hour."""
    from loadmaster.training.placement import Placed

    def too_big(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    checkpoints = SimpleNamespace(world=World(size=2), placed=Placed())
    optimizer = MagicMock()
    with pytest.raises(TrainingFailed, match="out of GPU memory in the rehearsal"):
        rehearse(too_big, lambda: None, [], [], optimizer, checkpoints, tmp_path)
    optimizer.reset.assert_not_called()


def test_layers_that_were_to_be_kept_are_checkpointed_where_memory_runs_out(tiny, tmp_path, monkeypatch):
    from loadmaster.models.forward import decoder_layers
    from loadmaster.training import loop

    backward, tried = loop.Session.backward, []

    def small(self, batches, total):
        tried.append([layer.gradient_checkpointing for layer in decoder_layers(self.model)])
        if len(tried) > 1 and not all(tried[-1]):  # the second step of the rehearsal, after one that changed weights
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, batches, total)

    full = dataclasses.replace(PLAN, activation_checkpointing="full")
    run(tiny, tmp_path / "full", plan=full)
    monkeypatch.setattr(loop.Session, "backward", small)
    console = Console(file=io.StringIO(), width=200)
    some = dataclasses.replace(full, checkpointed_layers=1)
    outcome = run(tiny, tmp_path / "mixed", plan=some, console=console)[1]
    assert outcome.rehearsal.kept_layers == 0 and "all 2 are checkpointed instead" in console.file.getvalue()
    assert tried[0] == tried[1] == [True, False] and all(map(all, tried[2:]))
    logged, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("mixed", "full"))
    assert [row["loss"] for row in logged] == [row["loss"] for row in expected]
    tried.clear()
    with pytest.raises(TrainingFailed, match="out of GPU memory in the rehearsal"):  # what was written is not replaced
        run(tiny, tmp_path / "written", replace(JOB, checkpointed_layers=1), plan=some)


def test_the_loss_falls_and_the_outcome_reports_it(tiny, tmp_path):
    one = SimpleNamespace(train=rows(4), validation=None)
    job = dataclasses.replace(JOB, max_steps=30, optimizer=OptimizerConfig(lr=5e-3))
    _, outcome = run(tiny, tmp_path, job, one)
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert outcome.train_loss == pytest.approx(np.mean([row["loss"] for row in logged[-20:]]))
    assert outcome.steps == 30
    assert 0 < outcome.input_share < 0.2  # of a model as small as this
    assert logged[-1]["tokens"] == 30 * rows(4).tokens
    assert {"step", "loss", "lr", "tokens", "tokens_per_second"} <= set(logged[0])
    again = run(tiny, tmp_path, job, one)[1]  # no step is left: the rates are the last ones
    assert again.tokens_per_second == logged[-1]["tokens_per_second"]
    for each in (outcome, again):
        share = each.trained_tokens_per_second / each.tokens_per_second
        assert share == pytest.approx(rows(4).trained_tokens / rows(4).tokens)


@pytest.mark.parametrize(
    "key, value",
    [("sharding", "zero4"), ("activation_checkpointing", "some")],
)
def test_what_the_loop_does_not_do_is_refused_not_replaced(key, value):
    with pytest.raises(ConfigError, match=f"{key}={value}"):
        make_session(JOB, dataclasses.replace(PLAN, **{key: value}), World(), 0)


def test_a_plan_for_another_number_of_processes_is_refused():
    two = dataclasses.replace(PLAN, hardware=dataclasses.replace(PLAN.hardware, count=2))
    with pytest.raises(ConfigError, match="number of processes is 2 and this run's is 1"):
        make_session(JOB, two, World(), 0)


def test_a_plan_for_two_gpus_is_not_trained_on_one_in_silence(tiny, tmp_path, monkeypatch):
    plan = dataclasses.replace(PLAN, hardware=HardwareSummary("cpu", 2, 1, 8.0, 8.0))
    monkeypatch.setitem(globals(), "PLAN", plan)
    with pytest.raises(ConfigError, match="the plan's number of processes is 2"):
        run(tiny, tmp_path)


def test_the_rehearsals_rows_are_the_longest_and_of_those_the_ones_with_most_documents():
    documents = [([3] * size, [True] * size) for size in (64, 32, 32, 16, 16, 16, 16, 60)]
    packed = packed_rows(documents, 64)
    picked = worst_rows(packed, 2)
    assert [len(row) for row in picked] == [64, 64]
    assert [len(row.document_ids) for row in picked] == [4, 2]
    assert all((row.labels == row.input_ids).all() for row in picked)


def test_the_weights_with_the_lowest_held_out_loss_are_taken_also_of_a_run_that_is_done(tiny, tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    at = {}

    def held_out(session, stopping):
        at[len(at)] = [p.detach().clone() for _, p in session.trained]
        return {"loss": next(losses)}

    session, outcome = run(tiny, tmp_path, held_out=held_out)
    assert outcome.taken_step == 6 and outcome.eval_loss == 2.0
    assert all(map(torch.equal, [p for _, p in session.trained], at[2]))
    log, best = io.StringIO(), replace(JOB, checkpoint=replace(JOB.checkpoint, load_best=True))
    planned, console = replace(PLAN, steps=60), Console(file=log, width=200)
    session, outcome = run(tiny, tmp_path, job=best, plan=planned, held_out=None, console=console)
    assert "note: the data make 6 steps; the plan expected about 60 by their size" in log.getvalue()
    assert (outcome.taken_step, outcome.steps, outcome.resumed_after, outcome.eval_loss) == (4, 6, 6, 1.0)
    assert all(map(torch.equal, [p for _, p in session.trained], at[1]))
    assert "step 4 of 6 has the lowest held-out loss, 1.0000: its weights are taken" in log.getvalue()


def test_the_last_weights_are_taken_where_they_are_the_best(tiny, tmp_path):
    losses, best = iter([3.0, 2.0, 1.0]), replace(JOB, checkpoint=replace(JOB.checkpoint, load_best=True))
    _, outcome = run(tiny, tmp_path, job=best, held_out=lambda session, stopping: {"loss": next(losses)})
    assert outcome.taken_step == 6


def test_where_no_held_out_loss_is_a_number_it_is_said_that_the_last_weights_are_taken(tiny, tmp_path):
    log, best = io.StringIO(), replace(JOB, checkpoint=replace(JOB.checkpoint, load_best=True), max_steps=2)
    nan = {"held_out": lambda session, stopping: {"loss": math.nan}, "console": Console(file=log, width=200)}
    _, outcome = run(tiny, tmp_path, job=best, **nan)
    assert (outcome.taken_step, outcome.eval_loss) == (2, None)
    assert "no checkpoint has a held-out loss: the last weights are taken" in log.getvalue()
    patient = replace(JOB, evaluation=replace(JOB.evaluation, every_steps=1, patience=1))
    run(tiny, tmp_path / "patient", job=patient, **nan)
    said = "after step 1 of 6: the last evaluation found no finite held-out loss (evaluation.patience)\n"
    assert said in log.getvalue()


def test_an_evaluation_that_a_stop_left_out_is_made_up_for_when_the_run_goes_on(tiny, tmp_path):
    """Its loss is in the log and in the checkpoint, as of a run that was not stopped; also where it is the last one."""
    losses, stop, asked = {2: 3.0, 4: 1.0, 6: 2.0}, StopSignal(), []

    def held_out(session, stopping):
        asked.append(steps[len(asked)])
        stop.requested = asked == [2] or asked == [2, 2, 4, 6]
        return None if stopping() else {"loss": losses[asked[-1]]}

    steps = [2, 2, 4, 6, 6]
    for _ in range(2):
        with pytest.raises(StoppedOnRequest):
            run(tiny, tmp_path, held_out=held_out, stop=stop)
        stop.requested = False
    _, outcome = run(tiny, tmp_path, held_out=held_out)
    assert asked == steps and (outcome.resumed_after, outcome.eval_loss) == (6, 2.0)
    logged = {row["step"]: row["eval_loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in row}
    assert logged == losses
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/*/state.json")}
    assert {name: state["eval_loss"] for name, state in found.items()} == {"step-4": 1.0, "step-6": 2.0}
    assert found["step-6"]["held_out"] == {"lowest": 1.0, "step": 4, "in_vain": 1}


def test_training_ends_where_the_held_out_loss_has_not_fallen_for_so_many_evaluations(tiny, tmp_path):
    """Also of a run that was stopped between two of them; one that has ended goes on where none is waited for."""
    log = io.StringIO()
    patient = replace(JOB, evaluation=replace(JOB.evaluation, every_steps=1, patience=2), max_steps=9)
    losses = {1: 3.0, 2: 1.0, 3: math.nan, 4: 1.5}
    stop = StopSignal()

    def held_out(session, stopping):
        step = len(asked) + 1
        asked.append(step)
        stop.requested = step == 3
        return {"loss": losses[step]}

    asked = []
    with pytest.raises(StoppedOnRequest):
        run(tiny, tmp_path, job=patient, held_out=held_out, stop=stop)
    stop.requested = False
    given = {"held_out": held_out, "console": Console(file=log, width=200)}
    _, outcome = run(tiny, tmp_path, job=patient, **given)
    assert asked == [1, 2, 3, 4] and (outcome.steps, outcome.taken_step) == (4, 4)
    assert "ends after step 4 of 9: the last 2 evaluations found no lower held-out loss than 1.0000 at step 2" in (
        log.getvalue()
    )
    assert "step 4/4 " in log.getvalue()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["steps"] == 4
    _, outcome = run(tiny, tmp_path, job=patient, held_out=None)
    assert (outcome.steps, outcome.resumed_after) == (4, 4)
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    less = replace(patient, evaluation=replace(patient.evaluation, patience=1))
    _, outcome = run(tiny, tmp_path, job=less, held_out=None)  # ends where it goes on
    assert outcome.steps == outcome.resumed_after == read_metrics(tmp_path / "metrics.jsonl")[-1]["steps"] == 3
    _, outcome = run(tiny, tmp_path, job=patient, held_out=lambda session, stopping: {"loss": 1.5})
    best = replace(patient, checkpoint=replace(JOB.checkpoint, load_best=True))
    _, outcome = run(tiny, tmp_path, job=best, held_out=None)
    assert (outcome.steps, outcome.taken_step) == (4, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-2")
    given["console"] = Console(file=log, width=200)
    _, outcome = run(tiny, tmp_path, job=best, **given)
    assert "step 2 had the lowest held-out loss, 1.0000, and no checkpoint of it is there" in log.getvalue()
    assert outcome.taken_step == 4
    to_the_end = replace(patient, evaluation=replace(patient.evaluation, patience=None))
    _, outcome = run(tiny, tmp_path, job=to_the_end, held_out=lambda session, stopping: {"loss": 5.0})
    assert (outcome.steps, outcome.resumed_after) == (9, 4)
