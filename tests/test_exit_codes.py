"""The exit codes that scripts rely on, for mistakes beside the job, and the pages that list them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster.cli import main
from loadmaster.config.docs import EXIT_CODES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["plan", "lora.rnk=8"], 2),
        (["plan", "--compair"], 2),
        (["deploy", "nowhere", "--dry-run"], 4),
        (["fetch", "nowhere"], 4),
        (["endpoint", "review", "nowhere"], 4),
        (["prices", "--refresh"], 4),
        (["verify", "nowhere"], 5),
        (["push", "nowhere", "--repo", "org/name", "--dry-run"], 5),
        (["serve-check", "nowhere"], 5),
        (["runs", "x" * 5000], 2),
        (["chat", "x" * 5000], 4),
        (["chat", "nowhere", "Hello"], 2),
    ],
)
def test_a_mistake_beside_the_job_has_the_code_of_its_command(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    assert main(words) == code
    assert capsys.readouterr().err


@pytest.mark.parametrize("words", [["runs", "\x1b[2J"], ["plan", "\x1b[2J"], ["data", "data.path=\x1b[2J.jsonl"]])
def test_what_is_wrong_is_said_without_characters_that_a_terminal_obeys(words: list[str], capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\u241b[2J" in said


@pytest.mark.parametrize("words", [["verify"], ["serve-check"], ["push", "--repo", "org/name"], ["deploy"]])
def test_of_a_folder_of_runs_the_newest_run_is_named(words: list[str], tmp_path: Path, capsys):
    for name in ("2026-01-01_10-00-00", "2026-01-02_10-00-00"):
        (tmp_path / "smoke" / name).mkdir(parents=True)
        (tmp_path / "smoke" / name / "stages.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "smoke"):
        assert main([words[0], str(folder), *words[1:]]) in (4, 5)
        said = capsys.readouterr().err
        assert f"{folder} is no run directory: give one of those in it, the newest is {folder}" in said
        assert said.rstrip().endswith("2026-01-02_10-00-00")


@pytest.mark.parametrize(
    "words", [["train.py"], ["-m", "loadmaster", "plan"], ["-m", "loadmaster.cli"], ["launch/torchrun.py", "train.py"]]
)
def test_whoever_forgot_to_activate_the_environment_is_told_so(words: list[str]):
    bare = {"PYTHONPATH": str(ROOT), "PATH": ""}
    ended = subprocess.run([sys.executable, "-S", *words], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert ended.returncode == 2 and f"fix: `. .venv/bin/activate` in {ROOT}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_page_with_the_exit_codes_says_the_same():
    table = [line for line in EXIT_CODES.splitlines() if line.startswith("|")]
    for page in ("configuration.md", "training.md"):
        text = (DOCS / page).read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
        assert [line for line in text.splitlines() if line.startswith("|")] == table, page
