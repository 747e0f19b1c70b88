"""`loadmaster push` against a Hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from fake_hub import TOKEN, FakeHub

from loadmaster.cli import main
from loadmaster.config.schema import DataConfig, Job, ModelConfig
from loadmaster.config.validate import to_dict
from loadmaster.endpoint import push
from loadmaster.errors import ProviderError
from loadmaster.export.manifest import verify_manifest, write_manifest
from loadmaster.files import write_json

FIGURES = {
    "candidate": "bf16", "tokens": 1703, "perplexity_ratio": 0.9999, "mean_kl": 0.00003, "p99_kl": 0.0003,
    "top1_agreement": 1.0, "flipped_answers": 0.0, "task": {"metric": 0.95, "rows": 60}, "task_retention": 1.0,
    "passed": True, "failures": [], "limits": {"max_mean_kl": 0.005}, "scored_on": "held-out rows",
}
PLAN = {
    "method": "lora", "precision": "fp32", "optimizer": "adamw", "hardware": {"gpu": "cpu", "count": 1},
    "sequence_length": 512,
}


def add_export(run: Path, name: str, **changes) -> Path:
    folder = run / "export" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(name.encode() * 1000)
    (folder / "config.json").write_text("{}")
    facts = {
        "format": name, "recipe": "smoke", "base_model": {"name": "example/tiny", "revision": None},
        "stop_token_ids": [2], "plan": PLAN, "data": {"sha256": "d4" * 32}, "verification": FIGURES, **changes,
    }
    write_manifest(folder, facts)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    add_export(folder, "bf16")
    data = tmp_path / "private" / "tickets.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    job = Job(recipe="smoke", model=ModelConfig(name="example/tiny"), data=DataConfig(path=str(data)), max_steps=5)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(job), sort_keys=False))
    write_json(folder / "result.json", {"steps": 4, "taken_step": 2})
    return folder


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.server.shutdown()


def pushed(hub: FakeHub, run: Path, *options: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment as it is imported."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(run.parent / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", **({"HF_TOKEN": token} if token else {}),
    }
    return subprocess.run(
        [sys.executable, "-m", "loadmaster.cli", "push", str(run), "--repo", "org/name", *options],
        env=environment, capture_output=True, text=True, timeout=120,
    )


def test_a_push_survives_failures_and_leaves_a_repository_that_verifies(hub, run, tmp_path):
    hub.fail = [("POST", "/commit/"), ("PUT", "/lfs/"), ("POST", "/info/lfs")]
    done = pushed(hub, run)
    assert done.returncode == 0, done.stderr
    assert "upload: " in done.stdout and "trying again" in done.stdout
    assert f"pushed: {hub.url}/org/name/commit/c0" in done.stdout
    assert (hub.private, hub.commits, hub.fail) == (True, 1, [])

    download = tmp_path / "download"
    download.mkdir()
    for name, content in hub.files.items():
        (download / name).write_bytes(content)
    assert verify_manifest(download) == []

    card = hub.files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "license": "apache-2.0", "base_model": "example/tiny", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["loadmaster", "bf16"],
    }
    for said in (
        "vllm serve org/name --served-model-name smoke", "0.9999", "95.0%", "rank 16, alpha 32", "0.0002",
        "Trained on tickets.jsonl.", "d4d4", "token 2", "max_mean_kl 0.005",
        "| steps | 5 |\n| weights | those after step 2 |\n| batch |",
    ):
        assert said in card, said

    # Once more: the same repository, a file that the new export has not is taken away, no object is sent twice.
    hub.files["model-00002.safetensors"] = b"stale"
    sent = len([line for line in hub.requests if line.startswith("PUT")])
    assert pushed(hub, run).returncode == 0
    assert "model-00002.safetensors" not in hub.files and ".gitattributes" in hub.files
    assert len([line for line in hub.requests if line.startswith("PUT")]) == sent

    # Another quantization belongs in another repository.
    add_export(run, "fp8")
    refused = pushed(hub, run, "--format", "fp8")
    assert refused.returncode == 4 and "holds bf16: one quantization a repository" in refused.stderr
    assert hub.commits == 2

    everything = [done.stdout, done.stderr, refused.stdout, refused.stderr, *hub.requests, card]
    everything += [path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()]
    everything += [content.decode(errors="replace") for content in hub.files.values()]
    assert not any(TOKEN in text for text in everything)
    assert not any(str(run.parent) in content.decode(errors="replace") for content in hub.files.values())


def test_a_hub_that_refuses_or_stays_away_is_told_in_a_sentence_without_the_token(hub, run, monkeypatch):
    wrong = pushed(hub, run, token="hf_another")
    assert wrong.returncode == 4 and "could not create the repository" in wrong.stderr
    assert "hf_another" not in wrong.stdout + wrong.stderr and "Traceback" not in wrong.stderr

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    monkeypatch.setattr(push, "FIRST_WAIT_S", 0)
    asked, said = [], []

    def ask():
        asked.append(1)
        raise httpx.ConnectError(f"no route with {TOKEN}")

    with pytest.raises(ProviderError, match=r"could not upload: no route with \*\*\*\n.*not uploaded again"):
        push.Hub("org/name")._ask("upload", ask, said.append)
    assert (len(asked), len(said)) == (4, 3) and TOKEN not in "".join(said)

    def silent():
        raise httpx.ReadTimeout("")

    with pytest.raises(ProviderError, match="could not upload"):
        push.Hub("org/name")._ask("upload", silent, said.append)
    assert said[-1] == "  upload: ReadTimeout; trying again"


def test_what_is_to_be_private_is_not_pushed_to_a_repository_that_is_public(hub, run):
    hub.private = False
    refused = pushed(hub, run)
    assert refused.returncode == 4 and "org/name is public already: give --public" in refused.stderr
    assert (hub.commits, hub.files) == (0, {})
    assert pushed(hub, run, "--public").returncode == 0 and hub.commits == 1


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/someone/secret/tickets.jsonl", "tickets.jsonl"), ("~/secret/tickets.jsonl", "tickets.jsonl"),
        ("../secret/tickets.jsonl", "tickets.jsonl"), ("org/dataset", "org/dataset"),
        ("shipped:tickets/train.jsonl", "shipped:tickets/train.jsonl"),
    ],
)
def test_a_card_names_no_folder_of_a_machine_even_when_the_data_are_gone(source, shown):
    assert push._without_folders(source) == shown


def test_a_run_is_pushed_whose_data_are_gone(run, capsys):
    (run.parent / "private" / "tickets.jsonl").unlink()
    assert main(["push", str(run), "--repo", "org/name", "--dry-run"]) == 0
    assert "Trained on tickets.jsonl." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["org/bad name", "org/name/more", "https://huggingface.co/org/name", "-x", "name"])
def test_a_name_that_no_repository_can_have_is_said_so_by_a_dry_run_too(run, capsys, name):
    assert main(["push", str(run), f"--repo={name}", "--dry-run"]) == 2
    assert f"--repo {name} is no name of a repository" in capsys.readouterr().err


def test_a_damaged_manifest_is_not_pushed_and_said_so(run, capsys):
    (run / "export" / "bf16" / "manifest.json").write_text('{"schema": 1, "files": [5, {"path": 7}]}')
    assert main(["push", str(run), "--repo", "org/name", "--dry-run"]) == 5
    assert "does not verify" in capsys.readouterr().err


def test_nothing_is_pushed_without_a_token_or_after_a_bit_has_flipped(run, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    assert main(["push", str(run), "--repo", "org/name"]) == 4
    said = capsys.readouterr()
    assert "needs a token" in said.err and "secret" not in said.out + said.err

    assert main(["push", str(run), "--repo", "org/name", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "org/name (private), bf16:" in shown and "model.safetensors" in shown and "Nothing was uploaded" in shown
    assert "The base model's licence is not known here" in shown

    weights = run / "export" / "bf16" / "model.safetensors"
    weights.write_bytes(b"c" + weights.read_bytes()[1:])
    assert main(["push", str(run), "--repo", "org/name", "--dry-run"]) == 5
    assert "does not verify, so it is not pushed" in capsys.readouterr().err


def test_which_format_is_pushed(run, capsys):
    dry = ["push", str(run), "--repo", "org/name", "--dry-run"]
    assert main([*dry, "--format", "int4"]) == 5
    assert "has no export int4; it has bf16" in capsys.readouterr().err
    add_export(run, "fp8")
    assert main(dry) == 5
    assert "has the exports bf16, fp8: say which one" in capsys.readouterr().err
    (run / "bundle").mkdir()
    (run / "bundle" / "manifest.json").write_text('{"format": "f')
    assert main(dry) == 5
    assert "has the exports bf16, fp8: say which one" in capsys.readouterr().err
    (run / "bundle" / "manifest.json").write_text('{"format": "fp8"}')
    assert main([*dry, "--public"]) == 0
    shown = capsys.readouterr().out
    assert "(public), fp8:" in shown and "base_model_relation: quantized" in shown
    add_export(run, "int4", verification={**FIGURES, "passed": False})
    assert main([*dry, "--format", "int4"]) == 5
    assert "has not passed verification" in capsys.readouterr().err
    assert main(["push", str(run.parent), "--repo", "org/name"]) == 5
    assert "holds no export" in capsys.readouterr().err


def test_a_folder_that_cannot_be_looked_into_is_no_run(capsys):
    """As root may look into all, by a name that no folder can have."""
    name = "x" * 300
    assert main(["push", name, "--repo", "org/name"]) == 5 and "no such folder" in capsys.readouterr().err
    assert main(["fetch", name]) == 4 and "is no folder of a launch" in capsys.readouterr().err


def test_what_a_launched_job_left_elsewhere_is_fetched_first(run, capsys):
    for name in ("model.safetensors", "config.json"):
        (run / "export/bf16" / name).unlink()
    there = {"name": "loadmaster-x", "run_dir": "/workspace/loadmaster/runs/x"}
    for facts, said in (
        ({"volume": "vol1"}, f"first loadmaster fetch {run}"),
        ({"host": "ada@gpu1:22"}, "first scp -r -P 22 ada@gpu1:/workspace/loadmaster/runs/x/export"),
    ):
        write_json(run / "launch.json", there | facts)
        assert main(["push", str(run), "--repo", "org/name"]) == 5
        assert said in "".join(capsys.readouterr()).replace("\n", " ")
    (run / "launch.json").unlink()
    assert main(["push", str(run), "--repo", "org/name"]) == 5
    assert "model.safetensors: missing" in "".join(capsys.readouterr())
