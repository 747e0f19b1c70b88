"""Exports broken on purpose: each way of not being what was trained is caught, by the name of its check."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_llama

from loadmaster.config.schema import ThresholdsConfig
from loadmaster.export import checks, live_checks, thresholds, verify
from loadmaster.export.thresholds import failures
from loadmaster.export.tuned_weights import tuned_weights
from loadmaster.export.verify import Candidate, Verification
from loadmaster.files import read_json, write_json
from loadmaster.models import spread
from loadmaster.models.load import load_trained
from loadmaster.preflight.placement import Placement, Room

UP = "model.layers.1.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.1.mlp.up_proj"
FP8_CONFIG = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
    }},
    "ignore": ["lm_head"],
}


# A random model has near ties everywhere, and loses more to fp8 than a trained one: of fp8 the checks are looked at.
NEAR_TIES = {"min_top1_agreement": 0.8, "max_flipped_answers": 1, "min_task_retention": 0}
LIMITS = {
    "bf16": replace(thresholds.DEFAULTS["bf16"], **NEAR_TIES),
    "adapter": replace(thresholds.DEFAULTS["bf16"], **NEAR_TIES),
    "fp8": ThresholdsConfig(),
}


class Proof:
    """A run, its good exports, and the verification of any folder against what was trained."""

    def __init__(self, run: Run):
        self.run, self.exports = run, run.folder / "export"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thresholds, "DEFAULTS", {"bf16": LIMITS["bf16"]})
            run.export("bf16", "adapter")
        write_fp8(self.exports / "bf16", self.exports / "fp8")
        adapter = run.folder / "adapter"
        told = verify.spec(
            base=run.base, trained=adapter, precision="fp32", frozen=None, device="cpu",
            rows=verify.held_out_rows(run.prepared.validation, 4, 49152),
            conversations=list(run.prepared.validation_conversations), evaluation=run.job.evaluation, formats={},
        )
        self.verification = Verification(told, {})
        self.told = told
        self.trained = load_trained(run.base, adapter, torch.float32, "cpu")

    def failures(self, folder: Path, name: str) -> list[str]:
        if live_checks.keeps_plain(name) and not verify._is_torn(folder):
            self.verification.merged_weights = live_checks.merged_weights(self.trained, [folder], self.run.base)
        if live_checks.keeps_matrices(name):
            self.verification.tuned_weights = tuned_weights(self.trained, [folder], self.run.base)
        figures = self.verification.of(name, [Candidate(name, str(folder), name == "adapter")])
        return failures(figures, LIMITS[name])


def write_fp8(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() == 2 and "embed" not in name:
            scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
            tensors[name] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale")] = scale
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    change_json(target / "config.json", quantization_config=FP8_CONFIG)


@pytest.fixture(scope="module")
def proof(tmp_path_factory, tiny, tiny_adapter, tokenizer) -> Iterator[Proof]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "recorded_answers", lambda *_: [])  # these are for an endpoint, and take a while
        yield Proof(Run(tmp_path_factory.mktemp("proof"), tiny, tiny_adapter, tokenizer))


@pytest.fixture(scope="module")
def spread_proof(proof, tmp_path_factory) -> Iterator[Proof]:
    """The same, of models whose second layer, which is what is broken below, stays on disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "recorded_answers", lambda *_: [])
        patch.setattr(spread, "place", lambda layers, rest, room: Placement((1,), 0, 1))
        parts = copy.copy(proof)
        told = {**proof.told, "scratch": str(tmp_path_factory.mktemp("scratch"))}
        parts.verification = Verification(told, {})
        on_disk = spread.Spread(Room((0.0,)), "cpu", tmp_path_factory.mktemp("trained"))
        parts.trained = load_trained(proof.run.base, proof.run.folder / "adapter", torch.float32, on_disk)
        yield parts


# ----------------------------------------------------------- ways of breaking


def change_json(path: Path, **changes) -> None:
    """Set keys; a value of None takes the key away."""
    value = {**read_json(path), **changes}
    write_json(path, {key: each for key, each in value.items() if each is not None})


def tensors(change, file="model.safetensors"):
    def break_(folder: Path, proof: Proof) -> None:
        path = folder / file
        found = load_file(path)
        change(found, proof)
        save_file(found, path, metadata={"format": "pt"})

    return break_


