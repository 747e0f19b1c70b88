"""Embedding, head and norms trained whole beside an adapter: peft's steps, the base as reference, runs that go on."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, LlamaConfig

from loadmaster.config.schema import LoraConfig, OptimizerConfig
from loadmaster.errors import ConfigError, ExportRejected
from loadmaster.export.adapter import read_adapter
from loadmaster.models import compiled, recompute
from loadmaster.models.adapters import make_trainable, saved_modules, trainable, without_adapter
from loadmaster.models.compiled import compile_layers
from loadmaster.models.forward import causal_lm, token_losses, trained_logits
from loadmaster.models.load import load_base, load_trained, random_model
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.training.batches import trained_tokens
from loadmaster.training.display import Display
from loadmaster.training.loop import make_session, train
from loadmaster.training.metrics import read_metrics
from loadmaster.training.save import write_trained
from loadmaster.training.stop import StopSignal
from loadmaster.training.world import World
from tests.training.test_compiled import SHAPE, batch, steps
from tests.training.test_loop import JOB, PLAN, rows
from tests.training.test_trainer_parity import gradients_one_by_one

LORA = dataclasses.replace(PLAN, method="lora")
OPTIMIZER = OptimizerConfig(lr=1e-2, schedule="constant", warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=0.5)


def job(*names: str, **changes):
    return dataclasses.replace(
        JOB, method="lora", optimizer=OPTIMIZER, lora=LoraConfig(rank=4, modules_to_save=list(names)), **changes
    )


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny, folder)
    config = LlamaConfig.from_pretrained(tiny, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("tied", "names", "pefts"),
    [
        (True, ["lm_head", "norm"], {"modules_to_save": ["embed_tokens", "model.norm"], "ensure_weight_tying": True}),
        (False, ["embed_tokens", "lm_head"], {"modules_to_save": ["embed_tokens", "lm_head"]}),
        pytest.param(
            False, ["lm_head", "input_layernorm"], {"modules_to_save": ["lm_head", "input_layernorm"]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tied", "both", "head"],
)
def test_a_few_steps_are_pefts_and_torchs(tiny, untied, tied, names, pefts):
    folder = tiny if tied else untied
    session = make_session(job(*names), LORA, World(), 0, folder)
    start = {name: parameter.detach().clone() for name, parameter in session.model.named_parameters()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    lora = PeftLoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **pefts)
    model = get_peft_model(model, lora).train()
    model.load_state_dict(start, strict=False)
    assert {name for name, _ in trainable(model)} == {name for name, _ in session.trained}
    decay = [[p for _, p in trainable(model) if (p.dim() > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": decay[0], "weight_decay": 0.1}, {"params": decay[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=OPTIMIZER.lr)
    data = rows(40)
    for step in range(5):
        picked = [data[3 * step + i] for i in range(3)]
        count = sum(map(trained_tokens, picked))
        ours = session.backward(session.split(picked), count).item()
        session.optimizer.clip(OPTIMIZER.max_grad_norm)
        session.optimizer.step(OPTIMIZER.lr)
        theirs = gradients_one_by_one(model, picked, count)
        clip_grad_norm_([p for _, p in trainable(model)], OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert ours == pytest.approx(theirs, abs=1e-5), step
    for (name, found), (_, expected) in zip(session.trained, trainable(model), strict=True):
        if "modules_to_save" in name:
            moved = (expected - start[name]).norm()
            assert moved > 1e-2 and (found - expected).norm() < 1e-3 * moved, name


def test_without_the_adapter_the_modules_are_the_bases(tiny):
    lora = LoraConfig(rank=4, modules_to_save=["lm_head"])
    model = make_trainable(load_base(tiny, torch.float32, "cpu"), "lora", lora)
    base = load_base(tiny, torch.float32, "cpu")
    lm = causal_lm(model)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(1.5)
        trained, expected = (token_losses(each, batch(1))[0] for each in (model, base))
        with without_adapter(model):
            assert token_losses(model, batch(1))[0] == expected != trained
        assert token_losses(model, batch(1))[0] == trained
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "modules_to_save" in name)


def test_what_is_saved_is_loaded_as_it_was_trained(tiny, tmp_path):
    session = make_session(job("embed_tokens", "norm"), LORA, World(), 0, tiny)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in session.trained:
            parameter += 0.05 * torch.randn_like(parameter)
    write_trained(session.model, tmp_path, session.strategy.placed, World())
    assert not (tmp_path / "README.md").exists()  # peft would leave a model card without a word in it
    with torch.no_grad():
        expected = trained_logits(session.model.eval(), batch(1))[0]
        found = trained_logits(load_trained(tiny, tmp_path, torch.float32, "cpu"), batch(1))[0]
    assert torch.equal(found, expected)


def run(tiny, folder, names=("embed_tokens", "norm")):
    session, _ = train(
        job(*names), LORA, SimpleNamespace(train=rows(40), validation=None), load_tokenizer(tiny), tiny, folder,
        "hash", lambda *_: None, StopSignal(), Display(Console(quiet=True)),
    )
    return session


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_bit_for_bit(tiny, tmp_path):
    whole = run(tiny, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-4", tmp_path / "joined" / "checkpoints" / "step-4")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "joined")
    joined = run(tiny, tmp_path / "joined")
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "joined")]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    for (name, one), (_, other) in zip(whole.trained, joined.trained, strict=True):
        assert torch.equal(one, other), name


def test_a_name_means_modules_of_that_name_alone():
    """peft by itself takes all whose names end so: `norm` would be every norm."""
    model = random_model({**SHAPE, "tie_word_embeddings": False}, torch.float32, "cpu")
    assert saved_modules(model, ["norm"])["modules_to_save"] == ["model.norm"]
    layers = [f"model.layers.{i}.input_layernorm" for i in range(3)]
    assert saved_modules(model, ["lm_head", "input_layernorm"]) == {
        "modules_to_save": ["lm_head", *layers], "ensure_weight_tying": False,
    }
    with pytest.raises(ConfigError, match=r"q_proj(.|\n)*embed_tokens, input_layernorm, lm_head, norm"):
        saved_modules(model, ["q_proj"])


@pytest.mark.slow
@pytest.mark.parametrize(("form", "checkpointing"), [(None, "none"), ("nf4", "selective")])
def test_compiled_and_checkpointed_they_learn_the_same(form, checkpointing, monkeypatch):
    monkeypatch.setattr(recompute, "WIDE", 64)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    found = []
    for kept, compiling in (("none", False), (checkpointing, True)):
        lora = LoraConfig(rank=4, modules_to_save=["embed_tokens", "norm", "input_layernorm"])
        model = make_trainable(random_model(SHAPE, torch.float32, "cpu", form), "lora", lora).train()
        checkpoint_activations(model, kept)
        if compiling:
            compile_layers(model)
        found.append(steps(model))
    (plain, _), (made, recompiled) = found
    assert recompiled == 0
    for (loss, gradients), (expected, others) in zip(made, plain, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_lost_its_whole_modules_is_not_merged(tiny, tmp_path):
    model = make_trainable(load_base(tiny, torch.float32, "cpu"), "lora", LoraConfig(rank=4, modules_to_save=["norm"]))
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "lora_" in key}, file)
    with pytest.raises(ExportRejected, match=r"trained with model\.norm whole"):
        read_adapter(tmp_path)
