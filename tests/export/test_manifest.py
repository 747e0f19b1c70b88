from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from loadmaster.cli import main
from loadmaster.errors import ExportRejected
from loadmaster.export.manifest import OLDEST_SERVER, read_manifest, verify_manifest, write_manifest
from loadmaster.files import read_json, write_json


@pytest.fixture
def artifact(tmp_path):
    folder = tmp_path / "bf16"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "sub" / "tokenizer.json").write_text("{}")
    write_manifest(folder, {"format": "bf16", "recipe": "x"})
    return folder


def test_a_fresh_artifact_verifies_wherever_it_is_moved(artifact, tmp_path):
    assert verify_manifest(artifact) == []
    artifact.rename(tmp_path / "elsewhere")
    assert verify_manifest(tmp_path / "elsewhere") == []


def test_the_manifest_says_what_it_holds(artifact):
    manifest = read_manifest(artifact)
    assert [entry["path"] for entry in manifest["files"]] == ["model.safetensors", "sub/tokenizer.json"]
    assert manifest["bytes"] == 256 * 40 + 2
    assert manifest["oldest_server"] == OLDEST_SERVER["bf16"]
    assert {"schema", "format", "recipe", "versions", "created_utc"} <= manifest.keys()
    assert {"torch", "transformers", "loadmaster"} <= manifest["versions"].keys()


def test_a_candidate_that_scored_nan_and_was_not_taken_does_not_end_the_export(tmp_path):
    scores = {"int4-rtn": {"mean_kl": 0.01}, "int4-gptq": {"mean_kl": float("nan"), "perplexity": float("inf")}}
    write_manifest(tmp_path, {"format": "int4", "verification": {"candidate": "int4-rtn", "candidates": scores}})
    kept = read_manifest(tmp_path)["verification"]["candidates"]
    assert kept == {"int4-rtn": {"mean_kl": 0.01}, "int4-gptq": {"mean_kl": None, "perplexity": None}}


@pytest.mark.parametrize("position", [0, 5000, 10239])
def test_one_flipped_bit_is_found(artifact, position):
    path = artifact / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert verify_manifest(artifact) == ["model.safetensors: changed since it was exported (sha256 differs)"]


def test_a_flipped_bit_in_any_byte_of_the_manifest_itself_is_found(artifact):
    path = artifact / "manifest.json"
    content = path.read_bytes()
    assert verify_manifest(artifact) == [] and "manifest_sha256" not in read_manifest(artifact)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert verify_manifest(artifact), (position, bytes(flipped[max(0, position - 20) : position + 20]))


def test_missing_added_and_cut_files_are_found(artifact):
    (artifact / "sub" / "tokenizer.json").unlink()
    (artifact / "extra.py").write_text("x")
    with open(artifact / "model.safetensors", "r+b") as file:
        file.truncate(100)
    problems = "\n".join(verify_manifest(artifact))
    assert "sub/tokenizer.json: missing" in problems
    assert "extra.py: not in the manifest" in problems
    assert "model.safetensors: 100 bytes, the manifest says 10240" in problems


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "sub/../../outside", "", 7])
def test_a_path_that_leaves_the_folder_is_a_problem_and_is_not_read(artifact, name):
    (artifact.parent / "outside").write_text("secret")
    manifest = read_json(artifact / "manifest.json")
    manifest["files"].append({"path": name, "bytes": 6, "sha256": "0"})
    write_json(artifact / "manifest.json", manifest)
    assert verify_manifest(artifact) == [
        "manifest.json: changed since it was written (sha256 differs)", f"{name!r}: not a path inside the folder"
    ]


def test_a_symbolic_link_is_a_problem_even_to_the_right_content(artifact):
    target = artifact.parent / "moved"
    (artifact / "model.safetensors").rename(target)
    (artifact / "model.safetensors").symlink_to(target)
    assert verify_manifest(artifact) == ["model.safetensors: is or lies behind a symbolic link"]


@pytest.mark.parametrize("name", ["extra", "README.md", ".cache", "sub/extra"])
@pytest.mark.parametrize("target", ["/etc", "/etc/hostname", "/nowhere"])
def test_a_symbolic_link_besides_is_a_problem_wherever_it_leads(artifact, name, target):
    (artifact / name).symlink_to(target)
    assert verify_manifest(artifact) == [f"{name}: a symbolic link that is not in the manifest"]


def test_only_what_the_hub_puts_beside_an_export_may_lie_there(artifact):
    for name in ("README.md", ".gitattributes", ".cache/huggingface/download/model.safetensors.metadata"):
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_text("x")
    assert verify_manifest(artifact) == []
    for name in ("README.md.py", ".gitattributes.safetensors", ".cache/modeling.py"):
        (artifact / name).write_text("x")
        assert verify_manifest(artifact) == [f"{name}: not in the manifest"]
        (artifact / name).unlink()