def adapter_tensors(change):
    return tensors(change, "adapter_model.safetensors")


def config(file: str, **changes):
    return lambda folder, proof: change_json(folder / file, **changes)


def text(file: str, old: str, new: str):
    def break_(folder: Path, proof: Proof) -> None:
        path = folder / file
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1))

    return break_


def base_weights(found, proof: Proof) -> None:
    found.update(load_file(proof.run.base / "model.safetensors"))


def layer_left_out(found, proof: Proof) -> None:
    found[UP] = load_file(proof.run.base / "model.safetensors")[UP]


def scaled(factor: float):
    def change(found, proof: Proof) -> None:
        base = load_file(proof.run.base / "model.safetensors")
        for name, weight in found.items():
            found[name] = (base[name].float() + factor * (weight.float() - base[name].float())).to(weight.dtype)

    return change


def onto_another_base(found, proof: Proof) -> None:
    own, other = load_file(proof.run.base / "model.safetensors"), load_file(proof.other_base / "model.safetensors")
    for name, weight in found.items():
        found[name] = (other[name].float() + weight.float() - own[name].float()).to(weight.dtype)


def untied_head(folder: Path, proof: Proof) -> None:
    def add_head(found, proof: Proof) -> None:
        found["lm_head.weight"] = found["model.embed_tokens.weight"].flip(0)

    tensors(add_head)(folder, proof)
    change_json(folder / "config.json", tie_word_embeddings=False)


def cut(folder: Path, proof: Proof) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000)


def plain_weights(folder: Path, proof: Proof) -> None:
    shutil.copyfile(proof.exports / "bf16" / "model.safetensors", folder / "model.safetensors")


def fp8_weights(folder: Path, proof: Proof) -> None:
    shutil.copyfile(proof.exports / "fp8" / "model.safetensors", folder / "model.safetensors")


def doubled_scale(found, proof: Proof) -> None:
    found[f"{UP}_scale"] = 2 * found[f"{UP}_scale"]


