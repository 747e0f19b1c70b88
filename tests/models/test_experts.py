"""Experts that a checkpoint stores one by one are read shard by shard, as transformers fuses them."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from loadmaster.errors import LoadmasterError
from loadmaster.models.load import load_base
from loadmaster.models.shards import Checkpoint, empty_model, fill, materialise
from loadmaster.training.placement import Placed
from loadmaster.training.save import _write_model
from loadmaster.training.world import World

CPU = torch.device("cpu")
SHAPE = {
    "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2,
}


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request, tmp_path):
    kinds = {
        "mixtral": lambda: MixtralConfig(num_local_experts=3, **SHAPE),
        "qwen3_moe": lambda: Qwen3MoeConfig(num_experts=3, moe_intermediate_size=16, **SHAPE),
    }
    model = AutoModelForCausalLM.from_config(kinds[request.param](), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def read(folder):
    model = empty_model(folder, torch.float32)
    materialise(model, CPU)
    fill(model, folder, torch.float32)
    return model


def test_experts_are_filled_and_written_as_transformers_does_it(mixture, tmp_path):
    model, whole = read(mixture), load_base(mixture, torch.float32, CPU)
    held = dict(whole.named_parameters())
    assert all(torch.equal(parameter, held[name]) for name, parameter in model.named_parameters())
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(Checkpoint(mixture).rows(experts, 1, 3), held[experts][1:3])

    (tmp_path / "saved").mkdir()
    _write_model(model, tmp_path / "saved", Placed(), World())
    stored = {k: v for path in mixture.glob("*.safetensors") for k, v in load_file(path).items()}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys() and all(torch.equal(saved[name], stored[name]) for name in stored)


def test_a_checkpoint_without_one_of_the_experts_is_refused(mixture):
    config = (mixture / "config.json").read_text()
    (mixture / "config.json").write_text(config.replace("experts\": 3", "experts\": 4"))
    with pytest.raises(LoadmasterError, match="gate_up_proj"):
        read(mixture)
