"""The provider's queue as a worker sees it: jobs to take, jobs to stop, and where outputs go."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeQueue:
    """Put jobs into `waiting` and ids into `stop`; outputs come into `done`, pieces of streams into `pieces`."""

    def __init__(self) -> None:
        queue = self
        self.waiting: list[dict[str, Any]] = []
        self.stop: list[str] = []
        self.done: dict[str, dict[str, Any]] = {}
        self.streamed: dict[str, int] = {}
        self.pieces: dict[str, list[Any]] = {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                if "/job-stop/" in self.path:
                    ids, queue.stop = queue.stop, []
                    time.sleep(0.1)
                    self.answer(200, {"jobsToStop": ids}) if ids else self.answer(204, None)
                elif "/job-take" in self.path:
                    jobs, queue.waiting = queue.waiting, []
                    time.sleep(0.05)
                    self.answer(200, jobs if "batch" in self.path else jobs[0]) if jobs else self.answer(204, None)
                else:
                    self.answer(200, {})

            def do_POST(self) -> None:
                found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                id = self.path.split("/")[2].partition("?")[0]
                if "/job-stream/" in self.path:
                    queue.pieces.setdefault(id, []).append(found["output"])
                    queue.streamed[id] = queue.streamed.get(id, 0) + 1
                else:
                    queue.done[id] = found
                self.answer(200, {})

            def answer(self, status: int, value: Any) -> None:
                data = b"" if value is None else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        """What the platform sets in a worker's container; its checks of GPU and system are left out."""
        url = f"http://127.0.0.1:{self.server.server_port}"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
            "RUNPOD_AI_API_KEY": "none",
            "RUNPOD_POD_ID": "worker1",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        }

    def until(self, condition: Any, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s; done {self.done}, streamed {self.streamed}"
            time.sleep(0.05)

    def __enter__(self) -> FakeQueue:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
