"""DoRA by norms: peft's losses and gradients, plain or compiled; what is merged is the live model; runs go on."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from loadmaster.config.schema import LoraConfig, OptimizerConfig
from loadmaster.errors import ConfigError
from loadmaster.export.adapter import read_adapter
from loadmaster.export.checks import lora_rows
from loadmaster.export.live_checks import merged_weights
from loadmaster.export.merge import merge, round_trip
from loadmaster.export.sidecars import write_config
from loadmaster.models import compiled, recompute
from loadmaster.models.adapters import make_trainable, trainable, without_adapter
from loadmaster.models.compiled import compile_layers
from loadmaster.models.dora import row_norms
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
from tests.training.test_compiled import QWEN, SHAPE, batch, steps
from tests.training.test_loop import JOB, PLAN, rows
from tests.training.test_trainer_parity import gradients_one_by_one

LORA = dataclasses.replace(PLAN, method="lora")
OPTIMIZER = OptimizerConfig(lr=1e-2, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.5)
DORA = dataclasses.replace(JOB, method="lora", optimizer=OPTIMIZER, lora=LoraConfig(rank=4, dora=True))


def shaken(named, std: float = 0.02) -> None:
    """As after some training: at the start m / |V| is 1 and B is zero, where nothing could be told apart."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in named:
            if "lora_A" not in name:
                parameter += std * torch.randn_like(parameter)


def test_norms_of_rows_need_no_whole_matrix():
    torch.manual_seed(0)
    layer, a, b = torch.nn.Linear(96, 40), torch.randn(4, 96), torch.randn(40, 4)
    expected = (layer.weight + 1.7 * b @ a).norm(dim=1)
    torch.testing.assert_close(row_norms(layer, a, b, 1.7), expected, rtol=1e-5, atol=1e-5)


def test_a_few_steps_are_pefts_and_torchs(tiny):
    session = make_session(DORA, LORA, World(), 0, tiny)
    start = {name: parameter.detach().clone() for name, parameter in session.model.named_parameters()}
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
    lora = PeftLoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    model = get_peft_model(model, lora).train()
    for name, parameter in trainable(model):
        if "magnitude" in name:  # peft's own first values
            torch.testing.assert_close(parameter.detach(), start[name], rtol=1e-5, atol=1e-6)
    model.load_state_dict(start, strict=False)
    assert [name for name, _ in trainable(model)] == [name for name, _ in session.trained]
    optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=OPTIMIZER.lr, weight_decay=0.0)
    data = rows(40)
    for step in range(5):
        picked = [data[3 * step + i] for i in range(3)]
        count = sum(map(trained_tokens, picked))
        ours = session.backward(session.split(picked), count).item()
        session.optimizer.clip(OPTIMIZER.max_grad_norm)
        session.optimizer.step(OPTIMIZER.lr)
        theirs = gradients_one_by_one(model, picked, count)
        torch.nn.utils.clip_grad_norm_([p for _, p in trainable(model)], OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert ours == pytest.approx(theirs, abs=1e-5), step
    moved = {name: (parameter.detach() - start[name]).norm() for name, parameter in session.trained}
    assert min(norm for name, norm in moved.items() if "magnitude" in name) > 1e-3


@pytest.mark.parametrize(
    ("shape", "checkpointing"),
    [
        pytest.param(QWEN, "selective", marks=pytest.mark.slow),
        pytest.param(QWEN, "full", marks=pytest.mark.slow),
        pytest.param(SHAPE, "selective", marks=pytest.mark.slow),
    ],
)
def test_compiled_and_checkpointed_gradients_are_pefts(shape, checkpointing, monkeypatch):
    monkeypatch.setattr(recompute, "WIDE", 64)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    model = make_trainable(random_model(shape, torch.float32, "cpu"), "lora", DORA.lora).train()
    plain = random_model(shape, torch.float32, "cpu")
    lora = PeftLoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    plain = get_peft_model(plain, lora, autocast_adapter_dtype=False).train()
    shaken(trainable(model))
    plain.load_state_dict(model.state_dict())
    checkpoint_activations(model, checkpointing)
    compile_layers(model)
    (found, recompiled), (expected, _) = steps(model), steps(plain)
    assert recompiled == 0
    for (loss, gradients), (other, others) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        for gradient, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=5e-5)


