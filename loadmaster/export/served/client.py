"""What is asked of a server, over the OpenAI API and vLLM's two additions to it (/tokenize, token ids in answers)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from loadmaster.errors import ExportRejected, NotChecked
from loadmaster.export.served.server import FASTER, HOST, REQUEST_S


@dataclass(frozen=True)
class Served:
    """The served model's answer to one conversation; ids with the token that stopped it, if one did."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str


T = TypeVar("T")


class Client(AbstractContextManager):
    """One server; every method raises ExportRejected for an error or an answer of another form, and NotChecked for none
    in time."""

    def __init__(self, port: int, model: str):
        self.model = model
        # trust_env: a proxy of the environment must not stand between this machine and itself.
        self._http = httpx.Client(base_url=f"http://{HOST}:{port}", timeout=REQUEST_S, trust_env=False)

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        return self._ask("GET", "/v1/models", None, lambda found: [entry["id"] for entry in found["data"]])

    def rendered(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the answer begins."""
        body = {"model": self.model, "messages": messages, "add_generation_prompt": True}
        return self._ask("POST", "/tokenize", body, lambda found: found["tokens"])

    def log_probabilities(self, ids: list[int], positions: list[int]) -> tuple[list[float], list[int]]:
        """(log-probability of the token at each position given those before it, the most likely token there)."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}

        def read(found: Any) -> tuple[list[float], list[int]]:
            entries = found["choices"][0]["prompt_logprobs"]
            own = [float(entries[at][str(ids[at])]["logprob"]) for at in positions]
            top = [int(next(token for token, entry in entries[at].items() if entry["rank"] == 1)) for at in positions]
            return own, top

        return self._ask("POST", "/v1/completions", body, read)

    def answer(self, messages: list[dict[str, Any]], max_tokens: int, only_token: int | None = None) -> Served:
        """The greedy answer. only_token: the one token that the model may say."""
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0,
            "repetition_penalty": 1.0, "return_token_ids": True,
        }
        if only_token is not None:
            body["allowed_token_ids"] = [only_token]

        def read(found: Any) -> Served:
            choice = found["choices"][0]
            return Served(
                list(found["prompt_token_ids"]), list(choice["token_ids"]), choice["message"]["content"] or "",
                choice["finish_reason"],
            )

        return self._ask("POST", "/v1/chat/completions", body, read)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TimeoutException:
            raise NotChecked(f"{path}: no answer within {REQUEST_S:.0f} s; {FASTER}") from None
        except httpx.HTTPError as error:
            raise ExportRejected(f"{path}: no answer ({type(error).__name__}: {error})") from None
        if response.status_code != 200:
            raise ExportRejected(f"{path}: the server answers {response.status_code}: {response.text[:300]}")
        try:
            return read(response.json())
        except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            raise ExportRejected(
                f"{path}: the answer is not in the form that vLLM gives it ({type(error).__name__}: {error})"
            ) from None
