"""The provider's queue in front of a real worker: callers on one side, the worker's SDK on the other (fake_queue.py).

POST run and status, cancel, health, and POST openai/v1/..., which becomes a job whose pieces are streamed as they come.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.endpoint.fake_queue import FakeQueue

OPENAI = "/v2/ep/openai"


class FakePlatform:
    def __init__(self) -> None:
        self.queue = FakeQueue()
        self.jobs = 0
        self.lock = threading.Lock()
        platform = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path.endswith("/health"):
                    self.answer({"jobs": {"completed": len(platform.queue.done)}, "workers": {"running": 1}})
                else:
                    self.answer(platform.status(self.path.rpartition("/")[2]))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
                if self.path.startswith(OPENAI):
                    self.stream({"openai_route": self.path.removeprefix(OPENAI), "openai_input": body})
                elif "/cancel/" in self.path:
                    platform.queue.stop.append(self.path.rpartition("/")[2])
                    self.answer({"status": "CANCELLED"})
                else:
                    self.answer({"id": platform.take(body["input"]), "status": "IN_QUEUE"})

            def answer(self, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = True

            def stream(self, given: dict[str, Any]) -> None:
                id, sent = platform.take(given), 0
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                while True:
                    ended = id in platform.queue.done
                    pieces = platform.queue.pieces.get(id, [])
                    for piece in pieces[sent:]:
                        text = piece if isinstance(piece, str) else f"data: {json.dumps(piece)}\n\n"
                        self.wfile.write(text.encode())
                        self.wfile.flush()
                    sent = len(pieces)
                    if ended:
                        return
                    time.sleep(0.005)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        base = f"http://127.0.0.1:{self.server.server_port}/v2/ep"
        names = {"run": "run", "runSync": "runsync", "status": "status/{job_id}", "cancel": "cancel/{job_id}"}
        others = ("stream", "retry", "purgeQueue", "health")
        self.urls = {name: f"{base}/{path}" for name, path in {**names, **{name: name for name in others}}.items()}

    def take(self, given: dict[str, Any]) -> str:
        with self.lock:
            self.jobs += 1
            id = f"job{self.jobs}"
            self.queue.waiting = [*self.queue.waiting, {"id": id, "input": given}]
            return id

    def status(self, id: str) -> dict[str, Any]:
        found = self.queue.done.get(id)
        if found is None:
            return {"id": id, "status": "IN_PROGRESS"}
        if "error" in found:
            return {"id": id, "status": "FAILED", "error": found["error"]}
        return {"id": id, "status": "COMPLETED", "output": found.get("output")}

    def __enter__(self) -> FakePlatform:
        self.queue.__enter__()
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.queue.__exit__(*error)
