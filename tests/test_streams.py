"""What a command does where its output meets no reader, no room or not every character. Real processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loadmaster.cli import main
from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.files import cached_in
from loadmaster.streams import agreed
from tests.runs import command, environment, file_system, metrics

LOADMASTER = [sys.executable, "-m", "loadmaster"]


def start(
    words: list[str], folder: Path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **variables: str
) -> subprocess.Popen:
    return subprocess.Popen(
        words, cwd=folder, stdout=stdout, stderr=stderr, text=True, env={**environment(), **variables}
    )


@pytest.mark.slow
def test_a_run_whose_reader_leaves_trains_to_its_end(few_words: Path, tmp_path: Path):
    words = ["hardware=cpu", "sequence_length=64", "max_steps=2", "data.max_rows=24", "batch.global_size=2",
             "evaluation.task=none", "tracker=none", "stop_after=train", "run_dir=run"]
    process = start(command(f"model.path={few_words}", *words), tmp_path)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "run directory: run\n"
    process.stdout.close()
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2] and (tmp_path / "run/adapter").is_dir()
    assert process.stderr.read().count("Broken") == 0


@pytest.mark.parametrize("look", [["--info"], ["--help"], ["--cfg", "job"]])
def test_what_is_only_looked_at_ends_with_its_reader_and_no_traceback(look: list[str], tmp_path: Path):
    reader, writer = os.pipe()
    process = start([*command(), *look], tmp_path, stdout=writer)
    os.close(reader)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path: Path):
    reader, writer = os.pipe()
    process = start([*LOADMASTER, "plan", "epochs=0"], tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(timeout=60) == ConfigError.exit_code


@pytest.mark.parametrize("words", [["plan", "--json"], ["prices"]])
def test_output_to_a_full_disk_is_a_sentence(words: list[str], tmp_path: Path):
    with open("/dev/full", "w") as full:
        process = start([*LOADMASTER, *words], tmp_path, stdout=full)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 4 and said.startswith("error: ") and "No space left on device" in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize("words", [["plan"], pytest.param(["data", "--rows=1"], marks=pytest.mark.slow)])
def test_a_log_in_another_encoding_gets_question_marks(words: list[str], tmp_path: Path):
    process = start([*LOADMASTER, *words], tmp_path, PYTHONIOENCODING="ascii")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "???" in out if words == ["plan"] else '?{"customer"' in out


def test_a_current_folder_that_is_gone_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="is gone, or you may not look into it"):
        compose([])
    assert main(["runs"]) == 2 and "cd to one that is there" in capsys.readouterr().err
    assert main(["prices"]) == 0 and "h100_80gb" in capsys.readouterr().out
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["pods"]) not in (0, 2) and "RUNPOD_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b""))])
def test_nobody_who_could_be_asked_agrees(stdin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(LoadmasterError, match="nobody is there to ask: --yes goes on without"):
        agreed("delete all?")


def test_what_is_no_text_is_no_yes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert agreed("delete all?") is False


def test_figures_for_programs_come_whole_through_a_pipe(tmp_path: Path):
    process = start([*LOADMASTER, "plan", "--json"], tmp_path)
    assert json.loads(process.communicate(timeout=60)[0])["fits"] is True


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own with room for a few small files."""
    with file_system(tmp_path / "disk", "48k") as folder:
        yield folder


@pytest.mark.slow
def test_a_cache_on_a_full_disk_is_named_and_not_the_run_directory(few_words: Path, small_disk: Path, tmp_path: Path):
    cached = start([*LOADMASTER, "data", f"model.path={few_words}"], tmp_path, LOADMASTER_CACHE=str(small_disk))
    said = cached.communicate(timeout=60)[1]
    assert cached.returncode == 4 and "Traceback" not in said, said
    assert f"tokenised data cannot be kept in {small_disk / 'data'}: its disk is full" in said
    assert "fix: set LOADMASTER_CACHE" in said and "run_dir" not in said


def test_a_cache_that_takes_no_files_is_named_whoever_fails_to_write(small_disk: Path):
    (small_disk / "file").touch()
    said = rf"the model cannot be kept in {small_disk}: (its disk is full|not a directory)\n    fix: set LOADMASTER"
    with pytest.raises(LoadmasterError, match=said), cached_in(small_disk, "the model"):
        save_file({"x": np.zeros(99_999)}, small_disk / "x.safetensors")  # in native code, with an error of its own
    with pytest.raises(LoadmasterError, match=said), cached_in(small_disk, "the model"):
        (small_disk / "file" / "x").mkdir()
    above = Path("/proc/nowhere/cache")  # whose parent cannot be made
    with pytest.raises(LoadmasterError, match=f"cannot be kept in {above}: no such file"), cached_in(above, "it"):
        above.mkdir(parents=True)
    with pytest.raises(FileNotFoundError), cached_in(small_disk, "the model"):
        Path("/nowhere/else").read_text()
