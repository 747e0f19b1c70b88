from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from loadmaster.config.schema import EndpointConfig, ThresholdsConfig
from loadmaster.errors import ExportRejected
from loadmaster.export import candidates, thresholds
from loadmaster.export.build import Builder, Written
from loadmaster.export.candidates import AS_TRAINED, STORED_BASE, needed, said_of_merges
from loadmaster.export.manifest import read_manifest
from loadmaster.files import read_json

PASS_ALL = ThresholdsConfig(max_perplexity_ratio=1e9, max_mean_kl=1e9, min_top1_agreement=0, min_task_retention=0)


def test_a_candidate_of_two_formats_is_built_once():
    assert needed(["int4", "fp8", "int4_gptq"]) == ["int4-gptq", "int4-rtn", "fp8"]
    assert needed(["adapter"]) == []
    baselines = {each for found in candidates.BASELINES.values() for each in found}
    assert all(set(candidates.CANDIDATES[name]) - baselines for name in candidates.CANDIDATES)


def test_the_gap_between_the_merges_is_said():
    scores = {
        AS_TRAINED: {"mean_kl": 0.0005, "top1_agreement": 0.99},
        STORED_BASE: {"mean_kl": 0.02, "top1_agreement": 0.9},
    }
    assert said_of_merges(AS_TRAINED, scores) == (
        "dequant(nf4) + delta is nearer to the live adapter: KL 0.00050 and top-1 99.00%, "
        "against 0.02000 and 90.00% of bf16 base + delta"
    )


@pytest.mark.parametrize("formats", [["fp8"], ["fp8", "bf16"]])
def test_where_neither_merge_is_close_a_run_that_exports_no_bf16_says_so_too(run, tmp_path, formats):
    run.plan = replace(run.plan, method="qlora", precision="bf16")
    scores = {
        "candidate": STORED_BASE, "failures": ["mean_kl is 0.2, must be at most 0.005"],
        "candidates": {name: {"mean_kl": 0.2, "top1_agreement": 0.8} for name in (AS_TRAINED, STORED_BASE)},
    }
    builder = Builder(run.job, run.plan, run.folder, run.base, run.prepared, run.tokenizer, run.log.append)
    folder, _ = builder._nearer_merge(formats, tmp_path, lambda merges: scores, Written())
    assert folder.name == "merged-1"
    said = [line for line in run.log if "Neither merge" in line or "mean_kl is 0.2" in line]
    assert len(said) == (2 if formats == ["fp8"] else 0)


@pytest.mark.slow
def test_of_the_two_merges_of_a_qlora_adapter_the_nearer_one_is_published_and_quantized(run, monkeypatch):
    run.plan = replace(run.plan, method="qlora")
    limit = replace(PASS_ALL, max_mean_kl=0.01)
    monkeypatch.setattr(thresholds, "DEFAULTS", {"bf16": limit, "fp8": PASS_ALL, "int4": PASS_ALL})
    results = run.export("bf16", "fp8")
    for name in results:
        merge = read_manifest(run.folder / "export" / name)["merge"]
        assert merge["taken"] == AS_TRAINED
        kl = {each: figures["mean_kl"] for each, figures in merge["candidates"].items()}
        assert kl[AS_TRAINED] < 0.1 * kl[STORED_BASE]
        assert len(merge["relative_error"]) == 14 and all(0 < ratio < 5 for ratio in merge["relative_error"].values())
    assert results["bf16"]["candidate"] == AS_TRAINED and results["bf16"]["mean_kl"] == kl[AS_TRAINED]
    assert any("is nearer to the live adapter" in line for line in run.log)

    # Asked for alone, bf16 is chosen by its own verification, and its manifest says the same.
    shutil.rmtree(run.folder / "export")
    run.export("bf16")
    alone = read_manifest(run.folder / "export" / "bf16")["merge"]
    assert alone["taken"] == AS_TRAINED and set(alone["candidates"]) == {AS_TRAINED, STORED_BASE}

    # Neither is close enough: the run says so, and what would serve.
    strict = replace(PASS_ALL, max_mean_kl=1e-9)
    monkeypatch.setattr(thresholds, "DEFAULTS", {"bf16": strict, "fp8": PASS_ALL, "int4": PASS_ALL})
    with pytest.raises(ExportRejected, match=r"bf16: mean_kl(.|\n)*Neither merge(.|\n)*vllm-bnb-plugin"):
        run.export("bf16")


@pytest.mark.slow
def test_every_other_format_is_made_for_the_server_that_is_named(run, monkeypatch):
    monkeypatch.setattr(thresholds, "DEFAULTS", dict.fromkeys(("bf16", "fp8", "int4"), PASS_ALL))
    run.job = replace(run.job, endpoint=EndpointConfig(server="vllm==0.14.0"))
    results = run.export("int4_gptq", "int4_awq", "nvfp4", "gguf")
    for method in ("gptq", "awq"):  # whatever rounding to nearest scores
        found = results[f"int4_{method}"]
        assert found["candidate"] == f"int4-{method}" and set(found["candidates"]) == {f"int4-{method}", "int4-rtn"}
    trained, awq = (load_file(at / "model.safetensors") for at in (run.base, run.folder / "export" / "int4_awq"))
    norms = [name for name in awq if name.endswith("layernorm.weight")]
    assert norms and any(not torch.equal(trained[name], awq[name]) for name in norms)  # factors did move
    assert results["gguf"]["mean_kl"] < 0.02 < results["nvfp4"]["mean_kl"]
    names = {path.name for path in (run.folder / "export" / "gguf").iterdir()}
    assert {"tiny-q8_0.gguf", "Modelfile", "manifest.json"} <= names and "model.safetensors" not in names
    manifest = read_manifest(run.folder / "export" / "nvfp4")
    assert manifest["oldest_server"]["vllm"] == "0.14.0"
    config = read_json(run.folder / "export" / "nvfp4" / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    run.job = replace(run.job, endpoint=EndpointConfig(server="vllm==0.11.2"))
    with pytest.raises(ExportRejected, match=r"vllm 0\.11\.2 .*scale_dtype"):
        run.export("nvfp4")
    assert read_manifest(run.folder / "export" / "nvfp4") == manifest
