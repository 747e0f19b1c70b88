"""Shapes: parameter counts equal transformers' to the last one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadmaster import catalog
from loadmaster.preflight.config_json import from_config

SHAPES = {path.stem: json.loads(path.read_text()) for path in sorted((catalog.FOLDER / "shapes").glob("*.json"))}


def count_on_meta(config: dict, layers: int) -> int:
    shape = AutoConfig.for_model(**{**config, "num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count_equals_transformers_exactly(name: str) -> None:
    """Layers are alike, so transformers' count is exactly linear in them: one and two give all."""
    config, layers = SHAPES[name]["config"], SHAPES[name]["config"]["num_hidden_layers"]
    one, two = count_on_meta(config, 1), count_on_meta(config, 2)
    assert from_config(config, name).parameters == one + (layers - 1) * (two - one) == SHAPES[name]["parameters"]


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m", "qwen3-0.6b"])
def test_whole_models_have_that_count_too(name: str) -> None:
    config = SHAPES[name]["config"]
    assert from_config(config, name).parameters == count_on_meta(config, config["num_hidden_layers"])


def test_lora_parameters_equal_pefts() -> None:
    from peft import LoraConfig, get_peft_model

    for name in ("qwen3-0.6b", "phi-4-mini"):
        config = {**SHAPES[name]["config"], "num_hidden_layers": 2, "layer_types": None}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert from_config(config, name).lora_parameters(16, "all-linear") == trainable


def test_targets_select_by_name_list_or_expression() -> None:
    shape = from_config(SHAPES["llama-3.1-8b"]["config"], "x")
    assert [m.name for m in shape.adapted(("q_proj", "v_proj"))] == ["q_proj", "v_proj"]
    assert [m.name for m in shape.adapted(r".*self_attn\.(q|k)_proj")] == ["q_proj", "k_proj"]
    assert [m.name for m in shape.adapted("q_proj")] == ["q_proj"]
    assert [m.name for m in shape.adapted(r".*layers\.3[01]\..*q_proj")] == ["q_proj"]  # not in the first layer


def test_windows_shorten_what_a_token_attends_to() -> None:
    shape = from_config(SHAPES["mistral-7b-v0.1"]["config"], "x")
    assert shape.windows[0] == 4096 and shape.attended(2048) == 1024
    assert shape.attended(32768) == pytest.approx(4096 - 4096**2 / 65536)