def poke(name: str, value: float, row: int | slice | tuple = 0):
    def change(found, proof: Proof) -> None:
        found[name] = found[name].clone()
        found[name][row] = value

    return change


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BROKEN = {
    "tensor missing": (
        "bf16", tensors(lambda found, _: found.pop(UP)), [rf"strict_load: .*missing keys \({UP}"],
    ),
    "tensor unexpected": (
        "bf16", tensors(lambda found, _: found.update(stray=torch.zeros(2))),
        [r"strict_load: .*unexpected keys \(stray"],
    ),
    "tensor renamed, so the model's own is re-initialised": (
        "bf16", tensors(lambda found, _: found.update({"model.layers.1.mlp.up.weight": found.pop(UP)})),
        [r"strict_load: .*missing keys .*unexpected keys"],
    ),
    "tensor of another shape": (
        "bf16", tensors(lambda found, _: found.update({"model.norm.weight": torch.zeros(7)})),
        [r"strict_load: .*mismatched keys"],
    ),
    "weights cut off": ("bf16", cut, [r"strict_load: model\.safetensors is torn"]),
    "adapter not applied": (
        "bf16", tensors(base_weights), [r"merged_weights: .*\(14 of 20 tensors\)", r"tuned_share is .*at least"],
    ),
    "adapter left out of one layer": ("bf16", tensors(layer_left_out), [rf"merged_weights: {UP} is not"]),
    "merged at twice the scale": (
        "bf16", tensors(scaled(2)), [r"merged_weights: ", r"tuned_share is 1\.\d+, must be at most"],
    ),
    "merged at half the scale": (
        "bf16", tensors(scaled(0.5)), [r"merged_weights: ", r"tuned_share is 0\.\d+, must be at least"],
    ),
    "merged into another base": (
        "bf16", tensors(onto_another_base), [r"merged_weights: model\.embed_tokens\.weight, .*of 20 tensors\)"],
    ),
    "tied head broken": ("bf16", untied_head, [r"merged_weights: lm_head\.weight is not the weight that was trained"]),
    "NaN in the weights": ("bf16", tensors(poke(UP, float("nan"))), [rf"finite: {UP}: NaN", r"mean_kl is nan"]),
    "quantization_config of training left behind": (
        "bf16", config("config.json", quantization_config=BNB),
        [r"storage: config\.json has a quantization_config \(bitsandbytes\) over weights that are not quantized"],
    ),
    "fp8 weights without a word in config.json": (
        "bf16", fp8_weights, [r"storage: .*quantized weights in a bf16 export"],
    ),
    "quantization skipped": (
        "fp8", plain_weights,
        [r"storage: only 0% of the weights are stored as float8_e4m3fn .*quantization was skipped"],
    ),
    "quantized, and config.json does not say so": (
        "fp8", config("config.json", quantization_config=None), [r"storage: config\.json has no quantization_config"],
    ),
    "another quantization than the format's": (
        "fp8", config("config.json", quantization_config={**FP8_CONFIG, "format": "pack-quantized"}),
        [r"storage: config\.json says 'pack-quantized', fp8 is 'float-quantized'"],
    ),
    "fp8 of the base, adapter not applied": (
        "fp8", lambda folder, proof: (shutil.rmtree(folder), write_fp8(proof.run.base, folder)),
        [r"tuned_weights: .* and 11 more hold -?0% .*\(14 of 14 that can be told\)",
         r"tuned_weights: all matrices together"],
    ),
    "embeddings that no held-out token reads lost beside fp8 weights": (
        "fp8", tensors(poke("model.embed_tokens.weight", 0.0, 40000)),
        [r"merged_weights: model\.embed_tokens\.weight is not .*\(1 of 6 tensors\)"],
    ),
    "norm changed beside fp8 weights": (
        "fp8", tensors(poke("model.layers.1.input_layernorm.weight", 1.05)),
        [r"merged_weights: model\.layers\.1\.input_layernorm\.weight is not the weight that was trained"],
    ),
    "scale of one layer at twice its value": (
        "fp8", tensors(doubled_scale),
        [r"quantized_weights: 1 matrices are further than 20% .*up_proj\.weight by \d+%"],
    ),
    "template changed by one byte": (
        "bf16", lambda folder, _: (folder / "chat_template.jinja").open("a").write(" "),
        [r"template: the chat template is not, byte for byte", r"template: rendered otherwise .*single turn, several"],
    ),
    "template that drops the system message": (
        "bf16", text("chat_template.jinja", "{% for message in messages %}",
                     "{% for message in messages if message['role'] != 'system' %}"),
        [r"template: the chat template", r"template: rendered otherwise than in training: .*system message"],
    ),
    "tokenizer that gives other tokens": (
        "bf16", text("tokenizer.json", '"use_regex": true', '"use_regex": false'), [r"template: "],
    ),
    "tokenizer cut short": (
        "bf16", lambda folder, _: os.truncate(folder / "tokenizer.json", 99),
        [r"strict_load: no tokenizer can be loaded from "],
    ),
    "end-of-turn token missing from generation_config": (
        "bf16", config("generation_config.json", eos_token_id=[0]),
        [r"stop_tokens: generation_config\.json does not list 2, .*it has \[0\]", r"stops: generation does not end at"],
    ),
    "stop token that does not stop": (
        "bf16", config("generation_config.json", min_new_tokens=9), [r"stops: generation does not end at token 2"],
    ),
    "adapter whose B is zero": (
        "adapter", adapter_tensors(poke(f"{LORA}.lora_B.weight", 0.0, slice(None))),
        [rf"lora_rows: {LORA}\.lora_B\.weight: all zero, as at initialisation"],
    ),
    "adapter with some rows of B zero": (
        "adapter", adapter_tensors(poke(f"{LORA}.lora_B.weight", 0.0, slice(0, 9))),
        [rf"lora_rows: {LORA}\.lora_B\.weight \(9 rows\): rows of zeros"],
    ),
    "adapter with a rank as at initialisation": (
        "adapter", adapter_tensors(poke(f"{LORA}.lora_B.weight", 0.0, (slice(None), 2))),
        [rf"lora_rows: {LORA}\.lora_B\.weight \(1 of 4\): ranks unchanged from initialisation"],
    ),
    "adapter with NaN": (
        "adapter", adapter_tensors(poke(f"{LORA}.lora_A.weight", float("nan"))),
        [rf"lora_rows: {LORA}\.lora_A\.weight: NaN or infinite"],
    ),
    "adapter with infinity": (
        "adapter", adapter_tensors(poke(f"{LORA}.lora_A.weight", float("inf"))),
        [rf"lora_rows: {LORA}\.lora_A\.weight: NaN or infinite"],
    ),
    "adapter of another alpha": (
        "adapter", config("adapter_config.json", lora_alpha=12),
        [r"tuned_share is 1\.\d+, must be at most", r"as_trained: adapter_config\.json has another lora_alpha"],
    ),
    "adapter of another alpha, by a hair and in one layer": (
        "adapter", config("adapter_config.json", alpha_pattern={"model.layers.1.mlp.up_proj": 7.0}),
        [r"as_trained: adapter_config\.json has another alpha_pattern than in training"],
    ),
    "adapter with another row of B": (
        "adapter", adapter_tensors(poke(f"{LORA}.lora_B.weight", 0.1, 5)),
        [rf"as_trained: {LORA}\.lora_B\.weight: not what was trained"],
    ),
    "adapter with a tensor missing": (
        "adapter", adapter_tensors(lambda found, _: found.pop(f"{LORA}.lora_A.weight")),
        [r"strict_load: .*missing keys"],
    ),
}


