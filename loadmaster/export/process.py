"""Run a step of the export in a process of its own, and get its result or a clear error.

Quantization libraries patch torch and transformers as they are imported, and a verification proves more
when nothing of the trainer is left in memory. The step gets a JSON spec, prints progress lines, and
writes a JSON result; whatever happens to it (an exception, a crash of native code, a hang) becomes an
ExportRejected with the end of its error output, but for what the machine lacked, which is no fault of the export.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from loadmaster import collector
from loadmaster.ending import STOPS, end_with
from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.files import is_full_disk
from loadmaster.out_of_memory import explained

PROGRESS = "progress: "
TAIL_LINES = 15
KILLED = (-9, 137)
"""Exit codes, the second as a parent that is a shell hands it on."""

LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)
"""torchrun's; a step that inherits them would wait for ranks that never come."""


def run_step(module: str, spec: dict[str, Any], scratch: Path, timeout_s: float, echo: Callable[[str], None]) -> Any:
    """Run `python -m module SPEC` with `spec` as a file, echo its progress, and return its result.

    spec: must be JSON-able; the step finds the path for its result in it as "result".
    scratch: folder for spec and result.
    Raises ExportRejected when the step fails, dies, or takes longer than timeout_s, and LoadmasterError where it says
    that the machine is at fault (no room in memory or on the disk), which says nothing of the export.
    """
    name = module.rsplit(".", 1)[-1]
    spec_path, result_path = _told(name, {**spec, "parent": os.getpid()}, scratch)
    environment = clean_environment()
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # inherited: a request to stop is for this one to heed
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(spec_path)],
                stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        timed_out = threading.Event()
        timer = threading.Timer(timeout_s, lambda: (timed_out.set(), process.kill()))
        timer.start()
        last = "starting"
        try:
            for line in process.stdout or ():
                if line.startswith(PROGRESS):
                    last = line.removeprefix(PROGRESS).strip()
                    echo(last)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if code == 0 and result_path.is_file():
            return json.loads(result_path.read_text(encoding="utf-8"))
        errors.seek(0)
        tail = "".join(errors.readlines()[-TAIL_LINES:]).rstrip()
    if code == LoadmasterError.exit_code and not timed_out.is_set():
        raise LoadmasterError(f"the {name} step of the export could not be done, at: {last}\n{tail}")
    what = f"did not finish in {timeout_s:.0f} s" if timed_out.is_set() else f"ended with {meaning(code)}"
    raise ExportRejected(f"the {name} step of the export {what}, at: {last}\n{tail}")


def run_script(python: Path, script: Path, spec: dict[str, Any], scratch: Path, **how: Any) -> tuple[Any, Any]:
    """Run a script by another interpreter; (how it ended, its result or None where it wrote none).

    spec: as in `run_step`. how: for subprocess.run, whose TimeoutExpired is raised.
    """
    spec_path, result_path = _told(script.stem, spec, scratch)
    command = [str(python), "-I", str(script), str(spec_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", **how)
    found = done.returncode == 0 and result_path.is_file()
    return done, json.loads(result_path.read_text(encoding="utf-8")) if found else None


def _told(name: str, spec: dict[str, Any], scratch: Path) -> tuple[Path, Path]:
    """(file of the spec, where the step finds in it that its result belongs)."""
    spec_path, result_path = scratch / f"{name}.spec.json", scratch / f"{name}.result.json"
    result_path.unlink(missing_ok=True)
    spec_path.write_text(json.dumps({**spec, "result": str(result_path)}), encoding="utf-8")
    return spec_path, result_path


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher put there."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }


def foreign_environment() -> dict[str, str]:
    """The same for another interpreter, which has libraries of its own."""
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in clean_environment().items() if key not in own}


def timeout_s(weight_bytes: int) -> float:
    """How long a step may take before it counts as hanging: half an hour, and an hour for every 16 GB of weights."""
    return 1800 + weight_bytes / 16e9 * 3600


def answering_s(passes: float, weight_bytes: float, device: str) -> float:
    """How much longer where a model of so many bytes also answers, a token (of several answers) a pass.

    Half a second each, and its weights read at 100 GB/s on a GPU, at 1 GB/s on a CPU: slower than any should be.
    """
    return passes * (0.5 + weight_bytes / (1e9 if device == "cpu" else 100e9))


def progress(text: str) -> None:
    """Called by a step: shown to the user by the process that started it."""
    print(f"{PROGRESS}{text}", flush=True)


def read_spec(arguments: list[str]) -> dict[str, Any]:
    return json.loads(Path(arguments[0]).read_text(encoding="utf-8"))


def step(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a step's main: an error that is the user's to act on is printed without a traceback."""
    collector.resume()
    end_with(read_spec(arguments)["parent"])
    try:
        with explained("export"):
            main(arguments)
    except LoadmasterError as error:
        _end(str(error), error.exit_code)
    except Exception as error:
        if not is_full_disk(error):
            raise
        _end(f"the disk is full ({error})", LoadmasterError.exit_code)


def _end(sentence: str, code: int) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(code)


def write_result(spec: dict[str, Any], result: Any) -> None:
    """Called by a step, last. NaN is allowed: a broken export scores it."""
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")


def meaning(code: int) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return how + " (killed: most often the machine ran out of memory)" * (code in KILLED)
