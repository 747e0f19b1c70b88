"""An inference server as the worker sees it: OpenAI's routes over real HTTP, with vLLM's answers and errors."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tickets"
LONGEST_PROMPT = 200
WORDS = ["Grüße", " aus", " Köln", " 🚀"]


class FakeOpenAI:
    """`with FakeOpenAI() as server: server.url`. `bodies` are the requests; `gone` counts clients that hung up."""

    def __init__(self, port: int = 0) -> None:
        fake = self
        self.bodies: list[dict[str, Any]] = []
        self.gone = 0
        self.seconds_a_word = 0.0
        self.together: threading.Barrier | None = None
        """Where there is one, answers wait until so many requests are there."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/health":
                    self.answer(200, b"")
                else:
                    self.answer(200, json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                if fake.together is not None:
                    fake.together.wait(60)
                text = json.dumps(body.get("messages", body.get("prompt")))
                if len(text) > LONGEST_PROMPT:
                    error = {"message": f"maximum context length is {LONGEST_PROMPT} tokens", "code": 400}
                    self.answer(400, json.dumps({"error": error}).encode())
                elif body.get("stream"):
                    self.stream()
                else:
                    time.sleep(fake.seconds_a_word * len(WORDS))
                    choice = {"message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}
                    usage = {"prompt_tokens": 5, "completion_tokens": len(WORDS)}
                    self.answer(200, json.dumps({"model": MODEL, "choices": [choice], "usage": usage}).encode())

            def answer(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self) -> None:
                """Chunks end in the middle of events and of characters."""
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                events = [{"choices": [{"delta": {"content": word}}]} for word in WORDS]
                texts = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
                data = "".join([*texts, "data: [DONE]\n\n"]).encode()
                try:
                    for start in range(0, len(data), 41):
                        self.wfile.write(data[start : start + 41])
                        self.wfile.flush()
                        time.sleep(fake.seconds_a_word)
                except (BrokenPipeError, ConnectionResetError):
                    fake.gone += 1
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeOpenAI:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":  # as a worker starts it: port, seconds a word
    fake = FakeOpenAI(int(sys.argv[1]))
    fake.seconds_a_word = float(sys.argv[2])
    fake.server.serve_forever()
