"""Weights that are read before what loads them is imported: each byte once, and never a condition."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadmaster import ahead, files, pipeline


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, size in (("model-1.safetensors", 35), ("model-2.safetensors", 20), ("empty.safetensors", 0)):
        (tmp_path / name).write_bytes(bytes(range(size)))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def read(monkeypatch) -> Counter:
    seen, piece = Counter(), ahead._read_piece

    def counted(path, offset, buffer):
        size = piece(path, offset, buffer)
        assert bytes(buffer[:size]) == path.read_bytes()[offset : offset + size]
        seen.update((path.name, place) for place in range(offset, offset + size))
        return size

    monkeypatch.setattr(ahead, "PIECE_BYTES", 10)
    monkeypatch.setattr(ahead, "_read_piece", counted)
    return seen


@pytest.mark.parametrize(("usable", "threads"), [(1, 1), (2, 1), (3, 2), (96, 4)])
def test_each_byte_of_the_weights_is_read_once(folder, read, monkeypatch, usable, threads):
    monkeypatch.setattr(ahead.processors, "usable", lambda: usable)
    readers = ahead.read_ahead(folder)
    for reader in readers:
        reader.join()
    assert len(readers) == threads and all(reader.daemon for reader in readers)
    wanted = {(f"model-{number}.safetensors", place) for number, size in ((1, 35), (2, 20)) for place in range(size)}
    assert read == Counter(wanted)


def test_what_memory_does_not_hold_twice_is_not_read_ahead(folder, read, monkeypatch):
    for free, begun in ((2 * 55 - 1, False), (2 * 55, True)):
        monkeypatch.setattr(ahead, "free_host_bytes", lambda free=free: free)
        readers = ahead.read_ahead(folder)
        for reader in readers:
            reader.join()
        assert bool(readers) == bool(read) == begun


@pytest.mark.parametrize("sharded", [False, True])
def test_what_the_model_is_not_loaded_from_is_not_read(folder, read, sharded):
    """Mistral's repositories hold the whole model twice."""
    names = ["model-1.safetensors", "model-2.safetensors"]
    (folder / "consolidated.safetensors").write_bytes(bytes(40))
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if not sharded:
        names = ["model.safetensors"]
        (folder / names[0]).write_bytes(bytes(5))
    for reader in ahead.read_ahead(folder):
        reader.join()
    assert {name for name, _ in read} == set(names) and set(read.values()) == {1}


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}', None])
def test_an_index_that_says_nothing_is_for_who_loads_it(folder, index):
    file = folder / "model.safetensors.index.json"
    os.mkfifo(file) if index is None else file.write_text(index)
    assert not any(reader.join() for reader in ahead.read_ahead(folder))


def test_a_file_that_is_gone_or_cannot_be_read_is_for_who_loads_it(folder, monkeypatch, capsys):
    (folder / "linked.safetensors").symlink_to(folder / "nowhere")
    assert ahead.read_ahead(folder) == []
    (folder / "linked.safetensors").unlink()

    def gone(*_):
        raise FileNotFoundError

    monkeypatch.setattr(ahead, "_read_piece", gone)
    for reader in ahead.read_ahead(folder):
        reader.join()
    assert capsys.readouterr().err == ""


def test_training_begins_with_it_and_it_needs_no_torch(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(pipeline, "read_ahead", lambda folder: order.append(folder))
    made = object.__new__(pipeline.Pipeline)
    made.materials = SimpleNamespace(base_folder=tmp_path)
    made._refuse_another_model = lambda: order.append("the model planned for")

    def in_world(stage):
        order.append(stage)
        raise KeyboardInterrupt

    monkeypatch.setattr("loadmaster.export.refuse_unholdable", lambda *_: None)
    made.job = made.__dict__["plan"] = SimpleNamespace(method="lora")
    made.in_world = in_world
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert order == ["the model planned for", tmp_path, "train"]
    code = "import sys, loadmaster.ahead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_hashed_side_by_side_and_told_in_their_order(tmp_path, monkeypatch):
    """Two that wait for each other only end where both are hashed at once."""
    from threading import Barrier

    paths = [tmp_path / name for name in ("b", "a", "c")]
    for path in paths:
        path.write_text(path.name)
    expected, both, whole = [files.sha256_file(path) for path in paths], Barrier(2), files.sha256_file

    def waits(path, ended):
        if path.name != "c":
            both.wait(30)
        return whole(path, ended)

    monkeypatch.setattr(files, "sha256_file", waits)
    assert files.sha256_files(paths, 2) == expected
    assert files.sha256_files([], 1) == []


def test_what_ends_one_files_hashing_ends_the_others(tmp_path):
    """Or a request to stop would wait for files of many GB."""
    endless = tmp_path / "endless"
    endless.touch()
    os.truncate(endless, 2**42)
    code = "import sys; from loadmaster.files import *; sha256_files(list(map(Path, sys.argv[1:])), 2)"
    command = [sys.executable, "-c", code, tmp_path / "gone", endless]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "FileNotFoundError" in done.stderr
