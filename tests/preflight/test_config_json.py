"""What a config.json says and leaves out, what is refused of it, and what the model is called."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loadmaster import catalog
from loadmaster.config.schema import HardwareConfig, Job, ModelConfig
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.preflight.config_json import base_name, find_config, find_shape, from_config
from loadmaster.preflight.families import FAMILIES, TOWERS_AND_ALL, UNGATED
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.multimodal import FLAT, TIED, WRAPPED, language_model
from loadmaster.preflight.serving_model import model_and_config

LLAMA = json.loads((catalog.FOLDER / "shapes" / "llama-3.2-1b.json").read_text())["config"]


def test_an_unknown_family_is_an_estimate_and_says_so() -> None:
    config = {**LLAMA, "model_type": "some_new_family"}
    assert "some_new_family" in from_config(config, "x").estimate
    assert from_config(LLAMA, "x").estimate is None


@pytest.mark.parametrize("family", UNGATED)
def test_an_estimate_of_a_family_that_is_known_to_have_no_gates_has_nearly_its_parameters(family: str) -> None:
    """Counted with gates they had 27 to 38% too many; biases and norms are still Llama's."""
    needed = {"num_key_value_heads": 8} if family == "nemotron" else {}
    whole = AutoConfig.for_model(family, **needed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    shape = from_config({**whole.to_dict(), "head_dim": whole.hidden_size // whole.num_attention_heads}, family)
    assert "counted like Llama without gates" in shape.estimate
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.002)


def test_a_gateless_family_with_another_activation_is_an_estimate() -> None:
    few = {"model_type": "arcee", "num_hidden_layers": 2}
    assert from_config(few, "x").estimate is None
    assert "arcee with silu" in from_config({**few, "hidden_act": "silu"}, "x").estimate


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    few = {"model_type": family, "num_hidden_layers": 2}
    few |= {"head_dim": 128} if family == "ministral" else {}  # which transformers cannot do without
    few |= {"hidden_size_per_layer_input": 0} if family == "gemma4_text" else {}  # which is not modelled
    shape = from_config(few, family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**few))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    truth = model.config
    windows = [truth.sliding_window if kind == "sliding_attention" else None
               for kind in getattr(truth, "layer_types", None) or ()]
    assert not windows or list(shape.windows) == windows


def test_fractions_of_rotary_embeddings_are_found_where_transformers_5_writes_them() -> None:
    config = {"model_type": "phi3", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}
    assert from_config(config, "x").rotary_fraction == 0.75


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_hidden_layers": -3}, "num_hidden_layers=-3"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_key_value_heads": 5}, "32 attention heads that do not divide over 5"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 16 layers"),
        ({"hidden_size": 0, "vocab_size": 0}, "hidden_size=0, vocab_size=0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, which no model has"),
        ({"hidden_size": 10**30}, f"hidden_size={10**30}, which no model has"),
        ({"hidden_size": 2064, "head_dim": 64}, "hidden_size=2064, which is no multiple of its 32 heads"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_a_sentence(changed: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        from_config({**LLAMA, **changed}, "x")


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "llama", "num_local_experts": 4, "sliding_window": 1024},
        {"model_type": "mixtral", "moe_intermediate_size": 64, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
        {"model_type": "mixtral", "num_experts": 3},
        {"model_type": "qwen3_moe", "num_local_experts": 5},
        {"model_type": "smollm3", "sliding_window": 1024},
        {"model_type": "smollm3", "sliding_window": 1024, "use_sliding_window": True},
    ],
)
def test_what_a_familys_code_does_not_read_changes_nothing_and_its_other_names_do(more: dict) -> None:
    few = {"num_hidden_layers": 5, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 1000, "pad_token_id": 0, **more}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**few))
    shape = from_config(few, "x")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 5
    assert list(shape.windows) == [1024 if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize(
    "odd",
    [
        {"layer_types": 7}, {"rope_parameters": "default"}, {"text_config": []}, {"quantization_config": "gptq"},
        {"rope_scaling": "linear"}, {"max_position_embeddings": "4096"}, {"original_max_position_embeddings": [4096]},
    ],
)
def test_another_kind_of_value_than_a_key_has_is_refused_in_a_sentence(odd: dict, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **odd}))
    with pytest.raises(ConfigError, match=f"{next(iter(odd))}=.*, which is no (list|object|number)"):
        find_shape(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="which is no"):
        model_and_config(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "more", "said"),
    [
        ("deepseek_v3", {"kv_lora_rank": 512, "n_routed_experts": 256}, "latent attention"),
        ("ernie4_5_moe", {"moe_num_experts": 64, "moe_k": 6}, "experts of another layout"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 5632}, "shared experts"),
        ("jamba", {"mamba_d_state": 16}, "state space"),
        ("qwen3_next", {"layer_types": 16 * ["linear_attention"]}, "linear_attention"),
        ("gemma4_unified_text", {"head_dim": 256, "global_head_dim": 512}, "layers with heads of other sizes"),
        ("bert", {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
    ],
)
def test_a_family_that_is_visibly_not_like_llama_is_refused_unless_it_is_traced(
    model_type: str, more: dict, said: str, tmp_path
) -> None:
    config = {**LLAMA, "model_type": model_type, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(name="x", path=str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        find_shape(model)
    assert "counted like Llama" in find_shape(model, traced=True).estimate


GEMMA_4_31B = {
    "model_type": "gemma4_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512,
    "num_global_key_value_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "vocab_size": 262144,
    "sliding_window": 1024, "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision",
}
"""Sizes of the dense Gemma 4 of 31 billion parameters; layer_types left to transformers, which has the same."""
NOT_COUNTED = [
    ({"hidden_size_per_layer_input": 256}, r"an embedding of each layer's own \(hidden_size_per_layer_input\)"),
    ({"hidden_size_per_layer_input": None}, r"an embedding of each layer's own \(hidden_size_per_layer_input\)"),
    ({"num_kv_shared_layers": 20}, r"layers that share keys and values \(num_kv_shared_layers\)"),
    ({"enable_moe_block": True, "num_experts": 8}, r"experts beside a dense feed-forward \(enable_moe_block\)"),
    ({"use_bidirectional_attention": "all"}, r"attention to later tokens \(use_bidirectional_attention=all\)"),
    ({"per_layer_config": {"5": {"head_dim": 512}}}, r"layers of sizes of their own \(per_layer_config\)"),
    ({"per_layer_config": {"full_attention": {"intermediate_size": 5}}}, r"their own \(per_layer_config\)"),
]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("more", "said"), NOT_COUNTED)
def test_kinds_of_gemma_4_that_are_not_modelled_are_refused_by_the_key_that_says(more, said, whole, tmp_path) -> None:
    config = {key: value for key, value in {**GEMMA_4_31B, **more}.items() if value is not None}
    config = {"model_type": "gemma4", "text_config": config} if whole else config
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(name="x", path=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"modelled only without what this one has: .*{said}"):
        find_shape(model)
    assert "which is not counted" in find_shape(model, traced=True).estimate


@pytest.mark.parametrize("whole", [False, True])
def test_the_dense_gemma_4_is_counted_exactly(whole, tmp_path) -> None:
    config = {"model_type": "gemma4", "text_config": GEMMA_4_31B, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config if whole else GEMMA_4_31B))
    shape = find_shape(ModelConfig(name="x", path=str(tmp_path)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**GEMMA_4_31B))
    assert shape.estimate is None and shape.language_model_of == ("gemma4" if whole else None)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) == 30_697_345_280
    assert shape.lora_parameters(16, "v_proj") == 50 * 16 * (5376 + 4096)  # layers that see everything have none
    windows = {None: 8192 / 2, 1024: 1024 - 1024**2 / (2 * 8192)}
    assert shape.attention_width(8192) == 50 * windows[1024] * 32 * 256 + 10 * windows[None] * 32 * 512


