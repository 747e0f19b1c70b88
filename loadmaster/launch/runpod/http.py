"""One HTTP call to the provider, as often as is safe: httpx carries it, tenacity repeats it.

What may be repeated depends on what is known about the call that failed:

    never sent (no connection), or 429    nothing happened        repeat, any method
    timed out, dropped, 5xx, not JSON     it may have happened    repeat GET, PATCH and DELETE; a POST raises
                                                                  Unsure, and its caller looks before it repeats
    any other 4xx                         refused                 raise Refused

Where no connection was ever had, a few tries will do; where one was, the network may come back, and what was made has
to be ended. Either way the first failure is said at once.

The key comes from the environment, goes into one header and nowhere else; every message passes through redact().
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import tenacity
from pydantic import ValidationError

from loadmaster.errors import ProviderError
from loadmaster.launch.given import wrong_address, wrong_key
from loadmaster.launch.provider import NoAnswer

T = TypeVar("T")

BASE_URL = "https://api.runpod.io/v2"
KEY_VARIABLE = "RUNPOD_API_KEY"
BASE_URL_VARIABLE = "RUNPOD_API_BASE_URL_V2"
UNREADABLE = (ValueError, RecursionError, KeyError, TypeError, AttributeError)
"""What reading an answer raises that is no JSON, has brackets or digits by the thousand, or is not as described."""
LONGEST_DETAIL = 500
REMEDIES = {
    401: f"the key in {KEY_VARIABLE} is not accepted; make another one in the provider's console",
    402: "the account's balance does not suffice; add funds",
    403: "the key, or the account, may not do this; give the key read and write access",
    404: "it does not exist any more, or belongs to another account",
    409: "its state does not allow this now; look at it in the provider's console",
    422: "the request does not match the provider's API; loadmaster and the API have grown apart: please report it",
}


class Refused(ProviderError):
    """The provider answered no: nothing was done."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Throttled(NoAnswer):
    """429: nothing was done; after retry_after_s it may be asked again."""

    def __init__(self, message: str, retry_after_s: float | None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotSent(NoAnswer):
    """No connection: nothing was done."""

    def __init__(self, what: str, reason: str, remedy: str):
        super().__init__(f"{what}: {reason}; {remedy}")
        self.reason = reason


class Unsure(NoAnswer):
    """No readable answer came: it may have been done or not."""


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to ask. The defaults are for people, tests use shorter ones."""

    timeout_s: float = 30.0
    connect_s: float = 10.0
    attempts: int = 6
    first_attempts: int = 3
    """As long as the provider was never reached."""
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0


class Api:
    """The provider's API under one key. Use as a context manager, or close()."""

    def __init__(
        self, key: str, base_url: str = BASE_URL, patience: Patience = Patience(), sleep: Callable = time.sleep,
        echo: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ):
        self._key = key
        self.base_url = base_url.rstrip("/")
        self.patience = patience
        self.sleep = sleep
        self.echo = echo
        self.reached = False
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}", "User-Agent": "loadmaster"},
            timeout=self._timeout(patience.timeout_s),
            follow_redirects=False,  # a redirect would carry the key elsewhere
        )

    def _timeout(self, read_s: float) -> httpx.Timeout:
        timeout_s = self.patience.timeout_s
        return httpx.Timeout(timeout_s, read=read_s, connect=min(timeout_s, self.patience.connect_s))

    def __repr__(self) -> str:
        return f"Api({self.base_url})"

    def close(self) -> None:
        self._client.close()

    def redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def call(self, method: str, path: str, read: Callable[[Any], T], body: Any = None, **query: Any) -> T:
        """What `read` makes of the JSON answer (of None, where there is none: 204).

        Raises Refused, and after the last repetition Throttled, NotSent or Unsure.
        """
        again = (Throttled, NotSent) if method == "POST" else (Throttled, NotSent, Unsure)
        return self.attempts(again)(self._once, method, path, read, body, query)

    def attempts(self, on: tuple[type[ProviderError], ...]) -> tenacity.Retrying:
        first, longest = self.patience.first_wait_s, self.patience.longest_wait_s
        backoff = tenacity.wait_exponential(multiplier=first, max=longest) + tenacity.wait_random(0, first)

        def error_of(state: tenacity.RetryCallState) -> BaseException | None:
            return state.outcome.exception() if state.outcome else None

        def most(state: tenacity.RetryCallState) -> int:
            unreached = isinstance(error_of(state), NotSent) and not self.reached
            return min(self.patience.attempts, self.patience.first_attempts) if unreached else self.patience.attempts

        def say(state: tenacity.RetryCallState) -> None:
            if isinstance(error := error_of(state), NotSent) and state.attempt_number == 1:
                self.echo(f"{error.reason}; trying again, {most(state) - 1} times at most")

        def wait(state: tenacity.RetryCallState) -> float:
            error = error_of(state)
            asked = getattr(error, "retry_after_s", None)
            return backoff(state) if asked is None else min(asked, self.patience.longest_wait_s)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(on),
            stop=lambda state: state.attempt_number >= most(state),
            before_sleep=say,
            wait=wait,
            sleep=self.sleep,
            reraise=True,
        )

    def _once(self, method: str, path: str, read: Callable[[Any], T], body: Any, query: dict[str, Any]) -> T:
        what = f"{method} {path}"
        with self._transport(what):
            response = self._client.request(
                method, self.base_url + path, json=body, params={k: v for k, v in query.items() if v is not None}
            )
        self.reached = True
        self.check(response, what)
        try:
            return read(None if response.status_code == 204 else response.json())
        except UNREADABLE as error:
            # Neither JSON nor the validator's words go into the message: an answer can carry env.
            where = [".".join(map(str, e["loc"])) for e in error.errors()] if isinstance(error, ValidationError) else []
            fields = f" (wrong or missing: {', '.join(where[:5])})" if where else ""
            raise Unsure(f"{what}: the answer is not what the API describes{fields}") from None

    @contextmanager
    def _transport(self, what: str) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
            parts = urlsplit(self.base_url)
            where = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
            given = "" if self.base_url == BASE_URL else f", and {BASE_URL_VARIABLE}, which names this address"
            reason = self.redact(f"no connection to {where} ({error})")
            raise NotSent(what, reason, f"check the network{given}") from None
        except httpx.TimeoutException:
            raise Unsure(f"{what}: no answer within {self.patience.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise Unsure(self.redact(f"{what}: the connection broke ({type(error).__name__})")) from None

    def check(self, response: httpx.Response, what: str) -> None:
        """Raise for anything but 2xx."""
        status = response.status_code
        if response.is_success:
            return
        said = self.redact(_detail(response))[:LONGEST_DETAIL]  # a key that is cut would not be known again
        if status == 429:
            raise Throttled(f"{what}: asked too often{said}", _seconds(response.headers.get("Retry-After")))
        if status >= 500:
            raise Unsure(f"{what}: the provider's server failed ({status}){said}")
        remedy = REMEDIES.get(status)
        raise Refused(f"{what}: refused ({status}){said}" + (f"; {remedy}" if remedy else ""), status)

    @contextmanager
    def stream(self, path: str, idle_s: float, **query: Any) -> Iterator[Iterator[str]]:
        """Lines of a streamed answer; Unsure when none came for idle_s, or the connection broke."""
        what = f"GET {path}"
        timeout = self._timeout(idle_s)
        params = {k: v for k, v in query.items() if v is not None}
        with (
            self._transport(what),
            self._client.stream("GET", self.base_url + path, params=params, timeout=timeout) as response,
        ):
            if not response.is_success:
                response.read()
            self.check(response, what)
            yield response.iter_lines()


def from_environment() -> Api:
    """The API under the key in RUNPOD_API_KEY, at RUNPOD_API_BASE_URL_V2, else the provider's own.

    Raises ProviderError where there is no key, or what is there can be none, for an address that is none, and for one
    to which the key would travel in clear.
    """
    key, url = key_from_environment(), base_url_from_environment()
    if wrong := wrong_address(BASE_URL_VARIABLE, url, "https://HOST/v2", f"read the key in {KEY_VARIABLE}"):
        raise ProviderError(wrong)
    return Api(key, url)


def base_url_from_environment() -> str:
    return os.environ.get(BASE_URL_VARIABLE, "").strip() or BASE_URL


def has_key() -> bool:
    return bool(os.environ.get(KEY_VARIABLE, "").strip())


def key_from_environment() -> str:
    """Raises ProviderError where there is none, or what is there can be none."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ProviderError(
            f"{KEY_VARIABLE} is not set; put a key of your account (console: Settings, API Keys) into that environment "
            "variable. Keys are read from nowhere else, so that none ends up in a file or a command line"
        )
    if wrong := wrong_key(KEY_VARIABLE, key, "API Keys"):
        raise ProviderError(wrong)
    return key


def _detail(response: httpx.Response) -> str:
    """What an RFC 9457 problem says; nothing for any other body."""
    try:
        problem = response.json()
        said = [str(problem["detail"]), *map(str, problem.get("errors", []))]
    except UNREADABLE:
        return ""
    return ": " + "; ".join(said)


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None
