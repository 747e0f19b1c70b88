"""Without a network the Hub's library says nothing and gives up soon; what else fails is tried again as ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from loadmaster import catalog, hub

NOWHERE = "http://nowhere.invalid"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(hub, "_failed", 0)


def client(answers) -> httpx.Client:
    """Of a network whose answers, or errors, are these."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return httpx.Response(found)

    return hub._patient(httpx.Client(transport=httpx.MockTransport(answer)))


def unresolved() -> httpx.ConnectError:
    error = httpx.ConnectError("[Errno -2] Name or service not known")
    error.__cause__ = socket.gaierror(-2, "Name or service not known")
    return error


def test_a_name_that_stays_unresolved_is_given_up_and_one_that_comes_back_is_not():
    asked = client(iter([*(unresolved() for _ in range(4)), 200, unresolved()]))
    for expected in (*[httpx.ConnectError] * 3, OfflineModeIsEnabled):
        with pytest.raises(expected):
            asked.get(NOWHERE)
    assert asked.get(NOWHERE).status_code == 200
    with pytest.raises(httpx.ConnectError):
        asked.get(NOWHERE)


def test_other_failures_stay_what_they_are_however_often():
    refused = [httpx.ConnectError("Connection refused") for _ in range(9)]
    asked = client(iter([*refused, httpx.ReadTimeout("slow"), 503]))
    for _ in refused:
        with pytest.raises(httpx.ConnectError):
            asked.get(NOWHERE)
    with pytest.raises(httpx.ReadTimeout):
        asked.get(NOWHERE)
    assert asked.get(NOWHERE).status_code == 503


SCRIPT = """
import sys
from loadmaster import hub
hub.quieten()
hub.settle()
import huggingface_hub, huggingface_hub.errors
try:
    huggingface_hub.hf_hub_download("a/b", "config.json", endpoint="http://nowhere.invalid", cache_dir=sys.argv[1])
except huggingface_hub.errors.LocalEntryNotFoundError:
    sys.exit(9)
"""


def test_without_a_network_a_download_fails_in_seconds_and_without_a_word(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_VERBOSITY")}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")
    assert time.monotonic() - start < 18  # the library's own five tries wait 23 s


def test_a_plan_of_a_model_of_the_catalogue_does_not_import_the_client():
    name = next(iter(catalog.shapes()))
    code = f"import sys; from loadmaster import hub; hub.settle({name!r}); assert 'httpx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