def test_heads_that_flash_kernels_do_not_take_are_told_and_refused_where_layers_have_windows(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_4_31B))
    model = ModelConfig(name="x", path=str(tmp_path))
    for gpu, told in (("h100_80gb", 1), ("cpu", 0)):
        job = Job(model=model, hardware=HardwareConfig(gpu=gpu), method="qlora", sequence_length=512)
        said = [reason for reason in make_plan(job).reasons if "upper bound" in reason and "512 numbers" in reason]
        assert len(said) == told and all(reason.startswith("10 of its 60 layers") for reason in said)
    (tmp_path / "config.json").write_text(json.dumps({**GEMMA_4_31B, "head_dim": 512}))
    with pytest.raises(ConfigError, match="windows in layers with heads of 512 numbers"):
        find_shape(model)


@pytest.mark.parametrize("more", [{}, {"attention_k_eq_v": False}, {"num_global_key_value_heads": None},
                                  {"global_head_dim": 256, "attention_k_eq_v": False}])
def test_a_gemma_4_is_the_same_as_transformers_writes_it(more) -> None:
    """It writes per_layer_config instead of the two keys that it makes it of."""
    config = {**GEMMA_4_31B, **more}
    written = json.loads(AutoConfig.for_model(**config).to_json_string())
    assert "per_layer_config" in written and "global_head_dim" not in written
    assert from_config(written, "x") == replace(from_config(config, "x"), max_position=131072)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", ["mistral3", "qwen3_vl"])
