"""What a deployed endpoint answers: jobs through its queue, and streams through its OpenAI route.

HTTP 200 with status COMPLETED is no proof of an answer: workers put {"error": ...} into the output. Every answer is
looked into, and what is wrong becomes a sentence. A call that the platform could not take (429, 5xx, no answer) is
made again: a job that is run twice costs a second of a worker, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import httpx
import tenacity

from loadmaster.errors import ProviderError

T = TypeVar("T")

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
CHAT = "/v1/chat/completions"
ATTEMPTS = 4
CARGO = (
    "the", "crate", "of", "green", "tea", "stands", "beside", "two", "small", "boxes", "and", "a", "long", "red",
)


class NotAnswered(ProviderError):
    """The endpoint is there and does not answer as it should."""


class Unreached(NotAnswered):
    """The platform did not take the call, or its answer was lost; the same call may do better."""


@dataclass(frozen=True)
class Timing:
    """One streamed answer, as its caller saw it."""

    first_token_s: float
    seconds: float
    tokens: int
    """As the server counts them, or events with text where it does not say."""
    prompt_tokens: int | None = None


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
    prompt_tokens: int | None = None
    """Of the longest prompt, as the server counts them."""


class Inference(contextlib.AbstractContextManager):
    """One QUEUE endpoint. `urls` are the provider's requestUrls; the key goes into one header and nowhere else."""

    def __init__(self, urls: Mapping[str, str], key: str, poll_s: float = 2.0, timeout_s: float = 60.0):
        self.urls, self.poll_s = urls, poll_s
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=timeout_s)

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, given: dict[str, Any], wait_s: float) -> Any:
        """The output of one job, looked into. A job that is not done after wait_s is cancelled, Ctrl-C as well.

        Raises NotAnswered.
        """
        job = self._json("POST", self.urls["run"], {"input": given})
        id, deadline = job.get("id"), time.monotonic() + wait_s
        if not isinstance(id, str):
            raise NotAnswered("the endpoint took no job: its answer has no id")
        try:
            while job.get("status") not in TERMINAL:
                if time.monotonic() > deadline:
                    raise NotAnswered(
                        f"no answer within {wait_s:.0f} s (the job was {job.get('status')}): no worker came up, or "
                        "the model does not load; the worker's log in the provider's console says which"
                    )
                time.sleep(self.poll_s)
                job = self._json("GET", self._of("status", id))
        except BaseException:
            self._cancel(id)
            raise
        if wrong := error_in(job):
            raise NotAnswered(wrong)
        return job["output"]

    def health(self) -> dict[str, Any]:
        """{"jobs": {"completed", "failed", "inProgress", "inQueue", ...}, "workers": {...}} of this moment."""
        return self._json("GET", self.urls["health"])

    def stream(self, body: dict[str, Any]) -> Timing:
        """A streamed chat through the OpenAI route; begun again where it could not begin. Raises NotAnswered."""
        return self._again(lambda: self._stream({**body, "stream": True, "stream_options": {"include_usage": True}}))

    def _stream(self, body: dict[str, Any]) -> Timing:
        url = self.urls["run"].removesuffix("/run") + "/openai" + CHAT
        start, first, tokens, usage = time.monotonic(), None, 0, {}
        try:
            with self._client.stream("POST", url, json=body) as response:
                _refuse_status(response, CHAT)
                for line in response.iter_lines():
                    event = _event(line)
                    if event is None:
                        continue
                    if "error" in event:
                        raise NotAnswered(f"the stream carries an error: {_text(event['error'])}")
                    usage = event.get("usage") or usage
                    if any(choice.get("delta", {}).get("content") for choice in event.get("choices", [])):
                        first = time.monotonic() if first is None else first
                        tokens += 1
        except httpx.HTTPError as error:
            raise Unreached(f"{CHAT}: the stream broke ({type(error).__name__})") from None
        if first is None:
            raise NotAnswered(f"{CHAT}: the stream ended without a token")
        tokens = usage.get("completion_tokens") or tokens
        return Timing(first - start, time.monotonic() - start, tokens, usage.get("prompt_tokens"))

    def load(self, bodies: list[dict[str, Any]], at_once: int = 4) -> Load:
        """A streamed answer to each, so many at a time."""
        start = time.monotonic()
        with ThreadPoolExecutor(at_once) as pool:
            timings = list(pool.map(self.stream, bodies))
        seconds = time.monotonic() - start
        firsts = [timing.first_token_s for timing in timings]
        each = [(t.tokens - 1) / (t.seconds - t.first_token_s) for t in timings if t.seconds > t.first_token_s]
        return Load(
            len(bodies), at_once, median(firsts), max(firsts), sum(t.tokens for t in timings) / seconds,
            median(each) if each else 0.0, max((t.prompt_tokens or 0 for t in timings), default=0) or None,
        )

    def _of(self, name: str, id: str) -> str:
        url = self.urls[name]
        return url.replace("{job_id}", id) if "{job_id}" in url else f"{url}/{id}"

    def _cancel(self, id: str) -> None:
        """A job that nobody waits for must not keep a worker up; what hinders that is not what went wrong."""
        with contextlib.suppress(NotAnswered):
            self._json("POST", self._of("cancel", id))

    def _again(self, call: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unreached), stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=self.poll_s, max=30), reraise=True,
        )
        return retrying(call)

    def _json(self, method: str, url: str, body: Any = None) -> dict[str, Any]:
        return self._again(lambda: self._once(method, url, body))

    def _once(self, method: str, url: str, body: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, url, json=body)
            _refuse_status(response, f"{method} {url}")
            found = response.json()
        except httpx.HTTPError as error:
            raise Unreached(f"{method} {url}: no answer ({type(error).__name__})") from None
        except (ValueError, RecursionError):
            raise Unreached(f"{method} {url}: HTTP {response.status_code} and no JSON") from None
        if not isinstance(found, dict):
            raise NotAnswered(f"{method} {url}: the answer is no object")
        return found


def loads(body: dict[str, Any], requests: int, prompt_tokens: int, output_tokens: int) -> list[dict[str, Any]]:
    """Chats of about so many tokens, no two with the same beginning, each answered with output_tokens.

    Half as many words as tokens: their number for a tokenizer is not known here, and one too many is refused.
    """
    words = [CARGO[at % len(CARGO)] for at in range(max(1, prompt_tokens // 2))]
    texts = [" ".join([str(number), *words]) for number in range(requests)]
    length = {"max_tokens": output_tokens, "ignore_eos": True, "temperature": 0}
    return [{**body, "messages": [{"role": "user", "content": text}], **length} for text in texts]


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
        found = {"text": choice["message"]["content"] or "", "finish_reason": choice["finish_reason"]}
        found["model"] = first["model"]
    except (KeyError, IndexError, TypeError):
        raise NotAnswered(f"the output is no chat completion: {_text(output)}") from None
    return found


def _refuse_status(response: httpx.Response, what: str) -> None:
    status = response.status_code
    if status == 429 or status >= 500:
        raise Unreached(f"{what}: HTTP {status}")
    if status >= 400:
        raise NotAnswered(f"{what}: HTTP {status}")


def _event(line: str) -> dict[str, Any] | None:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    try:
        found = json.loads(line.removeprefix("data: "))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        value = value["message"]
    return str(value)[:300]
