import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadmaster.errors import LoadmasterError
from loadmaster.files import (
    cache_root,
    disk_error,
    exclusive,
    is_full_disk,
    is_whole_safetensors,
    own_folder,
    publish_folder,
    read_json,
    sha256_json,
    storable,
    torn_safetensors,
    write_json,
)


def test_a_disk_that_is_full_from_the_start_is_named_by_what_could_not_be_written(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of an open file: without its name

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_json(tmp_path / "stages.json", {})
    said = str(disk_error(caught.value))
    assert said.startswith(f"[Errno 28] No space left on device: '{tmp_path / 'stages.json'}'; set run_dir")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_without_a_name_may_be_that_of_the_output():
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as output:
        print("step 1", file=output, flush=True)
    assert "; make room where the output goes to, or set run_dir" in str(disk_error(caught.value))


def test_json_that_is_nested_too_deeply_is_refused_as_no_json(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with publish_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), publish_folder(target) as partial:
        (partial / "a").write_text("2")
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_files_of_a_folder_is_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    (tmp_path / "mine").touch(0o600)
    try:
        with publish_folder(tmp_path / "out") as partial:
            save_file({"a": torch.ones(2)}, partial / "a.safetensors")
            (partial / "sub").mkdir()
            (partial / "sub" / "b").write_text("1")
            (partial / "link").symlink_to(tmp_path / "mine")
    finally:
        os.umask(before)
    files = (tmp_path / "out" / "a.safetensors", tmp_path / "out" / "sub" / "b")
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600  # it lies elsewhere


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_a_folder_of_code_is_this_users_own(tmp_path, umask, monkeypatch):
    before = os.umask(umask)
    try:
        assert own_folder(tmp_path / "made" / "here") and own_folder(tmp_path / "made" / "here")
    finally:
        os.umask(before)
    assert not (tmp_path / "made" / "here").stat().st_mode & 0o007
    for name, target in (("link", tmp_path / "made"), ("dangling", tmp_path / "gone")):
        (tmp_path / name).symlink_to(target)
        assert not own_folder(tmp_path / name) and not (tmp_path / "gone").exists()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert not own_folder(tmp_path / "open")

    def on_a_volume_that_shows_one_mode_for_all(dir):
        file = os.open(dir / "private", os.O_RDWR | os.O_CREAT)
        os.fchmod(file, 0o777)
        return os.fdopen(file)

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "TemporaryFile", on_a_volume_that_shows_one_mode_for_all)
        assert own_folder(tmp_path / "open") and not own_folder(tmp_path / "link")
    if os.geteuid() == 0:
        (tmp_path / "others").mkdir()
        os.chown(tmp_path / "others", 65534, 65534)
        assert not own_folder(tmp_path / "others")


def test_a_file_is_not_written_through_a_link_that_lies_in_its_place(tmp_path):
    """Whoever may write to a shared folder could else choose what is overwritten: a number is soon guessed."""
    (tmp_path / "precious").write_text("as it was")
    for name in ("plan.json", f".plan.json.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_json(tmp_path / "plan.json", {})
    assert (tmp_path / "precious").read_text() == "as it was" and not (tmp_path / "plan.json").is_symlink()


def test_a_folder_set_aside_by_a_kill_between_the_renames_comes_back(tmp_path):
    target = tmp_path / "out"
    with publish_folder(target) as partial:
        (partial / "a").write_text("1")
    os.rename(target, tmp_path / ".out.previous")
    with pytest.raises(RuntimeError), publish_folder(target):
        raise RuntimeError
    assert (target / "a").read_text() == "1"
    os.rename(target, tmp_path / ".out.previous")
    target.mkdir()  # killed after both, before the earlier one was removed
    (target / "new").touch()
    with publish_folder(target) as partial:
        (partial / "b").touch()
    assert sorted(tmp_path.rglob("*")) == [target, target / "b"]


def test_json_with_a_number_that_json_lacks_is_refused_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert "1" in (tmp_path / "x.json").read_text()
    assert storable({"a": [float("nan"), (1.5, float("-inf"))], "b": "c"}) == {"a": [None, [1.5, None]], "b": "c"}


def test_a_hash_is_that_of_the_content_in_whatever_order():
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 2, "b": 1})


