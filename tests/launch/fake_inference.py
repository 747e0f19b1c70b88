"""The data plane of one endpoint: a job queue and the OpenAI route, which answer well or in a chosen wrong way."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODES = (
    "good", "error_inside", "failed", "silent", "empty", "no_text", "any_model", "other_model", "stream_error",
    "no_token", "http_500", "not_json",
)  # fmt: skip


class FakeInference:
    """`mode` is how it answers; `cancelled` and `keys` are what it was sent."""

    def __init__(self, mode: str = "good", served: str = "tickets"):
        assert mode in MODES
        self.mode, self.served = mode, served
        self.jobs: dict[str, dict[str, Any]] = {}
        self.polls_until_done = 2
        self.cancelled: list[str] = []
        self.keys: set[str] = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                id = self.path.rpartition("/")[2]
                job = fake.jobs[id]
                job["polls"] += 1
                if fake.mode == "silent" or job["polls"] < fake.polls_until_done:
                    self.answer(200, {"id": id, "status": "IN_QUEUE"})
                else:
                    self.answer(200, {"id": id, **fake.outcome(job["input"])})

            def do_POST(self) -> None:
                fake.keys.add(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
                if self.path.endswith("/chat/completions"):
                    self.stream()
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
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                words = [] if fake.mode == "no_token" else ["one", " two", " three"]
                events: list[Any] = [{"choices": [{"delta": {"content": word}}]} for word in words]
                if fake.mode == "stream_error":
                    events = [{"error": {"message": "out of memory"}}]
                for event in events:
                    time.sleep(0.01)
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
        text = "" if self.mode == "no_text" else "Hello."
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        model = "someone-else" if self.mode == "other_model" else self.served
        return {"status": "COMPLETED", "output": [{"model": model, "choices": [choice]}]}

    def __enter__(self) -> FakeInference:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