@pytest.mark.parametrize("name", ["bf16", "adapter", "fp8"])
def test_the_export_as_it_is_made_has_no_failed_check(proof, name):
    assert proof.failures(proof.exports / name, name) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_export_is_caught_by_name(proof, case, tmp_path, tokenizer):
    name, break_, expected = BROKEN[case]
    if case == "merged into another base":
        proof.other_base = save_tiny_llama(tmp_path / "other", tokenizer, seed=7)
    folder = tmp_path / name
    shutil.copytree(proof.exports / name, folder)
    (folder / "manifest.json").unlink()
    break_(folder, proof)
    found = proof.failures(folder, name)
    for pattern in expected:
        assert any(re.search(pattern, failure) for failure in found), (pattern, found)


ON_DISK = {
    "tensor missing": (),
    "tensor renamed, so the model's own is re-initialised": (),
    "adapter left out of one layer": (),
    "merged into another base": (),
    "NaN in the weights": (),
    "embeddings that no held-out token reads lost beside fp8 weights": (),
    "norm changed beside fp8 weights": (),
    "scale of one layer at twice its value": (),
    "adapter of another alpha": (),
    "adapter with a tensor missing": (),
    "another shape": (
        "bf16", tensors(lambda found, _: found.update({UP: found[UP].T.contiguous()})),
        [rf"strict_load: .*mismatched keys \({UP} \[64, 192\] instead of \[192, 64\]"],
    ),
}
"""Those of BROKEN that are in a layer's weights, by name, and what only reading from disk has to look for."""


@pytest.mark.parametrize("name", ["bf16", "adapter", "fp8"])
def test_layers_on_disk_have_no_failed_check(spread_proof, name):
    assert spread_proof.failures(spread_proof.exports / name, name) == []
    assert spread_proof.verification.spread.placement.disk == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_DISK)
def test_a_broken_export_is_caught_in_layers_on_disk(spread_proof, case, tmp_path, tokenizer):
    name, break_, expected = ON_DISK[case] or BROKEN[case]
    if case == "merged into another base":
        spread_proof.other_base = save_tiny_llama(tmp_path / "other", tokenizer, seed=7)
    folder = tmp_path / name
    shutil.copytree(spread_proof.exports / name, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    break_(folder, spread_proof)
    found = spread_proof.failures(folder, name)
    for pattern in expected:
        assert any(re.search(pattern, failure) for failure in found), (pattern, found)


TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ message['tool_calls'] | tojson if message['tool_calls'] else '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("old", "new", "cases"),
    [
        ("{% if tools %}", "{% if false %}", "tools, tool call and answer"),
        ("{{ message['tool_calls'] | tojson if message['tool_calls'] else '' }}", "", "tool call and answer"),
        ("{% for message in messages %}", "{% for message in messages[-1:] %}", "several turns, system message"),
    ],
    ids=["tools", "tool calls", "all but the last turn"],
)
def test_a_template_that_drops_something_is_caught_by_what_it_drops(tokenizer, old, new, cases):
    trained, exported = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    trained.chat_template, exported.chat_template = TOOLS_TEMPLATE, TOOLS_TEMPLATE.replace(old, new)
    assert checks.template(trained, trained) == []
    different = checks.template(exported, trained)[1]
    assert cases in different