def test_what_a_full_disk_does_not_take_leaves_nothing_behind(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from loadmaster.files import write_text\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); write_text(Path(sys.argv[1]), 'x' * 1000)"
    )
    command = [sys.executable, "-c", code, tmp_path / "x.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_network_s_folder_without_locks_is_told_with_the_variable_to_set(tmp_path, monkeypatch):
    """Lustre mounted without flock, and a home folder on it."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("loadmaster.files.fcntl.flock", flock)
    said = r"prepared data cannot be kept in .*: files there cannot be locked \(function not.*\n.*LOADMASTER_CACHE"
    with pytest.raises(LoadmasterError, match=said), exclusive(tmp_path / "cache" / "one", "prepared data"):
        pytest.fail("nobody else was kept out")


def test_caches_lie_where_the_variable_says_else_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LOADMASTER_CACHE", raising=False)
    assert cache_root() == tmp_path / ".cache" / "loadmaster"
    monkeypatch.setenv("LOADMASTER_CACHE", "elsewhere")
    assert cache_root() == Path.cwd() / "elsewhere"


def test_a_full_disk_is_known_also_where_native_code_says_it():
    assert is_full_disk(OSError(errno.ENOSPC, "No space left on device")) and is_full_disk(OSError(errno.EDQUOT, ""))
    assert is_full_disk(Exception("No space left on device (os error 28)"))  # as tokenizers and safetensors raise it
    assert not is_full_disk(OSError(errno.EACCES, "Permission denied")) and not is_full_disk(Exception("(os error 2)"))


SHORT = (25).to_bytes(8, "little") + b'{"a":{"data_offsets":[0]}}'[:25]
"""An entry with one end; no file that safetensors would write."""


def test_room_on_a_disk_is_asked_for_where_a_file_is_why_and_no_connection():
    for error in (OSError(errno.EROFS, "Read-only file system", "/x"), Exception("(os error 28)")):
        assert str(disk_error(error)).endswith("on a disk with room")
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    for error in (refused, TimeoutError(errno.ETIMEDOUT, "timed out"), OSError("no connection to huggingface.co")):
        assert str(disk_error(error)) == str(error)
    assert disk_error(ValueError("a")) is None


def test_a_file_of_tensors_that_was_cut_anywhere_is_not_whole(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2)}, file, metadata={"format": "pt"})
    content = file.read_bytes()
    assert is_whole_safetensors(file) and not is_whole_safetensors(tmp_path / "none")
    for size, why in ((0, "no safe"), (4, "no safe"), (8, "header"), (9, "header"), (60, "header"), (-1, "fetch it")):
        file.write_bytes(content[:size])
        assert why in torn_safetensors(file) and not is_whole_safetensors(file), size
    deep = (100_000).to_bytes(8, "little") + b"[" * 100_000
    for damaged in (b"\xff" * 8 + content[8:], content + b"\0", content[:8] + b"[1]" + content[11:], SHORT, deep):
        file.write_bytes(damaged)
        assert not is_whole_safetensors(file)


def test_who_waits_for_another_process_s_lock_says_so(tmp_path, capfd):
    """The other one may be stopped for good: nothing else would tell why this one does nothing."""

    def make() -> None:
        with exclusive(tmp_path / "one", "tokenised data"):
            had.append("the other")

    had: list[str] = []
    waits = threading.Thread(target=make)
    with exclusive(tmp_path / "one", "tokenised data"):
        waits.start()
        said, deadline = "", time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
            said = capfd.readouterr().err
        time.sleep(0.02)
        had.append("this one")
    waits.join(60)
    assert had == ["this one", "the other"]
    assert said == f"waiting for another process that makes tokenised data in {tmp_path / 'one'}\n"
