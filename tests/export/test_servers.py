from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationConfig

from loadmaster.errors import ExportRejected
from loadmaster.export import advice
from loadmaster.export.fp8 import Fp8, Fp8Block
from loadmaster.export.int4 import Int4
from loadmaster.export.linear import quantization_config
from loadmaster.export.servers import aimed_at, for_server, model_config, oldest_reader, tokenizer_config


@pytest.mark.parametrize(
    ("wanted", "version", "compressed_tensors", "reads_5"),
    [
        ("vllm", "0.33.0", "0.17.0", True),
        ("vllm==0.27.1", "0.27.1", "0.17.0", True),
        ("vllm==0.23.0", "0.23.0", "0.17.0", False),  # transformers>=4.56 or 5
        ("vllm==0.11.0", "0.11.0", "0.11.0", False),
        ("vllm==0.10.1.1", "0.10.1.1", "0.10.2", False),  # between two rows: the older
        ("vllm==0.99.0", "0.99.0", "0.17.0", True),
        ("sglang==0.5.23", "0.5.23", "0.18.0", True),
    ],
)
def test_a_server_is_what_its_release_pins(wanted, version, compressed_tensors, reads_5):
    server = aimed_at(wanted)
    assert (server.version, server.compressed_tensors, server.reads_transformers_5) == (
        version, compressed_tensors, reads_5,
    )


@pytest.mark.parametrize("quantizer", [Fp8(), Int4(128)], ids=["fp8", "int4"])
def test_fields_that_a_server_does_not_know_are_left_out_and_mean_the_same(quantizer):
    config = quantization_config(quantizer)
    assert for_server(config, aimed_at("vllm")) == config
    group = for_server(config, aimed_at("vllm==0.11.2"))["config_groups"]["group_0"]
    assert "format" in group and not {"scale_dtype", "zp_dtype"} & group["weights"].keys()
    older = for_server(config, aimed_at("vllm==0.9.2"))
    assert "format" not in older["config_groups"]["group_0"] and older["format"] == quantizer.name
    assert "scale_dtype" in config["config_groups"]["group_0"]["weights"]  # the argument is not changed
    parsed = [QuantizationConfig.model_validate(each) for each in (config, older)]
    scheme, older_scheme = (each.config_groups["group_0"] for each in parsed)
    assert (scheme.weights, scheme.input_activations) == (older_scheme.weights, older_scheme.input_activations)


def test_blocks_are_refused_where_they_were_written_otherwise():
    with pytest.raises(ExportRejected, match=r"vllm 0\.9\.2 .*block_structure=\[128, 128\].*0\.11\.0"):
        for_server(quantization_config(Fp8Block()), aimed_at("vllm==0.9.2"))


def test_a_field_that_says_something_makes_the_format_impossible_on_an_older_server():
    config = quantization_config(Fp8())
    config["config_groups"]["group_0"]["weights"]["scale_dtype"] = "torch.float8_e4m3fn"
    assert for_server(config, aimed_at("vllm==0.14.0")) == config
    with pytest.raises(ExportRejected, match=r"vllm 0\.11\.2 .*0\.12\.2.* scale_dtype=torch\.float8_e4m3fn.*0\.13\.0"):
        for_server(config, aimed_at("vllm==0.11.2"))


@pytest.mark.parametrize(
    ("wanted", "is_quantized", "oldest"),
    [
        ("vllm", True, "0.24.0"),
        ("vllm", False, "0.24.0"),
        ("vllm==0.20.2", True, "0.14.0"),
        ("vllm==0.20.2", False, "0.8.5"),
        ("vllm==0.11.2", True, "0.10.2"),
        ("vllm==0.9.2", True, "0.8.5"),
        ("sglang", True, "0.5.23"),
    ],
)
def test_files_for_a_server_are_read_by_older_ones_that_know_the_same(wanted, is_quantized, oldest):
    server = aimed_at(wanted)
    assert oldest_reader(server, is_quantized)[server.name] == oldest


def test_rope_is_also_written_as_transformers_4_reads_it():
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    config = {"dtype": "bfloat16", "rope_parameters": rope}
    assert model_config(config, aimed_at("vllm")) == config
    older = model_config(config, aimed_at("vllm==0.14.0"))
    assert older == {
        **config, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    plain = model_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, aimed_at("vllm==0.14.0"))
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e4, None)
    several = {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}}
    with pytest.raises(ExportRejected, match=r"one RoPE for all layers"):
        model_config(several, aimed_at("vllm==0.14.0"))


def test_what_queries_grow_by_is_written_where_vllm_looks_for_it():
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1}
    config = {"model_type": "ministral3", "rope_parameters": rope}
    scaled = {"llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1}}
    assert model_config(config, aimed_at("vllm")) == {**config, **scaled}
    for other in ({**config, "model_type": "mistral"}, {"model_type": "ministral3", "rope_parameters": None}):
        assert model_config(other, aimed_at("vllm")) == other


def test_the_tokenizer_is_written_in_the_terms_of_the_oldest_transformers():
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    assert tokenizer_config(config, aimed_at("vllm")) == {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert tokenizer_config(config, aimed_at("vllm==0.14.0")) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"],
    }


@pytest.mark.parametrize(
    ("format_name", "gpu", "said"),
    [
        ("fp8", "a100_80gb", "no FP8 matrix units"),
        ("fp8", "h100_80gb", None),
        ("fp8", "auto", None),
        ("fp8_block", "a100_80gb", "no FP8 matrix units"),
        ("fp8_block", "l40s", "Hopper and Blackwell"),
        ("int4", "a100_80gb", None),
        ("int4_gptq", "h100_80gb", "fp8 is faster"),
        ("nvfp4", "h100_80gb", "no FP4 matrix units"),
        ("nvfp4", "b200", None),
        ("gguf", "auto", "vllm-gguf-plugin"),
        ("bf16", "a100_80gb", None),
    ],
)
def test_advice_is_about_the_card_that_will_serve(format_name, gpu, said):
    lines = advice.lines(format_name, gpu)
    assert (said is None and not lines) or said in " ".join(lines)
