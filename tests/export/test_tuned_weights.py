"""A fine-tune too weak to be seen in predictions behind quantization is seen in the weights of every format."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter, save_tiny_llama

from loadmaster.data.render import stop_token_ids
from loadmaster.export import candidates, live_checks, thresholds, verify
from loadmaster.export.adapter import Adapter, read_adapter
from loadmaster.export.dequantize import ExportedTensors
from loadmaster.export.fp8 import Fp8
from loadmaster.export.gguf import export_gguf
from loadmaster.export.int4 import Int4
from loadmaster.export.linear import linear_weights, quantization_config
from loadmaster.export.loading import load_export
from loadmaster.export.merge import merge, round_trip
from loadmaster.export.quantize import calibrate
from loadmaster.export.servers import NEWEST
from loadmaster.export.sidecars import write_config, write_generation_config, write_tokenizer
from loadmaster.export.tuned_weights import Carried, Share, pooled, share_of, tuned_weights
from loadmaster.export.verify import Candidate, Verification
from loadmaster.export.weights import HEAD
from loadmaster.files import write_json
from loadmaster.models.load import load_trained

UP = "model.layers.1.mlp.up_proj.weight"
MADE_BY = {
    "fp8": "fp8", "fp8_block": "fp8_block", "int4": "int4-rtn", "int4_gptq": "int4-gptq", "nvfp4": "nvfp4",
    "gguf": "gguf",
}
"""Format -> the candidate that is looked at."""
LIMITS = replace(thresholds.DEFAULTS["int4"], min_top1_agreement=0.2)
"""A random model has near ties everywhere, the more so one whose predictions a fine-tune hardly changes."""


def write_all(base: Path, merged_from: Path, root: Path, tokenizer) -> dict[str, Path]:
    """Every quantized format of the adapter's merge -> its folder, each made as the export stage makes it."""
    folders = {name: root / made for name, made in MADE_BY.items()}
    for folder in (*folders.values(), root / "bf16"):
        folder.mkdir(parents=True)
    streamed = candidates.streamed(MADE_BY.values(), linear_weights(base))
    outputs = {root / name: change for name, change in streamed.items()}
    merge(base, root / "bf16", read_adapter(merged_from), torch.bfloat16, None, outputs)
    for name in ("bf16", *streamed):
        config = quantization_config(streamed[name].quantizer) if name in streamed else None
        write_config(base, root / name, True, NEWEST, config)
        write_tokenizer(tokenizer, root / name, NEWEST)
    torch.manual_seed(0)
    rows = torch.randint(3, 40_000, (8, 50)).tolist()
    for name in ("int4-gptq", "nvfp4"):
        calibrate(root / "bf16", name, root / name, rows)
    export_gguf(root / "bf16", root / "gguf", "tiny", "q8_0", stop_token_ids(tokenizer), str(root / "gguf-read"))
    folders["gguf"] = root / "gguf-read"
    for folder in folders.values():
        write_tokenizer(tokenizer, folder, NEWEST)
        write_generation_config(base, folder, tokenizer, stop_token_ids(tokenizer))
    return folders


def with_matrix_of(folder: Path, other: Path, target: Path) -> Path:
    """A copy of an export whose UP is another's, scales and all."""
    shutil.copytree(folder, target)
    module = UP.removesuffix("weight")
    theirs = {name: each for name, each in load_file(other / "model.safetensors").items() if name.startswith(module)}
    own = load_file(folder / "model.safetensors")
    assert theirs.keys() <= own.keys()
    save_file({**own, **theirs}, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def weak(tmp_path_factory, tokenizer):
    """(variant, format) -> figures of the export of a weak fine-tune: applied, left out, left out of one matrix."""
    root = tmp_path_factory.mktemp("weak")
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64, "num_key_value_heads": 2}
    base = save_tiny_llama(root / "base", tokenizer, initializer_range=0.06, **sizes)
    adapter = save_adapter(base, root / "adapter", std=0.005)
    run = Run(root, base, adapter, tokenizer)
    real = Adapter.delta
    folders = {"applied": write_all(base, adapter, root / "applied", tokenizer)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapter, "delta", lambda self, name: replace(real(self, name), scale=0.0))
        folders["left out"] = write_all(base, adapter, root / "left out", tokenizer)
    folders["left out of one matrix"] = {
        name: with_matrix_of(folders["applied"][name], folders["left out"][name], root / "one" / name)
        for name in MADE_BY
    }
    told = verify.spec(
        base=base, trained=adapter, precision="fp32", frozen=None, device="cpu",
        rows=verify.held_out_rows(run.prepared.validation, 4, 49152), conversations=[], evaluation=run.job.evaluation,
        formats={},
    )
    every = {name: [Candidate(variant, str(folders[variant][name])) for variant in folders] for name in MADE_BY}
    verification = Verification(told, every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "recorded_answers", lambda *_: [])
        return {(one.name, name): verification.of(name, [one]) for name, found in every.items() for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_BY)
