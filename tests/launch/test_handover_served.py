"""The whole way, train to endpoint, with nothing played at its end: the worker of the bundle, the provider's SDK, a
real vLLM server.

Only the control plane and the platform's queue are stand-ins. The server reads the files that were uploaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from loadmaster.cli import main
from loadmaster.endpoint import command as endpoint_command
from loadmaster.endpoint.inference import CHAT, Inference, NotAnswered, answer_in
from loadmaster.export.served.environment import server_python
from loadmaster.export.served.server import SERVER_VARIABLES, free_port
from loadmaster.files import read_json
from tests.launch.fake_platform import FakePlatform
from tests.launch.fake_runpod import FakeRunpod
from tests.launch.fake_s3 import ACCESS, SECRET, FakeS3
from tests.runs import finish

STEPS = [
    "max_steps=12", "export=bf16", "export.verification_rows=4", "evaluation.task=none",
    "export.thresholds={bf16: {min_task_retention: 0}}", "endpoint.worker=handler", "endpoint.image=me/tickets:1",
    "endpoint.output_tokens=16", "endpoint.prompt_tokens=64", "endpoint.max_slowdown=100000.0",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The smoke recipe on the real small model, cut short; its export is checked by a server before it is bundled."""
    folder = tmp_path_factory.mktemp("served")
    run_dir = folder / "runs/smoke/one"
    for stop_after in ("export", "bundle"):
        done = finish(folder, f"run_dir={run_dir}", *STEPS, f"stop_after={stop_after}", timeout_s=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        if stop_after == "export":
            assert main(["serve-check", str(run_dir)]) == 0
    assert "`loadmaster serve-check` loaded and" in (run_dir / "bundle/README.md").read_text()
    return run_dir


@pytest.fixture(scope="module")
def sdk(tmp_path_factory) -> Path:
    """A Python with the bundle's requirements (needs the package index)."""
    folder = tmp_path_factory.mktemp("sdk") / "venv"
    requirements = Path(__file__).parents[2] / "loadmaster/endpoint/templates/requirements.txt"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "-q", "-r", requirements], check=True)
    return folder / "bin/python"


