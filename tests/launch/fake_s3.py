"""The provider's S3 API on loopback: moto's S3 (real multipart, ETags, checksums) behind what the provider lacks.

    with FakeS3(["vol1"]) as s3:          s3.url; buckets are volumes, and cannot be made through the API
        s3.fault(3, "lost")               the third call is carried out, and its answer never arrives
        s3.damage = "x.bin"               bytes of that file change on their way in, and nobody says so

Only the operations that the provider documents are let through; anything else is 501, as is a piece over 500 MB.
Faults: timeout, 429 and 500 do nothing and fail; malformed and lost do it, then spoil the answer.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, unquote

from moto.s3 import models
from moto.s3.models import s3_backends
from moto.server import create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

FAULTS = ("timeout", "429", "500", "malformed", "lost")
HANG_S = 10.0
LARGEST_PIECE = 500 * 10**6
ACCESS, SECRET = "user_FAKE0ACCESS", "rps_FAKE0SECRET0THAT0NO0LOG0MAY0SHOW"


class FakeS3:
    def __init__(self, volumes: Iterable[str]):
        self.volumes = list(volumes)
        self.calls: list[str] = []
        self.refused: list[str] = []
        self.headers: list[str] = []
        self.faults: dict[int, str] = {}
        self.damage: str | None = None
        self.stop_after: int | None = None
        """Refuse every call after so many, as a network that is gone."""
        models.S3_UPLOAD_PART_MIN_SIZE = 0  # as the provider documents it
        self._app = create_backend_app("s3")
        self._lock = threading.Lock()

    def __enter__(self) -> FakeS3:
        self._server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        for volume in self.volumes:
            self.direct("PUT", f"/{volume}")
        self.calls.clear()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for account in s3_backends.values():
            for backend in account.values():
                backend.reset()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def fault(self, call: int, kind: str) -> None:
        """Spoil the call of that number, counted from 1."""
        self.faults[call] = kind

    def objects(self, volume: str) -> dict[str, bytes]:
        """What is there, by name."""
        for account in s3_backends.values():
            for backend in account.values():
                if volume in backend.buckets:
                    return {name: bytes(key.value) for name, key in backend.buckets[volume].keys.items()}
        return {}

    def remove(self, volume: str, name: str) -> None:
        for account in s3_backends.values():
            for backend in account.values():
                if volume in backend.buckets:
                    del backend.buckets[volume].keys[name]

    def begun(self, volume: str) -> int:
        """Multipart uploads that are not joined."""
        return sum(
            len(backend.buckets[volume].multiparts)
            for account in s3_backends.values()
            for backend in account.values()
            if volume in backend.buckets
        )

    def direct(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Past the provider's limits, as a Pod would write."""
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "1", "HTTP_HOST": "s3.amazonaws.com", "wsgi.input": io.BytesIO(body),
            "CONTENT_LENGTH": str(len(body)), "wsgi.url_scheme": "http", "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.errors": io.StringIO(), "wsgi.version": (1, 0), "wsgi.multithread": True,
            "wsgi.multiprocess": False, "wsgi.run_once": False,
        }
        return b"".join(self._app(environ, lambda status, headers, exc_info=None: None))

    def answer(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        path, query = unquote(environ["PATH_INFO"]), parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with self._lock:
            what = operation(environ["REQUEST_METHOD"], path, query)
            self.calls.append(f"{what} {path}")
            self.headers.append(environ.get("HTTP_AUTHORIZATION", "") + environ.get("QUERY_STRING", ""))
            number = len(self.calls)
        if self.stop_after is not None and number > self.stop_after:
            return hang_up(environ)
        fault = self.faults.get(number)
        if fault == "timeout":
            time.sleep(HANG_S)
            return hang_up(environ)
        if fault in ("429", "500"):
            status = "429 Too Many Requests" if fault == "429" else "500 Internal Server Error"
            start(status, [("Content-Length", "0"), ("Connection", "close")])
            return [b""]
        if what is None or len(body) > LARGEST_PIECE or f"Credential={ACCESS}/" not in self.headers[number - 1]:
            self.refused.append(f"{environ['REQUEST_METHOD']} {path}?{environ.get('QUERY_STRING')}")
            start("501 Not Implemented", [("Content-Length", "0")])
            return [b""]
        if self.damage and what in ("PutObject", "UploadPart") and path.endswith(self.damage):
            body = body[:-1] + bytes([body[-1] ^ 1])
            environ.pop("HTTP_CONTENT_MD5", None)  # damaged behind the check
        environ["wsgi.input"] = io.BytesIO(body)
        kept: list[Any] = []
        answered = b"".join(self._app(environ, lambda *answer: kept.append(answer)))
        if fault == "lost":
            return hang_up(environ)
        status, headers, *_ = kept[0]
        if fault == "malformed" and answered:
            answered = b"<Cut"
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(answered))))
        start(status, headers)
        return [answered]


def operation(method: str, path: str, query: dict[str, list[str]]) -> str | None:
    """Name of the operation, if the provider has it."""
    key = path.strip("/").partition("/")[2]
    if not key:
        if method == "GET" and "uploads" in query:
            return "ListMultipartUploads"
        if method == "GET" and query.get("list-type") == ["2"]:
            return "ListObjectsV2"
        return "HeadBucket" if method == "HEAD" else None
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
    if method == "GET":
        return "ListParts" if "uploadId" in query else "GetObject"
    if method == "PUT":
        return "UploadPart" if "partNumber" in query else "PutObject"
    return {"HEAD": "HeadObject", "DELETE": "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"}.get(
        method
    )


def hang_up(environ: dict[str, Any]) -> Iterable[bytes]:
    """End the connection without an answer."""
    connection: socket.socket = environ["werkzeug.socket"]
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments: Any) -> None:
        pass
