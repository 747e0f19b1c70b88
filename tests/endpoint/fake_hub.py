"""Stands in for the Hub: repositories in memory, the requests that huggingface_hub makes to push to one.

`fail` holds (method, part of the path) of requests that are answered with 503, once each.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_thisIsTheTokenOfTheTest"


class FakeHub:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.objects: dict[str, bytes] = {}
        self.commits = 0
        self.fail: list[tuple[str, str]] = []
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                hub.requests.append(f"{self.command} {self.path}")
                for wanted in hub.fail:
                    if self.command == wanted[0] and wanted[1] in self.path:
                        hub.fail.remove(wanted)
                        return self.reply({"error": f"overloaded, {self.headers['Authorization']}"}, 503)
                if self.path.startswith("/lfs/"):
                    hub.objects[self.path.rpartition("/")[2]] = body
                    return self.reply({})
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    return self.reply({"error": "Invalid credentials"}, 401)
                value, status, headers = hub.answer(self.command, self.path.partition("?")[0], body)
                self.reply(value, status, headers)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, each in (headers or {}).items():
                    self.send_header(name, each)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[Any, int, dict[str, str]]:
        if path == "/api/repos/create":
            if self.private is not None:
                return {"error": "You already created this model repo", "url": f"{self.url}/org/name"}, 409, {}
            told = json.loads(body)
            self.private = told.get("private", told.get("visibility") == "private")
            self.files[".gitattributes"] = b""
            return {"url": f"{self.url}/{told.get('organization')}/{told['name']}"}, 200, {}
        if path == "/api/models/example/tiny":
            return {"id": "example/tiny", "cardData": {"license": "apache-2.0"}}, 200, {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200, {}
        if "/tree/" in path:
            return [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files], 200, {}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            return {"files": modes}, 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return {"objects": [self.upload_of(each) for each in json.loads(body)["objects"]]}, 200, {}
        if "/commit/" in path:
            self.commit(body)
            return {"success": True, "commitOid": "c0", "commitUrl": f"{self.url}/org/name/commit/c0"}, 200, {}
        if "/resolve/" in path:
            content = self.files[path.rpartition("/")[2]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return content, 200, {"ETag": etag, "X-Repo-Commit": "c0", "X-Linked-Size": str(len(content))}
        return {"sha": "c0", "id": "org/name", "private": self.private}, 200, {}

    def upload_of(self, told: dict[str, Any]) -> dict[str, Any]:
        """Where an object goes; nothing to do for one that is there."""
        there = told["oid"] in self.objects
        actions = {} if there else {"actions": {"upload": {"href": f"{self.url}/lfs/{told['oid']}"}}}
        return {"oid": told["oid"], "size": told["size"], **actions}

    def commit(self, body: bytes) -> None:
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            elif told["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits += 1


def mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
