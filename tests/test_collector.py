"""Python's collector of cycles is off while a command starts, and on wherever it goes on for long."""

import gc
import io
import weakref
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from loadmaster import collector, pipeline, team
from loadmaster.config.compose import compose
from loadmaster.config.hydra_app import check_command
from loadmaster.ending import ended
from loadmaster.world_stages import StageRun


@pytest.fixture
def paused():
    collector.pause()
    yield
    collector.resume()
    gc.unfreeze()


def run(run_dir) -> None:
    words = ["hardware=cpu", "model=smollm2_135m", "stop_after=train", "data.max_rows=8", f"run_dir={run_dir}"]
    assert pipeline.run(compose(words), Console(file=io.StringIO())) == 0


def test_it_is_off_for_the_plan_and_on_for_what_follows(paused, tmp_path, monkeypatch):
    seen = []
    planned = pipeline.planned
    monkeypatch.setattr(pipeline, "planned", lambda job: (seen.append(gc.isenabled()), planned(job))[1])
    monkeypatch.setattr(StageRun, "_make_materials", lambda self: seen.append(gc.isenabled()))
    monkeypatch.setattr(StageRun, "_examine", lambda self, stage: None)
    monkeypatch.setattr(StageRun, "_train", lambda self, watch: (self.run_dir / "adapter").mkdir() or {})
    run(tmp_path / "run")
    assert seen == [False, True]


def test_a_stage_leaves_nothing_of_its_model_to_the_next(tmp_path, monkeypatch):
    class Layer(torch.nn.Linear):
        """With a forward of its own, as compiled and checkpointed layers have: a cycle."""

    kept = []

    def train(self, watch):
        layer = Layer(2, 2)
        layer.forward = MethodType(Layer.forward, layer)
        kept.append(weakref.ref(layer.weight))
        (self.run_dir / "adapter").mkdir()
        return {}

    monkeypatch.setattr(StageRun, "_make_materials", lambda self: gc.disable())
    monkeypatch.setattr(StageRun, "_examine", lambda self, stage: None)
    monkeypatch.setattr(StageRun, "_train", train)
    try:
        run(tmp_path / "run")
    finally:
        gc.enable()
    assert kept[0]() is None


def test_it_is_on_in_a_process_that_waits_for_its_workers(paused, monkeypatch):
    monkeypatch.setattr(team, "run_stage", lambda *_: {"on": gc.isenabled()})
    plan = SimpleNamespace(hardware=SimpleNamespace(nodes=1), world_size=2)
    assert team.Team().run("train", None, plan, Path("."), None, None, None) == {"on": True}


def test_it_is_on_in_a_process_that_follows_a_lead(paused, tmp_path, monkeypatch):
    follower = SimpleNamespace(follows=True, follow=lambda stop: 0 if gc.isenabled() else 1)
    monkeypatch.setattr(pipeline.Team, "gather", lambda job: follower)
    run(tmp_path / "run")


def test_it_is_on_for_a_sweep_from_the_first_of_its_jobs(paused):
    check_command(["--multirun", "seed=1,2", "hardware=cpu"])
    assert gc.isenabled()


def test_what_was_not_paused_is_not_frozen():
    before = gc.get_freeze_count()
    collector.resume()
    assert gc.isenabled() and gc.get_freeze_count() == before


def test_a_process_that_only_planned_is_not_walked_over_at_its_end(paused):
    before = gc.get_freeze_count()
    assert ended(0) == 0 and gc.get_freeze_count() > before
    gc.unfreeze()
    collector.resume()
    gc.unfreeze()
    assert ended(3) == 3 and gc.get_freeze_count() == 0  # one that trained leaves as ever
