"""Adapter variants: rsLoRA, LoRA+ and NEFTune are peft's and transformers' own, on the same weights and batch."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers.integrations.neftune import neftune_post_forward_hook

from loadmaster.config.schema import LoraConfig, OptimizerConfig
from loadmaster.errors import ConfigError
from loadmaster.export.adapter import read_adapter
from loadmaster.models.adapters import Narrow, make_trainable, trainable, without_adapter
from loadmaster.models.forward import causal_lm, noisy, token_losses
from loadmaster.models.load import random_model
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.session import make_session
from loadmaster.training.world import World
from tests.training.test_compiled import SHAPE, batch
from tests.training.test_loop import JOB, PLAN


def adapted(**lora):
    model = make_trainable(random_model(SHAPE, torch.float32, "cpu"), "lora", LoraConfig(rank=4, alpha=8, **lora))
    torch.manual_seed(1)
    for name, parameter in trainable(model):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_router_that_is_a_linear_layer_by_its_class_alone_gets_no_adapter(targets):
    """PhiMoE's yields weights and choices beside its logits."""
    routes = {**SHAPE, "model_type": "phimoe", "num_local_experts": 4, "num_experts_per_tok": 2}
    model = make_trainable(random_model(routes, torch.float32, "cpu"), "lora", LoraConfig(rank=4, targets=targets))
    assert not any("router" in name for name, _ in trainable(model))
    token_losses(model.train(), batch(0))[0].backward()
    assert all(parameter.grad is not None for _, parameter in trainable(model))


@pytest.mark.parametrize("stabilised", [False, True])
def test_scaling_on_the_values_between_a_and_b_is_pefts_scaling_of_their_product(stabilised):
    made = adapted(rank_stabilised=stabilised)
    layers = [module for module in made.modules() if isinstance(module, LoraLayer)]
    assert layers and all(layer.lora_variant["default"] is Narrow for layer in layers)
    narrow, _ = token_losses(made, batch(0))
    found = torch.autograd.grad(narrow, [parameter for _, parameter in trainable(made)])
    with without_adapter(made):
        alone, _ = token_losses(made, batch(0))
    for layer in layers:
        del layer.lora_variant["default"]
    wide, _ = token_losses(made, batch(0))
    expected = torch.autograd.grad(wide, [parameter for _, parameter in trainable(made)])
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-6) and abs(narrow.item() - alone.item()) > 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank_and_an_export_merges_it_so(tmp_path):
    model = adapted(rank_stabilised=True)
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scales == {4.0}  # 8 / sqrt(4), where plain LoRA has 8 / 4
    model.save_pretrained(str(tmp_path))
    adapter = read_adapter(tmp_path)
    assert {adapter.delta(name).scale for name in adapter.updates} == {4.0}
    assert token_losses(model, batch(1))[0] != token_losses(adapted(), batch(1))[0]


def test_lora_plus_is_pefts():
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = adapted(), adapted()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    mine = TrainingOptimizer(trainable(ours), config, "adamw", False, b_lr_ratio=8.0)
    other = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, weight_decay=0.1
    )
    for seed in range(3):
        for model in (ours, theirs):
            token_losses(model, batch(seed))[0].backward()
        mine.step(1e-2)
        other.step()
        other.zero_grad()
    for (name, found), (_, expected) in zip(trainable(ours), trainable(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)
    plain = TrainingOptimizer(trainable(adapted()), config, "adamw", False)
    assert [group["lr_ratio"] for group in plain.buckets[0].optimizer.param_groups] == [1.0]


def test_the_noise_is_transformers_own_for_each_document_by_itself():
    embedded = torch.randn(1, 24, 8)
    torch.manual_seed(3)
    module = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    expected = neftune_post_forward_hook(module, None, embedded)
    torch.manual_seed(3)
    torch.testing.assert_close(noisy(embedded, [0, 24], 5.0), expected)
    noise = noisy(embedded, [0, 4, 24], 5.0) - embedded
    for start, end in ((0, 4), (4, 24)):
        largest = 5.0 / ((end - start) * 8) ** 0.5
        assert 0.8 * largest < noise[0, start:end].abs().max() <= largest + 1e-6


def test_noise_is_in_training_alone(tiny):
    job = dataclasses.replace(JOB, neftune_alpha=5.0)
    session = make_session(job, PLAN, World(), 0, tiny)
    assert causal_lm(session.model).neftune_alpha == 5.0
    made = [token_losses(session.model.train(), batch(1))[0].item() for _ in range(2)]
    assert made[0] != made[1]
    made = [token_losses(session.model.eval(), batch(1))[0].item() for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("targets", [r".*(q_proj|lm_head)", r".*(q_proj|embed_tokens)", r".*q_proj|.*norm", ".*", []])
def test_an_adapter_is_of_linear_layers_alone(targets):
    with pytest.raises(ConfigError, match=r"lora\.targets(.|\n)*lora\.modules_to_save"):
        make_trainable(random_model(SHAPE, torch.float32, "cpu"), "lora", LoraConfig(rank=2, targets=targets))


@pytest.mark.parametrize(("pattern", "count"), [("q_proj", 3), (r".*layers\.[01]\..*(gate|up)_proj", 4)])
def test_targets_by_name_or_pattern(pattern, count):
    model = make_trainable(random_model(SHAPE, torch.float32, "cpu"), "lora", LoraConfig(rank=4, targets=pattern))
    assert sum("lora_A" in name for name, _ in trainable(model)) == count
