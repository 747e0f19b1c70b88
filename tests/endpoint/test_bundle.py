from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.schema import EndpointConfig, ExportConfig, Job
from loadmaster.endpoint.bundle import choose, serve_command, write_bundle
from loadmaster.errors import ConfigError, ExportRejected
from loadmaster.export.manifest import write_manifest
from loadmaster.files import read_json

JOB = Job(recipe="tickets", sequence_length=512, export=ExportConfig(formats=["adapter", "bf16", "int4"]))


def publish(run_dir, name, size, passed=True):
    folder = run_dir / "export" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * size)
    facts = {
        "format": name, "recipe": "tickets", "base_model": {"name": "org/base", "revision": "abc"},
        "stop_token_ids": [2, 7], "verification": {"perplexity_ratio": 1.01, "mean_kl": 0.002, "passed": passed},
    }  # fmt: skip
    write_manifest(folder, {**facts, **({"adapter": {"rank": 24}} if name == "adapter" else {})})


@pytest.fixture
def run_dir(tmp_path):
    for name, size in (("adapter", 10), ("bf16", 300), ("int4", 100)):
        publish(tmp_path, name, size)
    return tmp_path


def test_the_smallest_whole_model_is_served_unless_told_otherwise(run_dir):
    folder = write_bundle(run_dir, JOB)
    manifest = read_json(folder / "manifest.json")
    assert folder == run_dir / "bundle"
    assert manifest["format"] == "int4"
    assert manifest["serve"]["artifact"] == "../export/int4"
    assert (folder / manifest["serve"]["artifact"] / manifest["files"][0]["path"]).is_file()
    chosen = write_bundle(run_dir, replace(JOB, endpoint=EndpointConfig(serve_as="bf16", max_model_len=256)))
    assert read_json(chosen / "manifest.json")["format"] == "bf16"
    assert "--max-model-len 256" in (chosen / "README.md").read_text()


def test_the_readme_has_the_command_on_loopback_and_every_formats_figures(run_dir):
    text = (write_bundle(run_dir, JOB) / "README.md").read_text()
    assert (
        "vllm serve ../export/int4 --served-model-name tickets --host 127.0.0.1 --port 8000 --max-model-len 512" in text
    )
    assert "0.0.0.0" not in text
    assert all(f"| {name} |" in text for name in ("adapter", "bf16", "int4"))
    assert "token\n2, 7." in text and str(run_dir) not in text


def test_an_adapter_alone_is_served_over_its_base_with_room_for_its_rank():
    manifest = {
        "format": "adapter", "recipe": "tickets", "base_model": {"name": "org/base", "revision": "abc"},
        "adapter": {"rank": 24},
    }  # fmt: skip
    command = " ".join(serve_command(manifest, "../export/adapter", 512))
    assert command.startswith("vllm serve org/base --revision abc --enable-lora")
    assert "--lora-modules tickets=../export/adapter --max-lora-rank 32" in command
    assert choose({"adapter": {"bytes": 1}}, "auto") == "adapter"


def test_a_format_that_was_not_exported_is_refused_with_those_that_were(run_dir):
    with pytest.raises(ConfigError, match=r"endpoint\.serve_as = 'fp8'(.|\n)*adapter, bf16, int4"):
        write_bundle(run_dir, replace(JOB, endpoint=EndpointConfig(serve_as="fp8")))
    assert not (run_dir / "bundle").exists()


def test_what_did_not_pass_is_never_bundled(tmp_path):
    publish(tmp_path, "int4", 10, passed=False)
    with pytest.raises(ExportRejected, match="no export that passed"):
        write_bundle(tmp_path, JOB)


def test_formats_of_an_earlier_job_are_left_out(run_dir):
    folder = write_bundle(run_dir, replace(JOB, export=ExportConfig(formats=["bf16"])))
    assert read_json(folder / "manifest.json")["format"] == "bf16"
    assert "int4" not in (folder / "README.md").read_text()
