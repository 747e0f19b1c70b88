"""Families that do not keep packed documents apart are found out by their own numbers; others pass."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.models.apart import refuse_mixing
from loadmaster.models.float8 import train_in_fp8
from loadmaster.models.load import random_model
from loadmaster.preflight.config_json import refuse_uncountable
from loadmaster.preflight.families import FAMILIES
from tests.conftest import FEW_WORDS
from tests.training import test_loop

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
CONVOLVES = {"model_type": "lfm2", **SIZES, "layer_types": ["conv", "full_attention"] * 2}
RECURS = {"model_type": "recurrent_gemma", **SIZES, "lru_width": 64, "block_types": ["recurrent", "attention"]}
LOOKS_AHEAD = {"model_type": "bloom", "hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 128}


def made(config: dict, dtype: torch.dtype = torch.float32):
    model = random_model(config, dtype, "cpu")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("config", [CONVOLVES, RECURS, LOOKS_AHEAD], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_layers_see_other_documents_or_what_is_to_come_is_refused(config, dtype):
    with pytest.raises(LoadmasterError, match=f"'{config['model_type']}' cannot be trained here"):
        refuse_mixing(made(config, dtype), 512)


@pytest.mark.parametrize("family", [*FAMILIES, "glm4", "gpt_neox", "granitemoe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_them_apart_passes_and_runs_packed_as_before(family, dtype):
    """Those that are modelled exactly do: training does not try them."""
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    few = {"vocab_size_per_layer_input": SIZES["vocab_size"]}  # of gemma4_text, which has 262,144 by itself
    model = made({"model_type": family, **SIZES, "head_dim": 16, **experts, **few}, dtype)
    refuse_mixing(model, 512)
    assert model.config._attn_implementation == "loadmaster_packed"


def test_products_in_fp8_which_share_a_scale_with_the_neighbours_pass_too():
    model = made({"model_type": "olmo2", **SIZES}, torch.bfloat16)
    train_in_fp8(model, torch.device("cpu"))
    kinds = list(map(type, model.modules()))
    refuse_mixing(model, 512)
    assert list(map(type, model.modules())) == kinds


@pytest.mark.parametrize("family", ["phimoe", "starcoder2", "olmo3", "cohere2"])
def test_a_window_that_a_models_mask_alone_has_limits_the_documents(family):
    """PhiMoE's attention is not told of it; the others' is."""
    model = made({"model_type": family, **SIZES, "num_local_experts": 4, "sliding_window": 64})
    refuse_mixing(model, 64)
    if family != "phimoe":
        return refuse_mixing(model, 512)
    with pytest.raises(LoadmasterError, match=r"have their window of 64 tokens .*\n    fix: sequence_length=64"):
        refuse_mixing(model, 65)
    assert model.config.sliding_window == 64


STOPS = {"model_type": "stablelm", **SIZES}
ROUTES = {"model_type": "phimoe", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "method", "said"),
    [
        (CONVOLVES, "full", "a document in a packed row changes by .*fix: a model of another family"),
        (STOPS, "full", r"step of this one failed \(RuntimeError: .*\)\n    fix: a model of .* are tested$"),
        (ROUTES, "qlora", r"step of this one failed \(\w+Error: .*\)\n    fix: a model of .*, method=full$"),
    ],
    ids=["mixes", "stops", "routes in 4 bits"],
)
def test_a_family_that_is_not_modelled_is_tried_before_its_first_step(config, method, said, few_words, tmp_path):
    kind, folder = config["model_type"], tmp_path / "model"
    made({**config, "vocab_size": FEW_WORDS}).save_pretrained(folder)
    for file in few_words.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    summary = dataclasses.replace(test_loop.PLAN.model, family=kind)
    prepared = SimpleNamespace(train=test_loop.rows(), validation=None)
    plan = dataclasses.replace(test_loop.PLAN, model=summary, method=method)
    with pytest.raises(LoadmasterError, match=f"(?s)'{kind}' cannot be trained here: .*{said}"):
        test_loop.run(folder, tmp_path / "run", prepared=prepared, plan=plan)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("config", [{**CONVOLVES, "layer_types": None, "conv_L_cache": 3}, RECURS])
def test_a_plan_knows_them_by_their_config(config):
    with pytest.raises(ConfigError, match="layers without attention"):
        refuse_uncountable(config, "x")
