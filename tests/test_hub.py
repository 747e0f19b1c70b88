"""Without a network the Hub's library says nothing and gives up at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from loadmaster import catalog, hub
from loadmaster.config.compose import compose
from loadmaster.config.schema import ModelConfig
from loadmaster.errors import LoadmasterError
from loadmaster.models.resolve import resolve_base


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[str]:
    """Names that were looked up, of which none is known."""
    names: list[str] = []

    def look_up(host, *_):
        names.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv(hub.OFFLINE, "for the end of this test to take away")
    monkeypatch.delenv(hub.OFFLINE)
    monkeypatch.setattr(hub, "out_of_reach", None)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return names


def test_a_hub_that_cannot_be_resolved_is_not_asked_and_the_error_says_so(asked):
    hub.settle()
    assert asked == ["huggingface.co"] and os.environ[hub.OFFLINE] == "1"
    with pytest.raises(LoadmasterError, match=r"huggingface\.co cannot be resolved"):
        resolve_base(ModelConfig(name="some/unknown-model"))


@pytest.mark.parametrize("name, value", [("https_proxy", "http://127.0.0.1:9"), (hub.OFFLINE, "0")])
def test_a_proxy_resolves_names_itself_and_what_the_user_set_stays(name, value, asked, monkeypatch):
    monkeypatch.setenv(name, value)
    hub.settle()
    assert not asked and hub.out_of_reach is None and os.environ.get(hub.OFFLINE) in (None, "0")


def test_a_plan_of_a_model_of_the_catalogue_looks_nothing_up(asked):
    hub.settle(next(iter(catalog.shapes())))
    assert not asked
    hub.settle("some/unknown-model")
    assert asked


def test_a_failure_that_may_pass_is_tried_again(asked, monkeypatch):
    answers = iter([socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), None])

    def look_up(*_):
        if error := next(answers):
            raise error

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    hub.settle()
    assert hub.out_of_reach is None and hub.OFFLINE not in os.environ


def test_jobs_that_run_elsewhere_or_have_all_they_need_here_look_nothing_up(asked, tiny, monkeypatch):
    hub.settle_for(compose(["launch=slurm"]).job)
    hub.settle_for(compose([f"model.path={tiny}"]).job)
    assert not asked
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")  # no address
    hub.settle()
    monkeypatch.delenv("HF_ENDPOINT")
    hub.settle_for(compose([]).job)
    assert asked == ["huggingface.co"]


def test_without_a_network_a_plan_fails_in_seconds_and_in_one_sentence(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in (hub.OFFLINE, "HF_HUB_VERBOSITY")}
    env["HF_ENDPOINT"] = "https://nowhere.invalid"
    command = [sys.executable, "-m", "loadmaster", "plan", "model.name=some/unknown-model", "--json"]
    start = time.monotonic()
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") < 8
    assert "no config.json found" in done.stderr and "Retry" not in done.stderr
    assert time.monotonic() - start < 22  # the library's own five tries wait 23 s
