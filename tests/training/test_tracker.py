"""A tracker is the run's guest: it is told of at the start, and ends nothing later."""

import dataclasses

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from loadmaster.config.schema import TrackerConfig
from loadmaster.errors import ConfigError
from loadmaster.training.stop import StopSignal
from loadmaster.training.tracker import open_tracker
from loadmaster.training.world import World
from loadmaster.world_stages import StageRun
from tests.training.test_loop import JOB, PLAN

JOB = dataclasses.replace(JOB, tracker=TrackerConfig("wandb", "mine"))


class Library:
    requires_logging_directory = False
    fails_at: object = "start"

    def __init__(self, project):
        assert project == "mine"
        self.logged = []

    def start(self):
        if self.fails_at == "start":
            raise RuntimeError("not known at https://me:secret@host/api\nand more")

    def store_init_configuration(self, values):
        pass

    def log(self, figures, step):
        if self.fails_at == step:
            raise ConnectionError("no route to host")
        self.logged.append(step)

    def finish(self):
        if self.fails_at == "finish":
            raise TimeoutError


def test_a_tracker_that_cannot_begin_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Library)
    with pytest.raises(ConfigError, match=r"tracker.name = 'wandb'(.|\n)*\(RuntimeError: not known at https://...@host/api\)"):
        open_tracker(JOB, tmp_path, "hash", True, print)


@pytest.mark.parametrize(("at", "logged"), [(2, [1]), ("finish", [1, 2, 3])])
def test_a_tracker_that_fails_later_is_left_alone(tmp_path, monkeypatch, at, logged):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Library)
    monkeypatch.setattr(Library, "fails_at", at)
    said: list[str] = []
    tracker = open_tracker(JOB, tmp_path, "hash", True, said.append)
    library = tracker._inner
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert library.logged == logged
    assert len(said) == 1 and "Library failed" in said[0] and "metrics.jsonl" in said[0]


def test_one_that_is_not_installed_is_refused_before_a_model_is_downloaded(tmp_path):
    (tmp_path / "plan.json").touch()
    job, materials = dataclasses.replace(JOB, tracker=TrackerConfig("mlflow")), None
    with pytest.raises(ConfigError, match="pip install mlflow"):
        StageRun(job, PLAN, tmp_path, World(), StopSignal(), None, materials).run("train")
