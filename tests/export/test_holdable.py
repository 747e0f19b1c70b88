"""What a format cannot hold is said by the plan and before training, and is what the export itself would refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadmaster import catalog
from loadmaster.cli import main
from loadmaster.config.schema import EndpointConfig, ExportConfig, Job, ModelConfig
from loadmaster.errors import ConfigError, ExportRejected
from loadmaster.export import refuse_unholdable
from loadmaster.export.build import NVFP4, streamed
from loadmaster.export.servers import aimed_at, model_config
from loadmaster.preflight.config_json import find_shape, from_config
from loadmaster.preflight.exports import refuse_unholdable as refuse_by_shape
from loadmaster.preflight.exports import unholdable

QUANTIZED = ("fp8", "fp8_block", "int4", "int4_gptq", "int4_awq", "nvfp4")
FORMATS = ("adapter", "bf16", *QUANTIZED, "gguf")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
GEMMA_4 = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 64,
           "hidden_size_per_layer_input": 0}
MODELS = {
    "llama": {},
    "llama of 128": {"hidden_size": 128, "head_dim": 64},
    "llama of 40": {"intermediate_size": 40},
    "llama of 16": {"intermediate_size": 48},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "gemma2": {"sliding_window": 64},
    "gemma4_text": GEMMA_4,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
}
REFUSED = {
    "llama": {"fp8_block"}, "llama of 128": set(), "llama of 40": set(QUANTIZED) - {"fp8"},
    "llama of 16": set(QUANTIZED) - {"fp8", "nvfp4"}, "qwen3": {"fp8_block"},
    "phi3": {"fp8_block", "gguf"}, "gemma2": {"fp8_block", "gguf"},
    "gemma4_text": {"fp8_block", "gguf", "int4_awq"},
    "mixtral": {*QUANTIZED, "gguf"}, "qwen3_moe": {*QUANTIZED, "gguf"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory, smollm2: Path) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256,
             "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(request.param.split()[0], **{**sizes, **MODELS[request.param]})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    shutil.copyfile(smollm2 / "tokenizer.json", folder / "tokenizer.json")
    return request.param, folder


@pytest.mark.parametrize("name", FORMATS)
def test_the_plan_and_the_export_refuse_the_same(model, name: str) -> None:
    kind, folder = model
    shape = from_config(json.loads((folder / "config.json").read_text()), "mine")
    assert bool(unholdable(name, shape)) == (name in REFUSED[kind])
    if name in REFUSED[kind]:
        with pytest.raises(ExportRejected):
            streamed([name], folder, aimed_at("vllm"))
    else:
        streamed([name], folder, aimed_at("vllm"))


def test_exports_of_gemma_4_have_the_sizes_of_heads_by_both_names() -> None:
    written = json.loads(AutoConfig.for_model("gemma4_text", num_attention_heads=4, **GEMMA_4).to_json_string())
    found = model_config(written, aimed_at("vllm"))
    assert "global_head_dim" not in written and found["per_layer_config"] == written["per_layer_config"]
    assert (found["global_head_dim"], found["num_global_key_value_heads"]) == (32, 1)
    assert AutoConfig.for_model(**found).to_dict() == AutoConfig.for_model(**written).to_dict()


def test_a_base_whose_tokenizer_gguf_cannot_hold_is_refused_before_it_is_trained(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "base", copy_function=shutil.copyfile)
    backend = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**backend, "pre_tokenizer": {"type": "Metaspace"}}))
    job = Job(model=ModelConfig(path=str(folder)), export=ExportConfig(formats=["bf16", "gguf"]))
    with pytest.raises(ConfigError, match="SentencePiece"):
        refuse_unholdable(job, folder, "lora")
    refuse_unholdable(job, tiny, "lora")
    refuse_unholdable(Job(export=job.export, stop_after="evaluate"), folder, "full")


def test_a_base_whose_files_have_other_names_than_what_is_trained_is_refused_before_training(tmp_path: Path) -> None:
    """Neither could an adapter be merged into Gemma 3's multimodal files, nor whole weights be compared with them."""
    text = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    job = Job(model=ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"gemma3 have other names .*model\.language_model\.layers\.0"):
        refuse_unholdable(job, tmp_path, "lora")
    refuse_unholdable(replace(job, export=ExportConfig(formats=["adapter"])), tmp_path, "lora")
    refuse_unholdable(replace(job, stop_after="train"), tmp_path, "lora")
    with pytest.raises(ConfigError, match=r"(?s)model\.name.*gemma3 have other names"):  # it could not even be saved
        refuse_unholdable(replace(job, stop_after="train"), tmp_path, "full")


