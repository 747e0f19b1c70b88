"""How a server is put on a machine: over how many GPUs, and how many tokens of a prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster import catalog
from loadmaster.errors import ExportRejected
from loadmaster.export.served.gpus import LOGIT_BYTES, Division, counts_over, division, tokens_at_a_time
from loadmaster.export.served.run import Servers
from loadmaster.files import write_json
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import GIB, cpu, from_catalog
from loadmaster.preflight.serving import weight_bytes

INT4 = {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 128}}}}}
FP8 = {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": None}}}}}
BLOCKS = {"quantization_config": {"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}}}


def shape_of(name: str):
    return from_config(catalog.shapes()[name], name)


def gpus(shape, gpu: str, count: int, form: str = "bf16", config: dict | None = None) -> int | None:
    family = {"bf16": "bf16", "fp8_block": "fp8"}.get(form, form)
    return division(shape, config or {}, form, weight_bytes(shape, family), 4096, from_catalog(gpu, count)).gpus


@pytest.mark.parametrize(
    ("model", "gpu", "count", "form", "config", "expected"),
    [
        ("meta-llama/llama-3.1-8b", "h100_80gb", 8, "bf16", {}, 1),
        ("meta-llama/llama-3.1-70b", "h100_80gb", 4, "bf16", {}, 2),  # what no single card holds
        ("meta-llama/llama-3.1-70b", "h200", 8, "fp8", FP8, 1),
        ("meta-llama/llama-3.1-70b", "l40s", 4, "int4", INT4, 1),
        ("meta-llama/llama-3.1-70b", "rtx4090", 8, "bf16", {}, 8),
        ("meta-llama/llama-3.1-70b", "rtx4090", 6, "bf16", {}, 4),  # it fits nowhere: the server says so, over the most
        ("meta-llama/llama-3.1-8b", "rtx4090", 3, "fp8_block", BLOCKS, 1),
    ],
)
def test_a_model_is_served_over_the_fewest_gpus_that_hold_it(model, gpu, count, form, config, expected):
    assert gpus(shape_of(model), gpu, count, form, config) == expected


def test_it_is_divided_only_as_vllm_divides_it():
    shape = shape_of("meta-llama/llama-3.1-70b")
    assert list(counts_over(shape, 1, 8)) == [1, 2, 4, 8]
    assert list(counts_over(shape, 1, 7)) == [1, 2, 4]
    assert list(counts_over(replace(shape, heads=28, key_value_heads=4), 1, 8)) == [1, 2, 4]  # 28 heads over 8
    assert list(counts_over(replace(shape, key_value_heads=2), 1, 8)) == [1, 2, 4, 8]  # cards share a KV head
    assert list(counts_over(replace(shape, intermediate_size=18944), 128, 8)) == [1, 2, 4]  # 18944 / 8 cuts a group
    assert list(counts_over(replace(shape, intermediate_size=18944), 1, 8)) == [1, 2, 4, 8]
    sparse = replace(shape, experts=8, expert_size=768, intermediate_size=1)
    assert list(counts_over(sparse, 128, 8)) == [1, 2]
    assert list(counts_over(replace(shape, heads=9, key_value_heads=3), 1, 4)) == [1]


@pytest.mark.parametrize("gpu", ["h100_80gb", "a100_80gb", "l40s", "rtx4090"])
@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("weights", [1e9, 1e12])
def test_logits_of_a_pass_fit_in_what_the_server_leaves_of_a_card(gpu, vocabulary, weights):
    shape, machine = replace(shape_of("meta-llama/llama-3.1-8b"), vocabulary_size=vocabulary), from_catalog(gpu, 1)
    found = division(shape, {}, "bf16", weights, 512, machine)
    assert found.share == (0.9 if weights == 1e9 else 0.95) and 256 <= found.tokens <= 2048
    left = (1 - found.share) * machine.memory_gib * GIB
    assert found.tokens * vocabulary * LOGIT_BYTES <= max(left / 2, 256 * vocabulary * LOGIT_BYTES) <= left
    assert division(shape, {}, "bf16", weights, 512, cpu()) == Division(None, tokens_at_a_time(vocabulary, GIB))


def test_a_card_that_nearly_holds_a_model_is_taken_further():
    shape = shape_of("meta-llama/llama-3.1-70b")
    weights = weight_bytes(shape, "fp8")
    alone = division(shape, FP8, "fp8", weights, 4096, from_catalog("h100_80gb", 1))
    assert (alone.gpus, alone.share) == (1, 0.95) and "0.95" in alone.arguments(4096)
    assert division(shape, FP8, "fp8", weights, 4096, from_catalog("h100_80gb", 2)).gpus == 2  # with a share of 0.9


def test_a_prompt_longer_than_a_pass_is_cut():
    whole, cut = Division(1, 576).arguments(576), Division(1, 576).arguments(577)
    assert "--enable-chunked-prefill" not in whole and "--enable-chunked-prefill" in cut
    assert "--tensor-parallel-size" not in whole and whole[2:4] == ["--gpu-memory-utilization", "0.9"]
    assert Division(4, 576).arguments(512)[-2:] == ["--tensor-parallel-size", "4"]
    assert Division(None, 576).arguments(512) == ["--max-num-batched-tokens", "576"]


def test_an_adapter_is_measured_with_the_base_that_it_is_served_over(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"0" * 1000)
    write_json(base / "config.json", catalog.shapes()["meta-llama/llama-3.1-70b"])
    servers = Servers(tmp_path, "job", base, 4096, Path("py"), from_catalog("h100_80gb", 4))
    assert servers._division(adapter, {"format": "adapter"}).gpus == 2
    assert servers._division(base, {"format": "bf16"}).gpus == 1  # by the bytes that are there


def test_the_adapter_of_a_multimodal_model_is_served_over_the_whole_of_it(tmp_path, monkeypatch):
    """It has that one's names; the language model beside it, which was trained, has others."""
    base, adapter, asked = tmp_path / "base", tmp_path / "adapter", []
    for folder in (base, adapter):
        folder.mkdir()
    write_json(base / "config.json", catalog.shapes()["meta-llama/llama-3.1-8b"])
    write_json(base / "MULTIMODAL", {"folder": "/models/gemma-3-4b"})

    def command(*arguments):
        asked.append(arguments[2])
        raise ExportRejected("enough")

    monkeypatch.setattr("loadmaster.export.served.run.server_command", command)
    servers = Servers(tmp_path, "job", base, 4096, Path("py"), from_catalog("h100_80gb", 1))
    with pytest.raises(ExportRejected, match="enough"):
        servers.figures("adapter", {"format": "adapter"}, lambda client: {}, print)
    assert asked == [Path("/models/gemma-3-4b")]