def test_dropout_is_on_the_adapters_input_and_the_base_runs_once():
    model = make_trainable(random_model(QWEN, torch.float32, "cpu"), "lora", LoraConfig(rank=4, dora=True, dropout=0.5))
    layer = causal_lm(model.train()).get_decoder().layers[0].self_attn.q_proj
    shaken(layer.named_parameters())
    weight, bias = layer.get_base_layer().weight, layer.get_base_layer().bias
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    scale = layer.lora_magnitude_vector["default"].weight / (weight + scaling * b @ a).norm(dim=1)
    x = torch.randn(1, 7, weight.shape[1])
    for mode in (True, False):
        torch.manual_seed(5)
        found = layer.train(mode)(x)
        torch.manual_seed(5)
        dropped = torch.nn.functional.dropout(x, 0.5, training=mode)
        expected = (x @ weight.T + scaling * dropped @ a.T @ b.T) * scale + bias
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_pefts_and_what_is_merged_is_the_live_model(tiny, tmp_path, dtype):
    model = make_trainable(load_base(tiny, dtype, "cpu"), "lora", DORA.lora)
    magnitudes = [p for name, p in trainable(model) if "magnitude" in name]
    assert {p.dtype for p in magnitudes} == {torch.float32} and len(magnitudes) == 14
    with torch.no_grad():
        before = trained_logits(model.eval(), batch(1))[0]
        base = trained_logits(load_base(tiny, dtype, "cpu"), batch(1))[0]
        assert (before - base).abs().max() <= 0.02 * base.abs().max()
        shaken(trainable(model), 0.05)
        live = trained_logits(model, batch(1))[0]
        assert (live - base).abs().max() > 0.2 * base.abs().max()
        with without_adapter(model):
            assert torch.equal(trained_logits(model, batch(1))[0], base)
    adapter, target = tmp_path / "adapter", tmp_path / "merged"
    write_trained(model, adapter, make_session(DORA, LORA, World(), 0, tiny).strategy.placed, World())
    assert lora_rows(adapter) == []
    target.mkdir()
    report = merge(tiny, target, read_adapter(adapter), dtype, round_trip(None, dtype))
    write_config(tiny, target, report.tied_embeddings)
    trained = load_trained(tiny, adapter, dtype, "cpu")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        assert torch.equal(trained_logits(trained, batch(1))[0], live)
        merged = trained_logits(load_base(target, dtype, "cpu"), batch(1))[0]
        assert (merged - live).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * live.abs().max()
        if dtype == torch.float32:
            ids = batch(1).input_ids
            again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
            torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    found = merged_weights(trained, [target], tiny)
    assert found[str(target)] == []
    for name in ("plain", "other magnitudes"):  # without the magnitudes, and with those of rows one off
        wrong = read_adapter(adapter)
        real = type(wrong).delta

        def delta(self, key, real=real, name=name):
            made = real(self, key)
            return dataclasses.replace(made, magnitudes=None if name == "plain" else made.magnitudes.roll(1))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(wrong), "delta", delta)
            (tmp_path / name).mkdir()
            merge(tiny, tmp_path / name, wrong, torch.bfloat16, round_trip(None, dtype))
        assert merged_weights(trained, [tmp_path / name], tiny)[str(tmp_path / name)] != []


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_bit_for_bit(tiny, tmp_path):
    def run(folder):
        return train(
            DORA, LORA, SimpleNamespace(train=rows(40), validation=None), load_tokenizer(tiny), tiny, folder,
            "hash", lambda *_: None, StopSignal(), Display(Console(quiet=True)),
        )[0]

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-4", tmp_path / "joined" / "checkpoints" / "step-4")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "joined")
    joined = run(tmp_path / "joined")
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "joined")]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    for (name, one), (_, other) in zip(whole.trained, joined.trained, strict=True):
        assert torch.equal(one, other), name


def test_a_base_held_in_few_bits_is_refused():
    model = random_model(SHAPE, torch.float32, "cpu", "nf4")
    with pytest.raises(ConfigError, match=r"lora\.dora"):
        make_trainable(model, "qlora", DORA.lora)
    assert token_losses(model, batch(1))[1] > 0


def test_a_row_of_zeros_stays_one(tiny, tmp_path):
    """A dead or padded channel has no direction to give a magnitude to."""
    base = load_base(tiny, torch.float32, "cpu")
    with torch.no_grad():
        base.model.layers[0].mlp.gate_proj.weight[5:8] = 0
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(tiny).save_pretrained(tmp_path / "base")
    model = make_trainable(load_base(tmp_path / "base", torch.float32, "cpu"), "lora", DORA.lora)
    with torch.no_grad():
        shaken([(n, p) for n, p in trainable(model) if "lora_B" in n])
        model.base_model.model.model.layers[0].mlp.gate_proj.lora_B["default"].weight[5:8] = 0
        live = trained_logits(model.eval(), batch(1))[0]
    adapter, target = tmp_path / "adapter", tmp_path / "merged"
    write_trained(model, adapter, make_session(DORA, LORA, World(), 0, tiny).strategy.placed, World())
    target.mkdir()
    report = merge(tmp_path / "base", target, read_adapter(adapter), torch.float32)
    write_config(tmp_path / "base", target, report.tied_embeddings)
    merged = load_base(target, torch.float32, "cpu")
    assert not merged.model.layers[0].mlp.gate_proj.weight[5:8].any()
    with torch.no_grad():
        torch.testing.assert_close(trained_logits(merged, batch(1))[0], live, rtol=1e-4, atol=1e-4)
    trained = load_trained(tmp_path / "base", adapter, torch.float32, "cpu")
    assert merged_weights(trained, [target], tmp_path / "base")[str(target)] == []


def test_an_expression_that_matches_the_embedding_is_refused(tiny):
    lora = dataclasses.replace(DORA.lora, targets=".*(embed_tokens|q_proj)")
    with pytest.raises(ConfigError, match=r"matches model\.embed_tokens, where no adapter"):
        make_trainable(load_base(tiny, torch.float32, "cpu"), "lora", lora)