def test_a_file_that_cannot_be_read_is_a_problem_by_name(artifact, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("loadmaster.export.manifest.sha256_file", refuse)
    assert "model.safetensors: cannot be read (Permission denied)" in verify_manifest(artifact)


def test_a_manifest_of_nothing_is_a_problem(tmp_path):
    write_manifest(tmp_path, {"format": "bf16"})
    assert verify_manifest(tmp_path) == ["the manifest lists no files"]


def test_no_manifest_is_no_artifact(artifact):
    write_json(artifact / "manifest.json", {"schema": 99})
    assert "schema" in verify_manifest(artifact)[0]
    (artifact / "manifest.json").write_text("{")
    assert "not JSON" in verify_manifest(artifact)[0]
    (artifact / "manifest.json").unlink()
    with pytest.raises(ExportRejected, match=r"has no manifest\.json"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"schema": 1, "files": 5}', "has no list of files"),
        (b'{"schema": 1, "files": {"path": "x"}}', "has no list of files"),
        (b'{"schema": 1, "files": null}', "has no list of files"),
        (b'{"schema": 1, "files": [5, null, "x", {"path": ["x"]}]}', "None: not a path inside the folder"),
        (b'{"schema": 1, "files": [{"path": "model.safetensors", "bytes": "many"}]}', "the manifest says many"),
        (b'{"schema": 1, "files": [{"path": "model.safetensors"}]}', "the manifest says None"),
        (b'{"schema": 1, "files": [{"path": "a\\u0000b"}]}', "not a path inside the folder"),
        (b'{"schema": 1, "files": [{"path": "/etc/hostname"}]}', "'/etc/hostname': not a path inside the folder"),
        (b'{"schema": 1, "files": [{"path": "../bf16/model.safetensors"}]}', "not a path inside the folder"),
        (b'{"schema": 1, "files": [{"path": "' + b"a" * 5000 + b'"}]}', "cannot be read (File name too long)"),
        (b'{"schema": 1, "files": [], "manifest_sha256": "' + b"\\ud800" * 64 + b'"}', "changed since it was written"),
        (b'{"schema": 1}', "not in the manifest"),
        (b"[1]", "does not have schema 1"),
        (b"not JSON", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_loadmaster_verify_says_what_is_wrong_with_a_manifest(artifact, content, said, capsys):
    (artifact / "manifest.json").write_bytes(content)
    assert main(["verify", str(artifact)]) == 5
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(("name", "said"), [
    ("manifest.json", "manifest.json cannot be read (is no regular file)"),
    ("model.safetensors", "model.safetensors: is no regular file"),
])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_said_and_not_waited_for(artifact, name, said, make, capsys):
    (artifact / name).unlink()
    make(artifact / name)
    assert main(["verify", str(artifact)]) == 5
    assert said in capsys.readouterr().err


def test_loadmaster_verify_says_which_export_of_a_run_is_gone(artifact, tmp_path, capsys):
    (run := tmp_path / "a run" / "export").mkdir(parents=True)
    shutil.copytree(artifact, run / "int4")
    (run.parent / "result.json").write_text('{"exports": {"bf16": {}, "int4": {}}}')
    assert main(["verify", str(run.parent)]) == 5
    captured = capsys.readouterr()
    assert captured.out == f"{run / 'int4'}: every file is as the manifest says\n"
    assert captured.err.startswith(f"{run / 'bf16'}: the run exported it, and it is not there; loadmaster export '")
    for says_nothing_of_more in ('{"exports": {"int4": {}}}', '{"exports": null}', "[]", "{", "[" * 10_000):
        (run.parent / "result.json").write_text(says_nothing_of_more)
        assert main(["verify", str(run.parent)]) == 0
    (run.parent / "result.json").unlink()
    os.mkfifo(run.parent / "result.json")  # which would be waited for
    assert main(["verify", str(run.parent)]) == 0


def test_loadmaster_verify_names_the_file_with_a_flipped_bit_and_what_is_no_export(artifact, tmp_path, capsys):
    assert main(["verify", str(artifact)]) == 0
    path = artifact / "sub" / "tokenizer.json"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert main(["verify", str(artifact)]) == 5
    assert "sub/tokenizer.json: changed since it was exported" in capsys.readouterr().err
    for nothing, said in ((tmp_path / "nowhere", "there is no such folder"), (path, "is a file")):
        assert main(["verify", str(nothing)]) == 5
        assert said in capsys.readouterr().err
    manifest = artifact / "manifest.json"
    manifest.rename(tmp_path / "manifest.json")
    manifest.symlink_to(tmp_path / "manifest.json")
    assert main(["verify", str(artifact)]) == 5
    assert "holds files of its own only" in capsys.readouterr().err


def test_loadmaster_verify_of_a_run_directory_checks_and_names_every_export(tmp_path, capsys):
    run_dir = tmp_path / "runs/smoke/one"
    for name in ("bf16", "int4", ".fp8.partial"):
        folder = run_dir / "export" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        if not name.startswith("."):
            write_manifest(folder, {"format": name, "recipe": "x"})
    for given in (run_dir, run_dir / "export"):
        assert main(["verify", str(given)]) == 0
        ends = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
        assert [(line[0], line[2]) for line in ends] == [
            (str(run_dir / "export" / name), "every file is as the manifest says") for name in ("bf16", "int4")
        ]
    (run_dir / "export/bf16/model.safetensors").write_bytes(b"y" * 100)
    (run_dir / "export/fp8").mkdir()
    assert main(["verify", str(run_dir)]) == 5
    told = capsys.readouterr()
    assert f"{run_dir}/export/bf16: model.safetensors: changed since it was exported" in told.err
    assert f"{run_dir}/export/fp8: {run_dir}/export/fp8 has no manifest.json" in told.err
    assert f"{run_dir}/export/int4: every file" in told.out
    (tmp_path / "trained/checkpoints").mkdir(parents=True)
    (tmp_path / "trained/config.yaml").touch()
    assert main(["verify", str(tmp_path / "trained")]) == 5
    told = capsys.readouterr().err
    assert f"trained holds no export yet: its export stage is not done; loadmaster export {tmp_path}" in told
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 5
    assert "has no manifest.json" in capsys.readouterr().err


def test_manifests_and_bundles_are_read_and_plans_made_without_torch_and_numpy():
    modules = "loadmaster.export.manifest, loadmaster.endpoint.bundle, loadmaster.pipeline, loadmaster.plan_command"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
