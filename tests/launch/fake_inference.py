"""The data plane of one endpoint: a job queue and the OpenAI route, which answer well or in a chosen wrong way.

with FakeInference("good", answers=recorded) as data_plane:      answers as an artifact did (smoke.json)
    data_plane.faults = {3: "lost"}        the third call is carried out, and its answer never arrives
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODES = (
    "good", "error_inside", "failed", "silent", "empty", "no_text", "any_model", "other_model", "stream_error",
    "no_token", "http_500", "not_json", "other_texts", "goes_on", "slow", "late",
)
SAID = "Hello."


HANG_S = 10.0


def _key(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages, sort_keys=True)


class FakeInference:
    """`mode` is how it answers; `cancelled` and `keys` are what it was sent."""

    def __init__(self, mode: str = "good", served: str = "tickets", answers: list[dict[str, Any]] | None = None):
        assert mode in MODES
        self.mode, self.served = mode, served
        self.answers = {_key(each["messages"]): each for each in answers or []}
        self.faults: dict[int, str] = {}
        self.calls: list[str] = []
        self.spoilt: set[tuple[str, str, bytes]] = set()
        self.lock = threading.Lock()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.polls_until_done = 2
        self.cancelled: list[str] = []
        self.keys: set[str] = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def spoilt(self, body: bytes = b"") -> str | None:
                """The fault of this call, which is not spoilt again; where nothing is to be done, answered here."""
                with fake.lock:
                    fake.calls.append(f"{self.command} {self.path}")
                    call = (self.command, self.path, body)
                    fault = None if call in fake.spoilt else fake.faults.get(len(fake.calls))
                    if fault:
                        fake.spoilt.add(call)
                self.close_connection = True
                if fault == "timeout":
                    time.sleep(HANG_S)
                elif fault in ("429", "500"):
                    self.answer(int(fault), {"detail": "no"})
                self.fault = fault
                return fault

            def do_GET(self) -> None:
                if self.spoilt() in ("timeout", "429", "500"):
                    return
                if self.path.endswith("/health"):
                    jobs = {"completed": len(fake.jobs), "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}
                    self.answer(200, {"jobs": jobs, "workers": {"idle": 1, "running": 0, "throttled": 0}})
                    return
                id = self.path.rpartition("/")[2]
                job = fake.jobs[id]
                job["polls"] += 1
                if fake.mode == "silent" or job["polls"] < fake.polls_until_done:
                    self.answer(200, {"id": id, "status": "IN_QUEUE"})
                else:
                    self.answer(200, {"id": id, **fake.outcome(job["input"])})

            def do_POST(self) -> None:
                fake.keys.add(self.headers["Authorization"])
                data = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.spoilt(data) in ("timeout", "429", "500"):
                    return
                body = json.loads(data or "null")
                if self.path.endswith("/chat/completions"):
                    self.stream(body)
                elif "/cancel/" in self.path:
                    fake.cancelled.append(self.path.rpartition("/")[2])
                    self.answer(200, {"status": "CANCELLED"})
                elif fake.mode == "http_500":
                    self.answer(500, {"detail": "no"})
                elif fake.mode == "not_json":
                    self.raw(200, b"<html>")
                else:
                    id = f"job{len(fake.jobs)}"
                    fake.jobs[id] = {"input": body["input"], "polls": 0}
                    self.answer(200, {"id": id, "status": "IN_QUEUE"})

            def answer(self, status: int, value: Any) -> None:
                self.raw(status, json.dumps(value).encode())

            def raw(self, status: int, data: bytes) -> None:
                fault = getattr(self, "fault", None)
                if fault == "lost":
                    return
                if fault == "malformed":
                    data = b'{"id": "cut'
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)

            def stream(self, body: dict[str, Any]) -> None:
                if self.fault in ("lost", "malformed"):
                    if self.fault == "malformed":
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
                    return
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                if fake.mode == "late":
                    time.sleep(0.3)
                words = [] if fake.mode == "no_token" else ["one", *[" two"] * (body["max_tokens"] - 1)]
                events: list[Any] = [{"choices": [{"delta": {"content": word}}]} for word in words]
                prompt = len(body["messages"][0]["content"].split())
                events.append({"choices": [], "usage": {"completion_tokens": len(words), "prompt_tokens": prompt}})
                if fake.mode == "stream_error":
                    events = [{"error": {"message": "out of memory"}}]
                for event in events:
                    time.sleep(0.05 if fake.mode == "slow" else 0.001)
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        base = f"http://127.0.0.1:{self.server.server_port}/v2/ep"
        names = {"run": "run", "runSync": "runsync", "status": "status/{job_id}", "cancel": "cancel/{job_id}"}
        self.urls = {name: f"{base}/{path}" for name, path in names.items()}
        others = ("stream", "retry", "purgeQueue", "health")
        self.all_urls = {**self.urls, **{name: f"{base}/{name}" for name in others}}

    def outcome(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["openai_input"]["model"]
        if self.mode == "failed":
            return {"status": "FAILED", "error": "CUDA out of memory"}
        if self.mode == "empty":
            return {"status": "COMPLETED", "output": []}
        wrong = asked != self.served and self.mode != "any_model"
        if wrong or self.mode == "error_inside":
            error = {"message": "vLLM returned HTTP 404", "type": "worker_error"}
            return {"status": "COMPLETED", "output": [{"error": error}]}
        said = self.answers.get(_key(given["openai_input"]["messages"]), {"text": SAID, "finish_reason": "stop"})
        text, ends = said["text"], said["finish_reason"]
        if self.mode in ("no_text", "other_texts"):
            text = "" if self.mode == "no_text" else "Quite another model speaks here"
        if self.mode == "goes_on":
            ends = "length" if ends == "stop" else "stop"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": ends}
        model = "someone-else" if self.mode == "other_model" else self.served
        return {"status": "COMPLETED", "output": [{"model": model, "choices": [choice]}]}

    def running(self) -> list[str]:
        """Jobs that nobody has seen the end of, nor cancelled."""
        return [
            id for id, job in self.jobs.items() if job["polls"] < self.polls_until_done and id not in self.cancelled
        ]

    def __enter__(self) -> FakeInference:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
