"""What makes it another run, and what makes a stage stale: every field of the schema has its place."""

from __future__ import annotations

import pytest

from loadmaster.config.compose import compose
from loadmaster.config.fields import fields
from loadmaster.config.jobhash import NOT_INPUTS, SPREAD, STAGE_FIELDS, differing, job_hash, stage_inputs_hash
from loadmaster.config.schema import STAGES, Job


def job(*overrides: str) -> Job:
    return compose(list(overrides)).job


@pytest.mark.parametrize("key", fields())
def test_every_field_is_the_input_of_one_stage_or_of_none(key: str):
    places = [name for names in STAGE_FIELDS.values() for name in names] + [*SPREAD, *NOT_INPUTS]
    assert sum(key == place or key.startswith(f"{place}.") for place in places) == 1


@pytest.mark.parametrize(
    ("override", "first_stale"),
    [
        ("lora.rank=8", "plan"),
        ("seed=1", "plan"),
        ("data.max_rows=10", "plan"),
        ("evaluation.task=none", "evaluate"),
        ("export.formats=[bf16]", "export"),
        ("export.thresholds.fp8.max_mean_kl=0.3", "export"),
        ("endpoint.server=vllm==0.14.0", "export"),
        ("endpoint.serve_as=bf16", "bundle"),
        ("run_dir=elsewhere", None),
        ("stop_after=train", None),
        ("tracker=none", None),
        ("checkpoint.every_steps=3", None),
        ("evaluation.every_steps=3", None),
        ("evaluation.batch_size=1", None),
    ],
)
def test_a_change_makes_the_first_stage_that_reads_it_and_all_after_it_stale(override: str, first_stale: str | None):
    before, after = job(), job(override)
    stale = [stage for stage in STAGES if stage_inputs_hash(before, stage) != stage_inputs_hash(after, stage)]
    assert stale == (list(STAGES[STAGES.index(first_stale) :]) if first_stale else [])
    assert (job_hash(before) != job_hash(after)) == (first_stale == "plan")


@pytest.mark.parametrize("override", ["hardware=h100_80gb_x1", "sharding=fsdp", "micro_batch_size=1", "offload=all"])
def test_how_the_work_is_spread_is_the_plans_alone(override: str):
    before, after = job(), job(override)
    stale = [stage for stage in STAGES if stage_inputs_hash(before, stage) != stage_inputs_hash(after, stage)]
    assert stale == ["plan"] and job_hash(before) == job_hash(after)


def test_the_hash_does_not_depend_on_where_or_how_a_value_was_set(tmp_path, monkeypatch):
    assert job_hash(job("lora.rank=16")) == job_hash(job())
    here = job_hash(job())
    monkeypatch.chdir(tmp_path)
    assert job_hash(job()) == here
    assert job_hash(Job()) == job_hash(Job())


@pytest.mark.parametrize(
    ("recipe", "begins"), [("smoke", "328b970a"), ("lora_8b", "4295f40d"), ("full_8b", "d88ea3d4")]
)
def test_runs_made_before_a_field_existed_are_gone_on_with(recipe: str, begins: str):
    """As version 0.1 hashed them on 2026-11-26; a recipe that is changed on purpose gets its new value here."""
    assert job_hash(job(f"recipe={recipe}", "stop_after=plan")).startswith(begins)


def test_modules_to_save_are_a_set():
    hashes = {job_hash(job(f"lora.modules_to_save=[{names}]")) for names in ("norm,lm_head", "lm_head,norm,norm")}
    assert len(hashes) == 1 and job_hash(job()) not in hashes


def test_a_learning_rate_that_is_left_open_is_the_number_that_it_is():
    for method, rate in (("lora", "2e-4"), ("full", "1e-5")):
        opened = ["recipe=auto", f"method={method}"]
        left, given = job(*opened), job(*opened, f"optimizer.lr={rate}")
        assert job_hash(left) == job_hash(given) and differing(left, given) == []
    left, given = job("recipe=auto"), job("recipe=auto", "optimizer.lr=2e-4")  # 1e-5, if the plan is to train it whole
    assert job_hash(left) != job_hash(given)
    assert differing(given, left) == ["optimizer.lr is auto there and 0.0002 here"]


def test_what_differs_is_said_as_it_is_written():
    mine, theirs = job("max_steps=null", "data.packing=true"), job("max_steps=6", "data.packing=false")
    said = ["data.packing is false there and true here", "max_steps is 6 there and null here"]
    assert differing(mine, theirs) == said


def test_columns_that_one_job_alone_names_differ():
    without, named = job(), job("data.columns={prompt: query}")
    assert differing(named, without) == ["data.columns is null there and {prompt: query} here"]
    assert differing(without, named) == ["data.columns is {prompt: query} there and null here"]


def test_a_run_that_is_done_goes_on_to_take_its_best_checkpoint():
    done, best = job(), job("checkpoint.load_best=true", "evaluation.every_steps=auto")
    for other in (best, job("evaluation.patience=2", "evaluation.every_steps=auto")):
        assert job_hash(done) == job_hash(other)
        stale = [stage for stage in STAGES if stage_inputs_hash(done, stage) != stage_inputs_hash(other, stage)]
        assert stale == list(STAGES[1:])
