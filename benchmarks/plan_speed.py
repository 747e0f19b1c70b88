"""How long a plan takes from a cold process: Llama 3.1 405B on 8 H100, and over every machine of the catalogue.

    python benchmarks/plan_speed.py [--runs 15]

Each run is `loadmaster plan` as a process of its own, timed from its start to the last line of the plan, and to its
exit (report.html written too). The least is what it takes where nothing else runs. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOB = ("recipe=auto", "model.name=meta-llama/Llama-3.1-405B", "hardware=h100_80gb_x8", "run_dir=run")
METHODS = {"lora": 0, "full": 3}
"""With the exit code that is expected: a full fine-tune fits on no machine of the catalogue."""


LAST = "left out:"
"""How the plan's last line begins."""


def seconds_of(method: str, folder: Path) -> tuple[float, float]:
    """From the start of the process to the plan, and to the end."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, "-m", "loadmaster", "plan", *JOB, f"method={method}"]
    start, printed = time.perf_counter(), None
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith(LAST):
                printed = time.perf_counter() - start
        code = process.wait()
    seconds = time.perf_counter() - start
    assert code == METHODS[method] and printed is not None, f"exit code {code}"
    return printed, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        seconds_of("lora", Path(folder))  # files into the cache
        taken = {method: [seconds_of(method, Path(folder)) for _ in range(count)] for method in METHODS}
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    lines = [
        f"# Seconds from a cold process to a printed plan, {today}",
        "",
        f"`python benchmarks/plan_speed.py --runs {count}`: {' '.join(JOB[1:3])}, each run a process of its own; "
        f"{platform.machine()}, Python {platform.python_version()}.",
        "",
        "| method | until | least | median | most |",
        "|---|---|---|---|---|",
        *(
            f"| {method} | {until} | {min(each):.2f} | {statistics.median(each):.2f} | {max(each):.2f} |"
            for method, runs in taken.items()
            for until, each in zip(("the plan is printed", "exit"), zip(*runs, strict=True), strict=True)
        ),
    ]
    path = ROOT / "benchmarks/results" / f"plan_speed-{today}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