class Worker:
    """What the provider starts when the first request comes: the image's command, with the volume mounted."""

    def __init__(self, bundle: Path, volume: Path, sdk: Path, platform: FakePlatform):
        python, _ = server_python(None, print)
        self.port = port = free_port()
        settings = read_json(bundle / "server.json")
        words = [word.replace("/runpod-volume", str(volume)) for word in settings["command"]]
        assert words[:2] == ["vllm", "serve"]
        drop = words.index("--gpu-memory-utilization")  # of a GPU; the rest of the command is the bundle's
        words = [word for at, word in enumerate(words) if at not in (drop, drop + 1)]
        at = words.index("--port")
        words[at + 1] = str(port)
        words[words.index("--max-num-seqs") + 1] = "8"
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:], "--enforce-eager"]
        path = volume / "server.json"
        path.write_text(json.dumps({**settings, "command": command, "port": port}))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        self.left = TemporaryDirectory(prefix="loadmaster-")  # for vLLM's sockets, which it does not remove
        told = {**platform.queue.environment, "SERVER_JSON": str(path), "TMPDIR": self.left.name}
        self.process = subprocess.Popen(
            [sdk, bundle / "handler.py"], env={**kept, **SERVER_VARIABLES, **told}, cwd=volume
        )

    def running(self) -> float:
        """Requests that the server works on, as it says."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.left.cleanup()


def local_api(sdk: Path, bundle: Path, server_port: int) -> None:
    """The SDK's own local server in front of the same vLLM: what a developer tries first."""
    port = free_port()
    command = [sdk, bundle / "handler.py", "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    address = f"http://127.0.0.1:{server_port}"
    worker = subprocess.Popen(command, env={**os.environ, "VLLM_BASE_URL": address}, cwd=bundle)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as api:
            deadline = time.monotonic() + 60
            while True:
                try:
                    api.get("/openapi.json")
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline and worker.poll() is None
                    time.sleep(0.2)
            chat = {"messages": [{"role": "user", "content": "Where is the tea?"}], "max_tokens": 8}
            answer = api.post("/runsync", json={"input": chat}).json()
            assert answer["status"] == "COMPLETED"
            assert answer["output"][0]["usage"]["completion_tokens"] <= 8
            job = api.post("/run", json={"input": {**chat, "stream": True}}).json()
            pieces = api.post(f"/stream/{job['id']}").json()["stream"]
            assert "".join(piece["output"] for piece in pieces).endswith("data: [DONE]\n\n")
            for wrong in ({"text": "Hi"}, {"prompt": "x" * 100_000}, {"prompt": "word " * 1000}):
                assert api.post("/runsync", json={"input": wrong}).json()["output"][0]["error"]
            assert api.post("/runsync", json={"input": "Hi"}).status_code == 422
    finally:
        worker.send_signal(signal.SIGINT)
        assert worker.wait(120) == 0


@pytest.fixture
def platform() -> Iterator[FakePlatform]:
    with FakePlatform() as platform:
        yield platform


@pytest.mark.slow
def test_the_endpoint_that_is_deployed_says_what_was_trained(
    trained, sdk, platform, tmp_path, monkeypatch, capsys
) -> None:
    workers: list[Worker] = []
    volume = tmp_path / "volume"
    with FakeRunpod() as fake, FakeS3(["vol1"]) as s3:
        for name, value in {
            "RUNPOD_API_KEY": fake.key, "RUNPOD_API_BASE_URL_V2": fake.url, "RUNPOD_S3_URL": s3.url,
            "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET,
        }.items():
            monkeypatch.setenv(name, value)
        made = fake._endpoint
        fake._endpoint = lambda id, body: {**made(id, body), "requestUrls": platform.urls}
        fake.volumes["vol1"] = {
            "id": "vol1", "name": "loadmaster", "size": 50, "dataCenter": "EU-RO-1", "type": "STANDARD",
        }

        def connect(urls) -> Inference:
            if not workers:
                for name, data in s3.objects("vol1").items():
                    (volume / name).parent.mkdir(parents=True, exist_ok=True)
                    (volume / name).write_bytes(data)
                workers.append(Worker(trained / "bundle", volume, sdk, platform))
            return Inference(urls, fake.key, poll_s=0.1, timeout_s=300)

        monkeypatch.setattr(endpoint_command, "_connect", connect)
        try:
            assert main(["deploy", str(trained), "--volume", "loadmaster", "--yes"]) == 0
            said = capsys.readouterr().out
            print(said)
            deployment = read_json(trained / "deployment.json")
            assert deployment["smoke"]["similarity"] >= 0.8 and deployment["smoke"]["equal"] >= 2
            assert deployment["measured"]["tokens_per_second_each"] > 0 and len(fake.endpoints) == 1
            assert SECRET not in said and fake.key not in said

            with connect(platform.urls) as inference:
                body = {"model": "smoke", "messages": [{"role": "user", "content": "word " * 5000}]}
                with pytest.raises(NotAnswered, match="bytes, at most"):
                    inference.ask({"openai_route": CHAT, "openai_input": body}, 60)
                body["messages"][0]["content"] = "word " * 600
                with pytest.raises(NotAnswered, match="the inference server refused"):
                    inference.ask({"openai_route": CHAT, "openai_input": body}, 60)
                answer = answer_in(
                    inference.ask({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}, 60)
                )
                assert answer["model"] == "smoke"

            told = {"messages": [{"role": "user", "content": "Count"}], "max_tokens": 400, "ignore_eos": True}
            id = platform.take({**told, "stream": True})
            platform.queue.until(lambda: platform.queue.pieces.get(id), 60)
            assert workers[0].running() == 1
            platform.queue.stop.append(id)
            platform.queue.until(lambda: workers[0].running() == 0, 120)  # one that ended by itself is done
            assert id not in platform.queue.done

            local_api(sdk, trained / "bundle", workers[0].port)

            # The same endpoint with another artifact's answers recorded: it is taken back, the worker is not.
            recorded = read_json(trained / "bundle/smoke.json")
            for prompt in recorded["prompts"]:
                prompt["text"] = "Nothing of this kind was ever said by that model"
            (trained / "bundle/smoke.json").write_text(json.dumps(recorded))
            assert main(["endpoint", "test", str(trained)]) == 4
            assert "not those of the artifact" in "".join(capsys.readouterr()).replace("\n", " ")
        finally:
            codes = [worker.stop() for worker in workers]
    assert codes == [0] and fake.violations == []
