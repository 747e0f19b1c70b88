"""Queue worker: starts the inference server beside it, hands each job to it, streams the answer back.

Copied into a bundle as handler.py, so it stands alone: standard library, httpx and the runpod SDK, which are
in the bundle's requirements.txt. `server.json` beside it says what to start.

A job's `input` is one of

    {"messages": [...], "max_tokens": 64, "stream": true, ...}          a chat
    {"prompt": "...", "max_tokens": 64, ...}                            a completion
    {"openai_route": "/v1/chat/completions", "openai_input": {...}}     what the platform makes of /openai/v1/...

Every mistake is answered with {"error": "what is wrong and what would work"}, which the platform reports as FAILED.
Streams are server-sent events, one or more whole events in each piece. A cancelled job closes its connection,
and the server stops generating. On SIGTERM no new job is taken, those running are finished, then the server ends;
a terminal that closes (SIGHUP) is as SIGTERM, except for what nohup starts.

    VLLM_BASE_URL=http://127.0.0.1:8000 python handler.py --rp_serve_api --rp_api_port 8001    uses a running server
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

SETTINGS = json.loads(Path(os.environ.get("SERVER_JSON", Path(__file__).with_name("server.json"))).read_text("utf-8"))
BASE_URL = os.environ.get("VLLM_BASE_URL", f"http://127.0.0.1:{SETTINGS['port']}").rstrip("/")
SECURE = BASE_URL.lower().startswith("https:")
MODEL = SETTINGS["served_model_name"]
LONGEST_INPUT_BYTES = SETTINGS["longest_input_bytes"]
REQUEST_TIMEOUT_S = float(os.environ.get("REQUEST_TIMEOUT_S", "3600"))
START_TIMEOUT_S = float(os.environ.get("START_TIMEOUT_S", "1800"))
DYING_S = 5.0
"""After the server has died, what running jobs have left to report it."""

CHAT, COMPLETION, MODELS, HEALTH = "/v1/chat/completions", "/v1/completions", "/v1/models", "/health"
POSTED, READ = (CHAT, COMPLETION), (MODELS, HEALTH)

ENDING = threading.Event()


class Refused(Exception):
    """The input is wrong; the message goes to the caller."""


def request_of(given: Any) -> tuple[str, dict[str, Any] | None]:
    """(route, body or None for a route that is only read) of a job's input. Raises Refused."""
    if not isinstance(given, dict) or not given:
        raise Refused('input must be an object with "messages", "prompt" or "openai_route"')
    try:
        size = len(json.dumps(given, ensure_ascii=False, allow_nan=False).encode())  # as it goes to the server
    except (ValueError, TypeError, RecursionError):
        raise Refused("input holds what JSON cannot carry: NaN, half a character, or hundreds of levels") from None
    if size > LONGEST_INPUT_BYTES:
        raise Refused(f"input has {size:,} bytes, at most {LONGEST_INPUT_BYTES:,} are taken")
    if "openai_route" in given or "openai_input" in given:
        return _openai(given)
    if ("messages" in given) == ("prompt" in given):
        raise Refused('input needs either "messages" or "prompt"')
    body = {**_object(given.get("sampling_params", {}), "sampling_params"), **given}
    body.pop("sampling_params", None)
    return (CHAT if "messages" in body else COMPLETION), checked(body)


