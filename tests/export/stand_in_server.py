"""Stands in for the interpreter of an environment with vLLM, and for the server that it runs.

It answers from ANSWERS, a JSON file beside this one, and behaves as `behaviour` in the served folder says:
honest, base (the base's log-probabilities), dies (at the first completion), error (500 to it), slow (a minute to it),
endless (answers do not end), template (renders otherwise).
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if sys.argv[1] == "-c":
    print("vllm 0.0")
    sys.exit()

options = dict(zip(sys.argv[3::1], sys.argv[4::1], strict=False))
adapter = options.get("--lora-modules")
name, folder = adapter.split("=") if adapter else (options["--served-model-name"], options["--model"])
says = Path(folder) / "behaviour"
behaviour = says.read_text() if says.is_file() else "honest"
answers = json.loads(Path(sys.argv[0]).with_name("answers.json").read_text())


def completion(ids):
    document = next(document for document in answers["documents"] if document["ids"] == ids)
    own = document["base" if behaviour == "base" else "trained"]
    own = [float("nan")] * len(own) if behaviour == "nan" else own
    entries = [None] * len(ids)
    for at, value, top in zip(document["positions"], own, document["top"], strict=True):
        entries[at] = {str(top): {"logprob": -0.1, "rank": 1}}
        entries[at][str(ids[at])] = {"logprob": value, "rank": 1 if top == ids[at] else 2}
    return {"choices": [{"prompt_logprobs": entries}]}


def chat(body):
    prompt = rendered(body["messages"])
    if "allowed_token_ids" in body:
        ids, text, ends = body["allowed_token_ids"], "", behaviour != "endless"
    else:
        ours = answers["answers"][json.dumps(body["messages"])]
        ids, text, ends = ours["ids"] + answers["stop"] * ours["ended"], ours["text"], ours["ended"]
    choice = {"message": {"content": text}, "token_ids": ids, "finish_reason": "stop" if ends else "length"}
    return {"prompt_token_ids": prompt, "choices": [choice]}


def rendered(messages):
    ids = answers["rendered"][json.dumps(messages)]
    return [1, *ids] if behaviour == "template" else ids


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"data": [{"id": name}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({"tokens": rendered(body["messages"])})
        elif self.path == "/v1/chat/completions":
            self.reply(chat(body))
        elif behaviour == "dies":
            print("RuntimeError: no kernel for this", flush=True)
            os._exit(3)
        elif behaviour == "slow":
            time.sleep(60)
        elif behaviour == "error":
            self.reply({"error": "out of blocks"}, 500)
        else:
            self.reply(completion(body["prompt"]))

    def reply(self, value, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
