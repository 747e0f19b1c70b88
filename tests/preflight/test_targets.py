"""lora.targets is judged from a model's shape as training judges it by the model itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadmaster import catalog
from loadmaster.config.schema import HardwareConfig, Job, LoraConfig, ModelConfig
from loadmaster.errors import ConfigError
from loadmaster.models.adapters import make_trainable, target_modules, trainable
from loadmaster.preflight import make_plan
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import full_name
from loadmaster.preflight.targets import in_some_layers_only, linears, other_modules, refuse_unknown
from loadmaster.training.trace import with_trained_part

LLAMA = "meta-llama/Llama-3.1-8B"
LAST_LAYERS = r".*layers\.(2[0-9]|3[01])\..*q_proj"
BY_FAMILY = {shape["model_type"]: shape for shape in catalog.shapes().values()}


def few_layers(family: str) -> dict:
    return {**BY_FAMILY[family], "num_hidden_layers": 2, "layer_types": None}


def meta_model(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def plan(method: str = "lora", **lora):
    return make_plan(
        Job(model=ModelConfig(name=LLAMA), method=method, lora=LoraConfig(**lora), sequence_length=1024,
            hardware=HardwareConfig(gpu="h100_80gb", count=1))
    )


@pytest.mark.parametrize("family", sorted(BY_FAMILY))
def test_every_module_is_a_linear_or_another_by_its_name_in_the_model(family: str) -> None:
    config = few_layers(family)
    shape = from_config(config, family)
    names = {name for name, _ in meta_model(config).named_modules() if name and "dropout" not in name}
    ours = {full_name(name, layer) for name in linears(shape) for layer in range(2)}
    assert ours | set(other_modules(shape)) == names


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["foo", "q_proj"], "is named foo"),
        (["q_prj"], "q_proj; "),
        (["output_proj"], " o_proj; "),
        (["q_proj", "lm_head"], "lora.modules_to_save"),
        (["self_attn.q_proj"], "is named self_attn.q_proj"),
        ([], "nothing would be trained"),
        ("lm_head", "nor an expression"),
        ("embed_tokens", "nor an expression"),
        (".*foo", "nor an expression"),
        ("(", "no regular expression"),
        (".*(q_proj|lm_head)", "also matches lm_head"),
        (".*", "more, where no adapter is made"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_search(targets: str | list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(targets=targets, modules_to_save=["norm"])
    (problem,) = raised.value.problems
    assert problem.key == "lora.targets" and said in f"{problem.message} {problem.remedy}"


def test_layers_of_experts_have_no_dense_linears_to_adapt() -> None:
    shape = from_config(few_layers("mixtral"), "mixtral")
    refuse_unknown(shape, ["q_proj"], "mixtral")
    with pytest.raises(ConfigError, match="is named gate_proj"):
        refuse_unknown(shape, ["q_proj", "gate_proj"], "mixtral")


MIXED = {
    **few_layers("qwen3_moe"), "mlp_only_layers": [0], "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
    "moe_intermediate_size": 32, "num_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}


@pytest.mark.parametrize(
    "targets", ["down_proj", ["q_proj", "gate_proj"], r".*layers\.0\.mlp\.up_proj", r".*[qnp]_proj"]
)
def test_names_by_which_peft_would_adapt_experts_are_refused_where_dense_layers_have_them(
    targets: str | list[str],
) -> None:
    shape = from_config(MIXED, "mixed")
    assert (shape.dense_at, shape.dense_layers, shape.expert_layers) == ((0,), 1, shape.layers - 1)
    with pytest.raises(ConfigError):
        refuse_unknown(shape, targets, "mixed")
    with pytest.raises(ConfigError):
        target_modules(meta_model(MIXED), targets)


@pytest.mark.parametrize("targets", [r".*_proj", r".*layers\.1\.self_attn\.q_proj", ["q_proj", "v_proj"], "o_proj"])
def test_beside_experts_what_is_counted_has_the_adapters_and_nothing_else(targets: str | list[str]) -> None:
    config = {**MIXED, "mlp_only_layers": []}
    shape = from_config(config, "experts")
    refuse_unknown(shape, targets, "experts")
    model = make_trainable(meta_model(config), "lora", LoraConfig(rank=4, targets=targets))
    layers = 1 if "layers" in targets else shape.layers
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    assert trained * shape.layers == shape.lora_parameters(4, targets) * layers


STARCODER_2 = {
    "model_type": "starcoder2", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}


@pytest.mark.parametrize("targets", [["q_proj", "c_fc"], r".*\.(q_proj|c_proj)", "all-linear"])
def test_other_names_of_a_model_that_is_only_estimated_are_let_through(targets: str | list[str]) -> None:
    refuse_unknown(from_config(STARCODER_2, "starcoder2"), targets, "starcoder2")


@pytest.mark.parametrize("targets", [["c_fc"], r".*c_fc", "c_fc"])
def test_what_cannot_be_counted_at_all_is_said(targets: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="nothing that can be counted; model type 'starcoder2'"):
        refuse_unknown(from_config(STARCODER_2, "starcoder2"), targets, "starcoder2")


def test_the_language_model_of_a_multimodal_one_may_be_meant() -> None:
    """Of one that is loaded whole; a language model that is taken out has layers of its own names."""
    shape = from_config({"model_type": "gemma3", "text_config": few_layers("gemma3_text")}, "gemma-3-4b")
    expression = r".*language_model.*(q|v)_proj"
    with pytest.raises(ConfigError, match="nor an expression that matches one"):
        refuse_unknown(shape, expression, "gemma-3-4b")
    shape = from_config({"model_type": "gemma4", "text_config": few_layers("gemma3_text")}, "gemma-4")
    refuse_unknown(shape, expression, "gemma-3-4b")
    assert [matrix.name for matrix in shape.adapted(expression)] == ["q_proj", "v_proj"]
    with pytest.raises(ConfigError, match="nor an expression that matches one"):
        refuse_unknown(from_config(few_layers("llama"), "llama"), expression, "llama")


def test_a_name_is_planned_as_the_list_of_it() -> None:
    one, listed = plan(targets="q_proj"), plan(targets=["q_proj"])
    assert one.model == listed.model and one.memory_gib == listed.memory_gib
    assert one.model.trainable_parameters == 32 * 16 * (4096 + 4096)


@pytest.mark.parametrize("targets", [LAST_LAYERS, ["model.layers.3.self_attn.q_proj"]])
def test_some_layers_are_counted_as_all_and_the_plan_says_so(targets: str | list[str]) -> None:
    some, every = plan(targets=targets), plan(targets="q_proj")
    assert some.memory_gib == every.memory_gib
    assert [reason for reason in some.reasons if reason not in every.reasons] == [
        "lora.targets adapts some layers only and was counted in all 32: less is needed"
    ]


def test_names_and_expressions_for_all_layers_say_nothing_of_some() -> None:
    shape = from_config(few_layers("llama"), "llama")
    assert not any(in_some_layers_only(shape, t) for t in ("all-linear", "q_proj", ("q_proj",), r".*\.(q|v)_proj"))


def test_a_full_fine_tune_has_no_use_for_targets_or_whole_modules() -> None:
    assert plan("full", targets=["foo"], modules_to_save=["foo"]).method == "full"


def test_a_trace_takes_a_single_name() -> None:
    setup = Setup(method="lora", precision="bf16", optimizer="adamw", master_weights=True, lora_targets="q_proj")
    traced = with_trained_part(meta_model(few_layers("llama")), setup)
    assert sum("lora_A" in name for name, _ in traced.named_parameters()) == 2
