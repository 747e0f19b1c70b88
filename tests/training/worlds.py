"""Worlds of real processes over gloo, as torchrun's variables would have them.

python -m tests.training.worlds MODULE CASES.json SIZE NODES imports what all ranks need once, and forks into them: most
of a rank's time would go to imports. Everything after that is each rank's own.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from loadmaster import collector
from tests.runs import ROOT, environment
from tests.training.processes import free_port

TIMEOUT_S = 900


def spawn(
    folder: Path, name: str, cases: list[dict], size: int, nodes: int = 1, module: str = "tests.training.parity"
) -> None:
    """Run module.main on the cases, one after another, in one world of `size` processes."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(cases))
    env = environment() | {"PYTHONPATH": str(ROOT)}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        env.pop(variable, None)
    command = [sys.executable, "-m", "tests.training.worlds", module, str(path), str(size), str(nodes)]
    world = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True)
    try:
        code = world.wait(timeout=TIMEOUT_S)
    finally:
        if world.poll() is None:
            os.killpg(world.pid, signal.SIGKILL)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob(f"{name}-*.log")))
    assert code == 0, logs


def log_of(cases: Path, rank: int) -> Path:
    return cases.with_name(f"{cases.stem}-{rank}.log")


def main(name: str, cases: Path, size: int, nodes: int) -> int:
    collector.pause()
    module = importlib.import_module(name)
    zero = ["deepspeed"] * ("zero" in cases.read_text())
    for each in ("peft", "transformers.models.llama.modeling_llama", *zero):
        importlib.import_module(each)
    collector.resume()
    port, ranks = free_port(), []
    for rank in range(size):
        place = {} if size == 1 else {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % (size // nodes)),
            "LOCAL_WORLD_SIZE": str(size // nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }
        pid = os.fork()
        if pid == 0:
            be_rank(module, cases, place, log_of(cases, rank))
        ranks.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    return 0 if codes == [0] * size else 1


def be_rank(module, cases: Path, place: dict[str, str], log: Path) -> None:
    """What a forked process does to its end."""
    code = 1
    try:
        os.environ.update(place)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        module.main(str(cases))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