def test_a_multimodal_model_that_no_causal_language_model_is_loaded_from_is_refused(kind, traced, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": {**LLAMA, "model_type": "x"}}))
    with pytest.raises(ConfigError, match=f"'{kind}' is multimodal, and transformers loads no language model"):
        find_shape(ModelConfig(name="x", path=str(tmp_path)), traced)


@pytest.mark.parametrize(
    ("kind", "inner", "flat"),
    [(kind, inner, flat) for kind, inners in WRAPPED.items() for inner in inners for flat in {False, kind in FLAT}],
)
def test_what_a_language_models_config_leaves_out_is_what_transformers_takes_in_the_whole(kind, inner, flat) -> None:
    needed = {"ministral3": {"head_dim": 128}, "gemma4_text": {"hidden_size_per_layer_input": 0}}
    few = {"num_hidden_layers": 2, **needed.get(inner, {})}
    told = few if flat else {"text_config": {"model_type": inner, **few}}
    alone = AutoConfig.for_model(**language_model({"model_type": kind, **told})).to_dict()
    whole = AutoConfig.for_model(kind, **told)
    within = {**whole.text_config.to_dict(), "tie_word_embeddings": whole.tie_word_embeddings}
    own = {"model_type", "architectures", "tie_word_embeddings" * (kind in TIED)}  # that depends on the files
    shared = (alone.keys() & within.keys()) - own
    assert {"rope_parameters", "rms_norm_eps", "vocab_size", "max_position_embeddings"} <= shared
    assert {key: alone[key] for key in shared} == {key: within[key] for key in shared}


@pytest.mark.parametrize(
    ("config", "like"),
    [
        (
            {
                "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "sliding_window": 32768,
                "use_sliding_window": False, "max_window_layers": 28, "rope_theta": 1000000.0, "vision_config": {},
                "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False,
            },
            "Qwen/Qwen2.5-7B",
        ),
        (
            {
                "model_type": "qwen3_vl", "vision_config": {}, "tie_word_embeddings": False, "text_config": {
                    "model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
                    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
                    "rope_theta": 5000000, "max_position_embeddings": 262144,
                    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
                },
            },
            "Qwen/Qwen3-8B",
        ),
    ],
)
def test_qwens_with_a_vision_tower_have_the_parameters_of_those_without(config: dict, like: str, tmp_path) -> None:
    """Configs as they are on the Hub."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, other = find_shape(ModelConfig(path=str(tmp_path))), find_shape(ModelConfig(name=like))
    assert shape.parameters == other.parameters and shape.family == other.family and not shape.estimate
    assert shape.windows == other.windows and shape.language_model_of == config["model_type"]


def test_multimodal_models_that_are_not_refused_are_those_that_transformers_loads() -> None:
    known = {kind: CONFIG_MAPPING[kind] for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING}
    assert {kind for kind, config in known.items() if "text_config" in config.sub_configs} == set(TOWERS_AND_ALL)


@pytest.mark.parametrize("traced", [False, True])
def test_a_family_that_is_refused_at_load_is_refused_by_the_plan(traced: bool, tmp_path) -> None:
    for kind, why in {"gpt_oss": "attention sinks", "doge": "a mask .* which packed attention does not take"}.items():
        config = {**LLAMA, "model_type": kind, "num_experts": 16384}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=f"{why}; models of this family are not trained yet"):
            find_shape(ModelConfig(name="x", path=str(tmp_path)), traced)


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": ', "\x00"])
def test_a_config_that_is_no_json_object_is_refused_in_a_sentence(text: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_shape(ModelConfig(name="x", path=str(tmp_path)))


def test_a_config_without_sizes_is_refused_with_what_is_missing() -> None:
    with pytest.raises(LoadmasterError, match="num_attention_heads"):
        from_config(
            {
                "model_type": "mamba",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "vocab_size": 100,
                "intermediate_size": 128,
            },
            "x",
        )


def test_a_local_folder_is_read_and_a_missing_one_is_named(smollm2, tmp_path) -> None:
    config, where = find_config(ModelConfig(name="anything", path=str(smollm2)))
    assert from_config(config, "x").parameters == 134_515_008 and where.endswith("config.json")
    with pytest.raises(LoadmasterError, match=r"no config\.json"):
        find_config(ModelConfig(name="anything", path=str(tmp_path)))


def test_a_folder_with_another_model_is_not_called_by_a_shipped_ones_name(smollm2, tmp_path) -> None:
    named = ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct", path=str(smollm2))
    assert find_shape(named).name == base_name(named) == named.name
    config = json.loads((smollm2 / "config.json").read_text())
    for change, name in (({"vocab_size": 50000}, named.name), ({"hidden_size": 1152}, "mine")):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine/config.json").write_text(json.dumps({**config, **change}))
        assert base_name(ModelConfig(name=named.name, path=str(tmp_path / "mine"))) == name
    assert base_name(ModelConfig(name="me/mine", path=str(tmp_path / "mine"))) == "me/mine"
    cached = tmp_path / "models--org--name/snapshots/0123abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text((tmp_path / "mine/config.json").read_text())
    assert base_name(ModelConfig(name=named.name, path=str(cached))) == "org/name"


def test_an_unknown_name_gives_the_nearest_known_ones() -> None:
    with pytest.raises(LoadmasterError, match=r"Llama-3\.1-8B"):
        find_config(ModelConfig(name="meta-llama/Llama-3.1-9B"))


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "compressed-tensors", "fp8"])
def test_a_base_that_is_quantized_already_is_refused_with_what_to_take(tmp_path, kind) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "quantization_config": {"quant_method": kind}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"quantized already \({kind}\).*") as caught:
        find_shape(ModelConfig(path=str(tmp_path)))
    assert "method=qlora" in str(caught.value)


def test_codes_of_an_older_bitsandbytes_are_refused_too(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ConfigError, match=r"quantized already \(bitsandbytes\)"):
        find_shape(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("scaling", "family", "known"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "qwen2", 131072),
        ({"rope_type": "yarn", "factor": 4.0}, "qwen3", 160000),
        ({"rope_type": "linear", "factor": 2}, "llama", 80000),
        ({"rope_type": "linear", "factor": 8.0}, "gemma3_text", 40000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, "llama", 40000),
        ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 4096}, "phi3", 40000),
        ({"rope_type": "default"}, "llama", 40000),
        ({"rope_type": "dynamic", "factor": None}, "llama", 40000),
        (None, "llama", 40000),
    ],
)
def test_positions_that_a_rotary_scaling_adds_are_known_as_vllm_derives_them(scaling, family, known) -> None:
    config = {**LLAMA, "model_type": family, "max_position_embeddings": 40000, "rope_scaling": scaling}
    config.pop("rope_parameters", None)
    assert from_config(config, "x").max_position == known


def test_positions_that_are_written_with_a_point_are_whole_numbers() -> None:
    """Requests are cut to them, and a request has no part of a token."""
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096.0}
    shape = from_config({**LLAMA, "max_position_embeddings": 40000.0, "rope_scaling": longrope}, "x")
    assert [repr(each) for each in (shape.max_position, shape.short_positions)] == ["40000", "4096"]


def test_a_folder_given_as_the_models_name_is_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    for name in ("mine", "./mine", str(tmp_path / "mine")):
        with pytest.raises(ConfigError, match=f"model.path={name}; model.name=ORG/NAME"):
            find_config(ModelConfig(name=name))
