"""The bundle's own worker, over a server that speaks OpenAI's protocol; at the end under the real runpod SDK."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from fake_openai import MODEL, WORDS, FakeOpenAI
from fake_queue import FakeQueue

HANDLER = Path(__file__).parents[2] / "loadmaster/endpoint/handler.py"
SETTINGS = {
    "command": [sys.executable, "-c", "raise SystemExit(3)"], "port": 1, "served_model_name": MODEL,
    "max_concurrency": 4, "longest_input_bytes": 2000,
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def nested(levels: int) -> list:
    """Lists in lists."""
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        yield fake


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "server.json"
    path.write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture
def worker(server: FakeOpenAI, settings: Path, monkeypatch) -> ModuleType:
    monkeypatch.setenv("SERVER_JSON", str(settings))
    monkeypatch.setenv("VLLM_BASE_URL", server.url)
    spec = importlib.util.spec_from_file_location("bundle_handler", HANDLER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(worker: ModuleType, given: Any) -> list[Any]:
    async def collect() -> list[Any]:
        return [piece async for piece in worker.handler({"id": "1", "input": given})]

    return asyncio.run(collect())


def test_a_prompt_is_as_long_as_it_is_on_its_way_in_any_script(worker) -> None:
    """Escaped it would be three times as long, and a prompt that fits the context would be refused."""
    assert "are taken" not in str(run(worker, {"prompt": "س" * 900, "max_tokens": 5}))
    assert "at most 2,000 are taken" in run(worker, {"prompt": "س" * 1000})[0]["error"]


def test_messages_prompts_and_openai_routes_are_answered(worker, server) -> None:
    for given in (
        {**CHAT, "max_tokens": 5},
        {"prompt": "Hi", "sampling_params": {"max_tokens": 5}},
        {"openai_route": "/v1/chat/completions", "openai_input": {**CHAT, "max_tokens": 5}},
    ):
        (answer,) = run(worker, given)
        assert answer["choices"][0]["message"]["content"] == "".join(WORDS)
        assert server.bodies[-1]["model"] == MODEL and server.bodies[-1]["max_tokens"] == 5
        assert "sampling_params" not in server.bodies[-1]
    assert run(worker, {"openai_route": "/v1/models"}) == [{"object": "list", "data": [{"id": MODEL}]}]
    assert run(worker, {"openai_route": "/health"}) == [{"healthy": True}]


def test_a_stream_comes_in_whole_events_with_whole_characters(worker, server) -> None:
    server.seconds_a_word = 0.05  # or a busy machine reads all of it at once
    pieces = run(worker, {**CHAT, "stream": True})
    assert len(pieces) > 1 and all(piece.endswith("\n\n") for piece in pieces)
    events = [line.removeprefix("data: ") for line in "".join(pieces).split("\n\n") if line]
    assert events.pop() == "[DONE]"
    assert [json.loads(event)["choices"][0]["delta"]["content"] for event in events] == WORDS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "input must be an object"),
        ({}, "input must be an object"),
        ({"text": "Hi"}, '"messages" or "prompt"'),
        ({**CHAT, "prompt": "Hi"}, 'either "messages" or "prompt"'),
        ({"messages": "Hi"}, "must be a list"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["Hi"]}, r"messages\[0\]"),
        ({"prompt": ""}, "not empty"),
        ({**CHAT, "max_tokens": 0}, '"max_tokens" must be an integer above 0'),
        ({**CHAT, "max_tokens": True}, '"max_tokens" must be an integer above 0'),
        ({**CHAT, "stream": "yes"}, '"stream" must be true or false'),
        ({**CHAT, "model": "gpt-4"}, "'gpt-4' is not served here; it is 'tickets'"),
        ({**CHAT, "sampling_params": 3}, "sampling_params must be an object"),
        ({"openai_route": "/v1/load_lora_adapter", "openai_input": {}}, "is not served here"),
        ({"openai_route": "/v1/completions", "openai_input": CHAT}, 'needs "prompt"'),
        ({"openai_route": "/v1/chat/completions"}, "openai_input must be an object"),
        ({"openai_input": CHAT, "stream": True}, "only openai_input"),
        ({"prompt": "x" * 3000}, "at most 2,000 are taken"),
        ({**CHAT, "temperature": float("nan")}, "what JSON cannot carry"),
        ({"prompt": "\ud83d"}, "what JSON cannot carry"),
        ({"prompt": "Hi", "stop": nested(5000)}, "what JSON cannot carry"),
        ({**CHAT, "openai_route": ["/v1/models"]}, "only openai_input"),
        ({"openai_route": ["/v1/models"]}, "is not served here"),
        ({"prompt": "Hi", "sampling_params": {"messages": [1]}}, r"messages\[0\]"),
        ({**CHAT, "model": None}, "is not served here"),
        ({**CHAT, "n": 2.0}, '"n" must be an integer above 0'),
    ],
)
def test_wrong_input_is_refused_with_a_sentence_and_never_reaches_the_server(worker, server, given, said) -> None:
    with pytest.raises(worker.Refused, match=said):
        worker.request_of(given)
    (answer,) = run(worker, given)
    assert list(answer) == ["error"] and isinstance(answer["error"], str)
    assert server.bodies == []


def test_a_prompt_that_is_too_long_for_the_model_is_refused_in_the_servers_words(worker) -> None:
    for extra in ({}, {"stream": True}):
        (answer,) = run(worker, {"prompt": "x" * 400, **extra})
        assert answer == {"error": "the inference server refused (HTTP 400): maximum context length is 200 tokens"}


def test_a_server_that_is_gone_is_said_to_be(worker, server) -> None:
    server.__exit__()
    (answer,) = run(worker, CHAT)
    assert "did not answer" in answer["error"]


def test_a_server_elsewhere_shows_its_certificate(worker, server, monkeypatch) -> None:
    def refused(**asked: Any) -> None:
        raise httpx.ConnectError(f"verify={asked['verify']}")

    monkeypatch.setattr(httpx, "AsyncClient", refused)
    monkeypatch.setattr(worker, "SECURE", True)
    assert "verify=True" in run(worker, {"prompt": "Hello"})[0]["error"]


def test_a_cancelled_job_hangs_up_so_that_the_server_stops(worker, server) -> None:
    server.seconds_a_word = 0.1

    async def cancel() -> list[str]:
        pieces = []

        async def job() -> None:
            async for piece in worker.handler({"id": "1", "input": {**CHAT, "stream": True}}):
                pieces.append(piece)

        task = asyncio.create_task(job())
        while not pieces:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pieces

    pieces = asyncio.run(cancel())
    deadline = time.monotonic() + 120
    while not server.gone and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.gone == 1 and "[DONE]" not in "".join(pieces)


def test_requests_run_side_by_side(worker, server) -> None:
    server.together = threading.Barrier(5)

    async def many() -> list[Any]:
        async def one() -> Any:
            return [piece async for piece in worker.handler({"id": "1", "input": CHAT})]

        return await asyncio.gather(*(one() for _ in range(5)))

    answers = asyncio.run(many())
    assert [answer[0]["choices"][0]["message"]["content"] for answer in answers] == ["".join(WORDS)] * 5


def test_a_server_that_ends_at_once_ends_the_worker_with_a_sentence(worker) -> None:
    with pytest.raises(SystemExit, match="ended with code 3 before it was ready"):
        server = worker.start_server()
        server.wait()
        worker.wait_until_healthy(server)


@pytest.fixture(scope="session")
def sdk(tmp_path_factory) -> Path:
    """A Python with the bundle's requirements (about 15 s and 134 MB; needs the package index)."""
    folder = tmp_path_factory.mktemp("sdk") / "venv"
    requirements = HANDLER.parent / "templates/requirements.txt"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "-q", "-r", requirements], check=True)
    return folder / "bin/python"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def post(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_under_the_real_sdk_jobs_streams_and_mistakes_are_answered(sdk, server, settings) -> None:
    port = free_port()
    environment = {**os.environ, "SERVER_JSON": str(settings), "VLLM_BASE_URL": server.url}
    command = [sdk, HANDLER, "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    worker = subprocess.Popen(command, env=environment, cwd=settings.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(url + "/openapi.json", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        status, answer = post(url + "/runsync", {"input": CHAT})
        assert (status, answer["status"]) == (200, "COMPLETED")
        assert answer["output"][0]["choices"][0]["message"]["content"] == "".join(WORDS)

        _, job = post(url + "/run", {"input": {**CHAT, "stream": True}})
        _, streamed = post(f"{url}/stream/{job['id']}", {})
        assert "".join(piece["output"] for piece in streamed["stream"]).endswith("data: [DONE]\n\n")

        # The local API reports a generator's error inside the payload; in the cloud the SDK makes it FAILED.
        for given in ({"text": "Hi"}, {"prompt": "x" * 3000}):
            status, answer = post(url + "/runsync", {"input": given})
            assert status == 200 and answer["output"][0]["error"]
        assert post(url + "/runsync", {"input": "Hi"})[0] == 422
    finally:
        worker.send_signal(signal.SIGINT)
        assert worker.wait(120) == 0


@pytest.mark.parametrize("begun", [False, True], ids=["starting", "serving"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_no_server_is_left_when_the_worker_is_told_to_end_or_its_terminal_closes(number, begun, settings) -> None:
    """It is in a session of its own, and would keep its GPU."""
    folder, port = settings.parent, free_port()
    sdk = "import signal, sys, time\nclass serverless:\n    def start(_):\n"
    sdk += "        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n        open('begun', 'w'), time.sleep(60)\n"
    (folder / "runpod.py").write_text(sdk)
    fake = [sys.executable, str(Path(__file__).with_name("fake_openai.py")), str(port), "0.5"]
    waits = [sys.executable, "-c", "import time; open('begun', 'w'); time.sleep(60)"]
    settings.write_text(json.dumps({**SETTINGS, "command": fake if begun else waits, "port": port}))
    environment = {**os.environ, "SERVER_JSON": str(settings), "PYTHONPATH": str(folder)}
    with subprocess.Popen([sys.executable, HANDLER], env=environment, cwd=folder) as worker:
        deadline = time.monotonic() + 60
        while not (folder / "begun").exists():
            assert worker.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        server = int(Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text())
        worker.send_signal(number)
        assert worker.wait(120) == (0 if begun else 128 + signal.SIGTERM)
    assert not Path(f"/proc/{server}").exists()


@pytest.mark.slow
def test_as_the_platform_runs_it_mistakes_fail_stops_stop_and_a_drain_finishes_first(sdk, settings) -> None:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("fake_openai.py")), str(port), "0.5"]
    settings.write_text(json.dumps({**SETTINGS, "command": command, "port": port}))
    with FakeQueue() as queue:
        environment = {**os.environ, "SERVER_JSON": str(settings), **queue.environment}
        worker = subprocess.Popen([sdk, HANDLER], env=environment, cwd=settings.parent)
        try:
            queue.waiting = [{"id": "wrong", "input": {"text": "Hi"}}, {"id": "chat", "input": CHAT}]
            queue.until(lambda: {"wrong", "chat"} <= queue.done.keys(), 60)
            assert queue.done["wrong"]["error"] == 'input needs either "messages" or "prompt"'
            assert "output" not in queue.done["wrong"]
            assert queue.done["chat"]["output"][0]["choices"][0]["message"]["content"] == "".join(WORDS)

            queue.waiting = [{"id": "stopped", "input": {**CHAT, "stream": True}}]
            queue.until(lambda: queue.streamed.get("stopped", 0) >= 1)
            queue.stop = ["stopped"]
            queue.until(lambda: not queue.stop)
            time.sleep(2)
            assert "stopped" not in queue.done and queue.streamed["stopped"] < len(WORDS) + 1

            queue.waiting = [{"id": "last", "input": CHAT}]
            queue.until(lambda: not queue.waiting)
            time.sleep(0.7)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(120) == 0
            assert queue.done["last"]["output"][0]["choices"]
            with pytest.raises(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