def test_a_weak_fine_tune_that_was_applied_passes(weak, name):
    figures = weak["applied", name]
    assert 0 < figures["fine_tune"] < 0.05 and figures["tuned_share"] is None
    assert thresholds.failures(figures, LIMITS) == []
    found = figures["tuned_weights"]
    assert found["matrices"] == found["told_alone"] == 14
    assert abs(found["share"] - 1) < 0.1 and 0 < found["standard_error"] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_BY)
def test_one_that_was_left_out_is_caught_by_name_and_by_nothing_else(weak, name):
    figures = weak["left out", name]
    found = thresholds.failures(figures, LIMITS)
    assert len(found) == 2 and all(each.startswith("tuned_weights: ") for each in found), found
    assert "and 11 more hold" in found[0] and "(14 of 14 that can be told)" in found[0]
    assert abs(figures["tuned_weights"]["share"]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_BY)
def test_one_that_was_left_out_of_one_matrix_is_caught_by_its_name(weak, name):
    found = thresholds.failures(weak["left out of one matrix", name], LIMITS)
    assert found and all(each.startswith("tuned_weights: ") for each in found), found
    assert found[0].startswith(f"tuned_weights: {UP} holds ") and "(1 of 14 that can be told)" in found[0]
    assert weak["left out of one matrix", name]["tuned_weights"]["least"]["name"] == UP


# ----------------------------------------------------------- the share and its standard error


@pytest.mark.parametrize("relative", [0.02, 0.001], ids=["an update of 2%", "of 0.1%"])
@pytest.mark.parametrize("applied", [1.0, 0.0], ids=["applied", "left out"])
@pytest.mark.parametrize("quantizer", [Fp8(), Int4(64)], ids=["fp8", "int4"])
def test_the_share_is_unbiased_and_its_standard_error_right(quantizer, applied, relative, tmp_path):
    generator = torch.Generator().manual_seed(0)
    off = []
    for trial in range(60):
        base = torch.randn(192, 256, generator=generator).bfloat16()
        update = torch.randn(192, 8, generator=generator) @ torch.randn(8, 256, generator=generator) / math.sqrt(8)
        trained = base.float() + relative * update
        folder = tmp_path / str(trial)
        folder.mkdir()
        made = quantizer.quantize((base.float() + applied * relative * update).bfloat16())
        save_file({f"w.{name}": each for name, each in made.items()}, folder / "model.safetensors")
        write_json(folder / "config.json", {"quantization_config": quantization_config(quantizer)})
        found = share_of("w.weight", ExportedTensors(folder).read("w.weight"), base.float(), trained)
        off.append((found.share - applied) / found.error)
    spread = torch.tensor(off)
    assert abs(float(spread.mean())) < 0.5  # 4 standard errors of a mean of 60
    assert 0.75 < float(spread.square().mean().sqrt()) < 1.3


