"""What a deployed endpoint answers: jobs through its queue, and streams through its OpenAI route.

HTTP 200 with status COMPLETED is no proof of an answer: workers put {"error": ...} into the output. Every answer is
looked into, and what is wrong becomes a sentence.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from loadmaster.errors import ProviderError

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
CHAT = "/v1/chat/completions"


class NotAnswered(ProviderError):
    """The endpoint is there and does not answer as it should."""


@dataclass(frozen=True)
class Timing:
    """One streamed answer, as its caller saw it."""

    first_token_s: float
    seconds: float
    tokens: int
    """Events with text, one a token for vLLM."""


@dataclass(frozen=True)
class Load:
    """A short bounded load."""

    requests: int
    at_once: int
    first_token_s: float
    """Median."""
    slowest_first_token_s: float
    tokens_per_second: float
    """Of all answers together."""
    tokens_per_second_each: float
    """Of one answer after its first token, median."""


class Inference:
    """One QUEUE endpoint. `urls` are the provider's requestUrls; the key goes into one header and nowhere else."""

    def __init__(
        self, urls: Mapping[str, str], key: str, poll_s: float = 2.0, timeout_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ):  # fmt: skip
        self.urls, self.poll_s, self.sleep = urls, poll_s, sleep
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=timeout_s)

    def __enter__(self) -> Inference:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, given: dict[str, Any], wait_s: float) -> Any:
        """The output of one job, looked into. A job that is not done after wait_s is cancelled.

        Raises NotAnswered.
        """
        job = self._json("POST", self.urls["run"], {"input": given})
        id, deadline = job.get("id"), time.monotonic() + wait_s
        if not isinstance(id, str):
            raise NotAnswered("the endpoint took no job: its answer has no id")
        while job.get("status") not in TERMINAL:
            if time.monotonic() > deadline:
                self._json("POST", self._of("cancel", id))
                raise NotAnswered(
                    f"no answer within {wait_s:.0f} s (the job was {job.get('status')}): no worker came up, or the "
                    "model does not load; the worker's log in the provider's console says which"
                )
            self.sleep(self.poll_s)
            job = self._json("GET", self._of("status", id))
        if wrong := error_in(job):
            raise NotAnswered(wrong)
        return job["output"]

    def stream(self, body: dict[str, Any]) -> Timing:
        """A streamed chat through the OpenAI route. Raises NotAnswered."""
        url = self.urls["run"].removesuffix("/run") + "/openai" + CHAT
        start, first, tokens = time.monotonic(), None, 0
        try:
            with self._client.stream("POST", url, json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    raise NotAnswered(f"{CHAT} answered HTTP {response.status_code}")
                for line in response.iter_lines():
                    event = _event(line)
                    if event is None:
                        continue
                    if "error" in event:
                        raise NotAnswered(f"the stream carries an error: {_text(event['error'])}")
                    if any(choice.get("delta", {}).get("content") for choice in event.get("choices", [])):
                        first = time.monotonic() if first is None else first
                        tokens += 1
        except httpx.HTTPError as error:
            raise NotAnswered(f"{CHAT}: the stream broke ({type(error).__name__})") from None
        if first is None:
            raise NotAnswered(f"{CHAT}: the stream ended without a token")
        return Timing(first - start, time.monotonic() - start, tokens)

    def load(self, body: dict[str, Any], requests: int = 8, at_once: int = 4) -> Load:
        """So many streamed answers, so many at a time."""
        start = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            timings = list(pool.map(lambda _: self.stream(body), range(requests)))
        seconds = time.monotonic() - start
        firsts = [timing.first_token_s for timing in timings]
        each = [(t.tokens - 1) / (t.seconds - t.first_token_s) for t in timings if t.seconds > t.first_token_s]
        return Load(
            requests, at_once, median(firsts), max(firsts), sum(t.tokens for t in timings) / seconds,
            median(each) if each else 0.0,
        )  # fmt: skip

    def _of(self, name: str, id: str) -> str:
        url = self.urls[name]
        return url.replace("{job_id}", id) if "{job_id}" in url else f"{url}/{id}"

    def _json(self, method: str, url: str, body: Any = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, url, json=body)
            found = response.json()
        except httpx.HTTPError as error:
            raise NotAnswered(f"{method} {url}: no answer ({type(error).__name__})") from None
        except ValueError:
            raise NotAnswered(f"{method} {url}: HTTP {response.status_code} and no JSON") from None
        if response.status_code >= 400 or not isinstance(found, dict):
            raise NotAnswered(f"{method} {url}: HTTP {response.status_code}")
        return found


def error_in(job: dict[str, Any]) -> str | None:
    """What is wrong with a job that has ended, wherever the worker put it; None: nothing."""
    if job.get("status") != "COMPLETED":
        reason = job.get("error") or job.get("output") or "no reason given"
        return f"the job ended as {job.get('status')}: {_text(reason)}"
    output = job.get("output")
    for part in output if isinstance(output, list) else [output]:
        if isinstance(part, dict) and part.get("error"):
            return f"the job is COMPLETED and its output carries an error: {_text(part['error'])}"
    if not output:
        return "the job is COMPLETED and its output is empty"
    return None


def answer_in(output: Any) -> dict[str, str]:
    """{"text", "finish_reason", "model"} of a chat's output. Raises NotAnswered when it is none."""
    first = output[0] if isinstance(output, list) and output else output
    try:
        choice = first["choices"][0]
        found = {"text": choice["message"]["content"], "finish_reason": choice["finish_reason"]}
        found["model"] = first["model"]
    except (KeyError, IndexError, TypeError):
        raise NotAnswered(f"the output is no chat completion: {_text(output)}") from None
    if not found["text"]:
        raise NotAnswered("the answer has no text")
    return found


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    try:
        found = json.loads(line.removeprefix("data: "))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _text(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        value = value["message"]
    return str(value)[:300]