def _openai(given: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    if extra := sorted(given.keys() - {"openai_route", "openai_input"}):
        raise Refused(f"beside openai_route there is only openai_input, not {', '.join(map(repr, extra))}")
    route = given.get("openai_route", CHAT)
    if route in READ:
        return route, None
    if route not in POSTED:
        raise Refused(f"openai_route {route!r} is not served here; there are {', '.join(POSTED + READ)}")
    return route, checked(_object(given.get("openai_input"), "openai_input"), CHAT if route == CHAT else COMPLETION)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{name} must be an object")
    return value


def checked(body: dict[str, Any], route: str | None = None) -> dict[str, Any]:
    """What the server would answer less clearly, or not at all. Raises Refused."""
    if route is not None and (wanted := "messages" if route == CHAT else "prompt") not in body:
        raise Refused(f'openai_input needs "{wanted}"')
    messages = body.get("messages")
    if "messages" in body:
        if not isinstance(messages, list) or not messages:
            raise Refused('"messages" must be a list with at least one message')
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise Refused(f'messages[{index}] must be an object with "role" and "content"')
    elif not isinstance(body.get("prompt"), str | list) or not body["prompt"]:
        raise Refused('"prompt" must be a text that is not empty')
    if not isinstance(body.get("stream", False), bool):
        raise Refused('"stream" must be true or false')
    for name in ("max_tokens", "n"):
        value = body.get(name, 1)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise Refused(f'"{name}" must be an integer above 0')
    if body.get("model", MODEL) != MODEL:
        raise Refused(f"model {body['model']!r} is not served here; it is {MODEL!r} (or leave it out)")
    return {**body, "model": MODEL}


async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
    """Yields the answer once, or the pieces of a stream; {"error": text} for everything that goes wrong."""
    try:
        route, body = request_of(job.get("input"))
    except Refused as refused:
        yield {"error": str(refused)}
        return
    method = "GET" if body is None else "POST"
    try:
        async with (
            # A server on this machine over plain HTTP: no proxy of the environment, and certificates for another alone.
            httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, trust_env=False, verify=SECURE) as client,
            client.stream(method, BASE_URL + route, json=body) as response,
        ):
            if response.status_code != 200:
                yield {"error": _said(response.status_code, (await response.aread()).decode("utf-8", "replace"))}
            elif body is not None and body.get("stream"):
                async for piece in whole_events(response.aiter_bytes()):
                    yield piece
            elif route == HEALTH:
                yield {"healthy": True}
            else:
                yield json.loads(await response.aread())
    except httpx.TimeoutException:
        yield {"error": f"no answer within {REQUEST_TIMEOUT_S:.0f} s"}
    except httpx.HTTPError as error:
        yield {"error": f"the inference server did not answer ({type(error).__name__}: {error})"}
    except ValueError:
        yield {"error": "the inference server answered with something that is not JSON"}


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Text of whole server-sent events: a piece of a network stream may end in the middle of a character."""
    rest = b""
    async for piece in pieces:
        rest += piece
        end = rest.rfind(b"\n\n")
        if end >= 0:
            yield rest[: end + 2].decode("utf-8", errors="replace")
            rest = rest[end + 2 :]
    if rest.strip():
        yield rest.decode("utf-8", errors="replace")


def _said(status: int, text: str) -> str:
    """The server's own message, out of whatever it is wrapped in."""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        message = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        message = text.strip()[:500]
    return f"the inference server refused (HTTP {status}): {message}"


def start_server() -> subprocess.Popen[bytes]:
    """In a session of its own: a signal to the worker ends it only after the running jobs."""
    print("starting:", " ".join(SETTINGS["command"]), flush=True)
    told: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))  # until it would be stopped as well
    server = subprocess.Popen(SETTINGS["command"], start_new_session=True)
    atexit.register(stop_server, server)
    signal.signal(signal.SIGTERM, usual)
    if told:
        sys.exit(128 + signal.SIGTERM)
    return server


def stop_server(server: subprocess.Popen[bytes]) -> None:
    ENDING.set()
    if server.poll() is not None:
        return
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def end_the_server_too() -> None:
    """SIGTERM, until the SDK listens, and a terminal that closes: a server alone would keep its GPU, and a bill."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def wait_until_healthy(server: subprocess.Popen[bytes] | None) -> None:
    """Exits with a sentence when the server dies or takes longer than START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server is not None and server.poll() is not None:
            sys.exit(f"the inference server ended with code {server.returncode} before it was ready; see its log above")
        try:
            with urllib.request.urlopen(BASE_URL + HEALTH, timeout=10) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(1)
    sys.exit(f"the inference server was not ready after {START_TIMEOUT_S:.0f} s; START_TIMEOUT_S=... waits longer")


def end_with_the_server(server: subprocess.Popen[bytes]) -> None:
    """A worker without its server takes jobs and fails them all; ending makes the platform start another."""
    server.wait()
    if ENDING.is_set():
        return
    print(f"the inference server ended with code {server.returncode}: this worker ends", file=sys.stderr, flush=True)
    time.sleep(DYING_S)
    os._exit(1)


def main() -> None:
    import runpod

    end_the_server_too()
    server = None if "VLLM_BASE_URL" in os.environ else start_server()
    wait_until_healthy(server)
    if server is not None:
        threading.Thread(target=end_with_the_server, args=(server,), daemon=True).start()
    most = SETTINGS["max_concurrency"]
    runpod.serverless.start(
        {"handler": handler, "concurrency_modifier": lambda _: most, "return_aggregate_stream": True}
    )


if __name__ == "__main__":
    main()