@pytest.mark.parametrize("quantizer", [Fp8(), Int4(128)], ids=["fp8", "int4"])
def test_weight_decay_which_quantization_looks_like_is_not_taken_for_the_fine_tune(quantizer, tmp_path):
    """An honest export was refused with 110% (fp8) and 115% (int4) of the fine-tune."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(1024, 1024, generator=generator)).bfloat16().float()
    trained = 0.995 * base + 0.005 * 0.02 * torch.randn(1024, 1024, generator=generator)
    made = quantizer.quantize(trained.bfloat16())
    save_file({f"w.{name}": each for name, each in made.items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"quantization_config": quantization_config(quantizer)})
    found = share_of("w.weight", ExportedTensors(tmp_path).read("w.weight"), base, trained)
    assert abs(found.share - 1) < 4 * found.error < 0.1


def test_a_norm_is_asked_too():
    base, trained = torch.ones(64), torch.linspace(0.9, 1.1, 64)
    assert share_of("norm", trained.bfloat16().float(), base, trained).share == pytest.approx(1)
    assert share_of("norm", base, base, trained).share == pytest.approx(0)


def test_a_matrix_of_which_few_weights_changed_is_not_told():
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    trained = base.clone()
    trained[3, 5] += 0.02
    noise = 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert not share_of("w", trained + noise, base, trained).is_told
    assert share_of("w", trained, base, base) is None


def test_matrices_too_small_to_be_told_are_judged_with_their_layer_and_the_model():
    def model(share: float) -> Carried:
        return Carried([Share(f"m.layers.{i}.{j}", share if i else 1.0, 0.2) for i in range(2) for j in range(6)], [])

    assert model(1.0).problems("int4") == []
    [layer] = model(0.2).problems("int4")[:1]
    assert layer.startswith("m.layers.1 (6 matrices) holds 20% of the fine-tune (1 of 2 that can be told)")
    assert Carried([Share("a", 0.3, 0.5)], []).problems("int4") == []  # nothing can be told
    assert Carried([Share("a", math.nan, 0.0)], []).problems("fp8")[0].startswith("a holds nan%")
    [missing] = Carried([], ["a"]).problems("fp8")
    assert missing == "a is not in it to be compared (1 of 1 tensors that training changed)"
    assert pooled("both", [Share("a", 1.0, 0.1), Share("b", 0.0, 0.2)]).share == pytest.approx(0.8)


def fp8_of(base: Path, folder: Path, adapter: Adapter | None, seen_as=None) -> Path:
    """An FP8 export of the merge, its weights and config."""
    folder.mkdir()
    [change] = candidates.streamed(["fp8"], linear_weights(base)).values()
    merge(base, None, adapter, torch.bfloat16, seen_as, {folder: change})
    write_config(base, folder, True, NEWEST, quantization_config(change.quantizer))
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_both_merges_of_an_adapter_trained_over_few_bits_carry_it(tiny, tmp_path, form, targets):
    adapter = save_adapter(tiny, tmp_path / "adapter", target_modules=targets)
    read, seen_as = read_adapter(adapter), round_trip(form, torch.bfloat16)
    louder = replace(read, updates={name: replace(u, alpha=2 * u.alpha) for name, u in read.updates.items()})
    made = {
        "as trained": (read, seen_as), "stored base": (read, None), "no adapter": (None, seen_as),
        "base": (None, None), "twice": (louder, seen_as),
    }
    folders = {name: fp8_of(tiny, tmp_path / name, *how) for name, how in made.items()}
    trained = load_trained(tiny, adapter, torch.bfloat16, "cpu", frozen=form)
    found = tuned_weights(trained, list(folders.values()), tiny)
    share = {name: found[str(folder)].figures()["share"] for name, folder in folders.items()}
    expected = {"as trained": 1, "stored base": 1, "no adapter": 0, "base": 0, "twice": 2}
    assert share == pytest.approx(expected, abs=0.03)
    assert {name for name, folder in folders.items() if found[str(folder)].problems("fp8") == []} == {
        "as trained", "stored base"
    }
    sketches = live_checks.sketches(trained)
    assert len(sketches) == 16  # embedding and head among them
    exported = load_export(folders["as trained"], "cpu")
    assert live_checks.quantized_weights(exported, sketches, live_checks.MAX_WEIGHT_ERROR["fp8"]) == []


def test_a_full_fine_tune_is_held_to_the_stored_base(tiny, tmp_path):
    trained, base = tmp_path / "trained", tmp_path / "base"
    shutil.copytree(tiny, trained)
    shutil.copytree(tiny, base)
    tensors, generator = load_file(tiny / "model.safetensors"), torch.Generator().manual_seed(0)
    # A tied base may carry a copy of the head that is never read, and that no export has.
    copied = {**tensors, HEAD: tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, base / "model.safetensors", metadata={"format": "pt"})
    moved = {
        name: (each + 0.01 * each.std() * torch.randn(each.shape, generator=generator)).bfloat16()
        for name, each in tensors.items() if each.dim() == 2
    }
    save_file({**tensors, **moved}, trained / "model.safetensors", metadata={"format": "pt"})
    folders = [fp8_of(trained, tmp_path / "good", None), fp8_of(base, tmp_path / "of the base", None)]
    good, bad = tuned_weights(load_trained(base, trained, torch.float32, "cpu"), folders, base).values()
    assert good.problems("fp8") == [] and len(good.shares) == 15  # the embedding was trained too, and is not quantized
    assert good.figures()["share"] == pytest.approx(1, abs=0.05)
    assert "model.embed_tokens.weight" in bad.problems("fp8")[0]
    assert bad.figures()["share"] == pytest.approx(0, abs=0.05)