def test_a_base_that_was_saved_without_its_head_is_trained_whole_and_takes_no_adapter(tiny, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    model.model.save_pretrained(tmp_path)
    job = Job(model=ModelConfig(path=str(tmp_path)))
    refuse_unholdable(job, tmp_path, "full")
    with pytest.raises(ConfigError, match=r"llama have other names .*saved without its head"):
        refuse_unholdable(job, tmp_path, "lora")


def test_formats_that_an_old_server_does_not_know_are_refused_before_training(tiny: Path) -> None:
    def refuse(name: str, version: str) -> None:
        endpoint = EndpointConfig(server=f"vllm=={version}")
        job = Job(model=ModelConfig(path=str(tiny)), export=ExportConfig(formats=["bf16", name]), endpoint=endpoint)
        refuse_unholdable(job, tiny, "lora")

    with pytest.raises(ConfigError, match=r"vllm 0\.10\.2 .*scale_dtype=torch\.float8_e4m3fn"):
        refuse("nvfp4", "0.10.2")
    refuse("nvfp4", "0.14.0")
    refuse("int4", "0.8.5")


def test_what_nvfp4_asks_of_a_server_is_what_its_scheme_writes() -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    written = preset_name_to_scheme("NVFP4", ["Linear"]).model_dump(mode="json")
    young = catalog.servers()["fields"]["arguments"]
    for part in ("weights", "input_activations"):
        said = {name: value for name, value in written[part].items() if name in young and value is not None}
        assert said == NVFP4["config_groups"][""]["weights"]


def test_the_plan_names_the_formats_and_a_run_is_refused(tiny: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [f"model.path={tiny}", "hardware=cpu", "export.formats=[bf16,fp8_block]"]
    assert main(["plan", *asked, "--json"]) == 0  # what fits is asked here; the job itself would be refused
    (said,) = (reason for reason in json.loads(capsys.readouterr().out)["reasons"] if "fp8_block" in reason)
    assert said.startswith("the export will not pass: export.formats: fp8_block cannot hold tiny")
    assert "64 inputs, which is no multiple of 128" in said or "64 outputs, which is no multiple of 128" in said
    assert main(["export", *asked]) == 2
    said = capsys.readouterr().err
    assert "export.formats = [bf16,fp8_block]   on the command line" in said and "fix: export.formats=[bf16]" in said


def test_an_adapter_is_not_served_over_a_model_of_another_name(tiny: Path) -> None:
    shape = from_config(json.loads((tiny / "config.json").read_text()), "mine")
    job = Job(model=ModelConfig(path=str(tiny)), method="lora", export=ExportConfig(formats=["adapter"]))
    with pytest.raises(ConfigError, match=r"is another model than the one in .*\n.*endpoint\.serve_as=bf16"):
        refuse_by_shape(job, shape)
    refuse_by_shape(replace(job, stop_after="export"), shape)
    refuse_by_shape(replace(job, export=ExportConfig(formats=["adapter", "bf16"])), shape)
    refuse_by_shape(replace(job, model=ModelConfig(name="mine", path=str(tiny))), shape)


@pytest.mark.parametrize("requests", [{"max_model_len": 4096}, {"prompt_tokens": 2000, "output_tokens": 100}])
def test_requests_longer_than_the_model_knows_are_refused_before_training(tiny: Path, requests: dict[str, int]) -> None:
    config = json.loads((tiny / "config.json").read_text())
    shape = from_config({**config, "max_position_embeddings": 2048}, "HuggingFaceTB/SmolLM2-135M-Instruct")
    job = Job(endpoint=EndpointConfig(**requests), sequence_length=4096)
    with pytest.raises(ConfigError, match=r"max_position_embeddings=2048(.|\n)*endpoint\.max_model_len=2048"):
        refuse_by_shape(job, shape)
    refuse_by_shape(replace(job, stop_after="export"), shape)
    refuse_by_shape(replace(job, endpoint=EndpointConfig()), shape)


@pytest.mark.parametrize(
    ("name", "formats", "count", "able"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", ["bf16"], 8, "1 or 2 or 4"), ("Qwen/Qwen2.5-72B-Instruct", ["int4"], 4, "1"),
        ("Qwen/Qwen2.5-72B-Instruct", ["int4_awq", "fp8_block"], 2, "1"),
    ],
)
def test_cards_that_a_server_cannot_divide_the_model_over_are_refused_before_training(
    name: str, formats: list[str], count: int, able: str
) -> None:
    shape = find_shape(ModelConfig(name=name))
    job = Job(
        model=ModelConfig(name=name), export=ExportConfig(formats=formats), endpoint=EndpointConfig(count=count)
    )
    with pytest.raises(ConfigError, match=rf"cannot divide {name}(.|\n)*fix: endpoint\.count={able}\b"):
        refuse_by_shape(job, shape)
    refuse_by_shape(replace(job, stop_after="export"), shape)
    refuse_by_shape(replace(job, endpoint=EndpointConfig(count=int(able[-1]))), shape)
    both = replace(job, export=ExportConfig(formats=[*formats, "fp8"]))
    if formats == ["int4"]:  # of the two the endpoint takes what goes over four
        refuse_by_shape(both, shape)


def test_requests_that_a_server_would_turn_by_other_factors_than_training_did_are_refused(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    factors = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    shape = from_config({**config, "max_position_embeddings": 131072, "rope_parameters": factors}, "mine")
    job = Job(endpoint=EndpointConfig(max_model_len=8192), model=ModelConfig(name="mine"), sequence_length=4096)
    with pytest.raises(ConfigError, match=r"max_position_embeddings=4096:(.|\n)*fix: endpoint\.max_model_len=4096"):
        refuse_by_shape(job, shape)
    refuse_by_shape(replace(job, endpoint=EndpointConfig(max_model_len=4096)), shape)
    refuse_by_shape(replace(job, sequence_length=8192), shape)  # documents beyond it are trained with the long ones
    llama = {**config, "rope_parameters": {**factors, "rope_type": "llama3"}}
    assert from_config(llama, "mine").short_positions is None
    assert find_shape(ModelConfig(name="microsoft/Phi-4-mini-instruct")).short_positions == 4096
    assert find_shape(ModelConfig(name="microsoft/phi-4")).short_positions is None
