"""Verification of a model that no device holds: layers are read from disk as they are used, and nothing else changes.

On a CPU "the first GPU" is host memory. What brings a layer from host memory to a GPU is here the same machinery with
both ends in host memory; no test here has a GPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter

from loadmaster.data import PackedRow
from loadmaster.export import live_checks, room, verify
from loadmaster.export.figures import log_probabilities
from loadmaster.export.loading import load_export
from loadmaster.export.verify import Candidate, Verification
from loadmaster.models import spread
from loadmaster.models.load import load_base, load_trained
from loadmaster.models.shards import empty_model
from loadmaster.models.spread import NoRoom, Spread, device_map, is_spread, sizes, where_they_lie
from loadmaster.preflight.placement import Placement, Room, place

GIB = 2**30
IDS = np.arange(300, 340)
ROW = PackedRow(IDS, np.where(IDS < 310, -100, IDS), np.concatenate([np.arange(25), np.arange(15)]), [])


def one_layer_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny model's two layers the second, whatever there is room for."""
    monkeypatch.setattr(spread, "place", lambda layers, rest, room: Placement((len(layers) - 1,), 0, 1))


def told(run: Run, scratch: Path | None, **changes) -> dict:
    return verify.spec(
        **{
            "base": run.base, "trained": run.folder / "adapter", "precision": "fp32", "frozen": None, "device": "cpu",
            "rows": verify.held_out_rows(run.prepared.validation, 4, 49152),
            "conversations": list(run.prepared.validation_conversations), "evaluation": run.job.evaluation,
            "formats": {}, "scratch": scratch, **changes,
        }
    )


@pytest.fixture
def exported(run: Run, monkeypatch) -> Run:
    from loadmaster.export import thresholds

    limits = {name: thresholds.ThresholdsConfig() for name in ("bf16", "fp8")}
    monkeypatch.setattr(thresholds, "DEFAULTS", {**thresholds.DEFAULTS, **limits})
    run.export("bf16", "adapter", "fp8")
    return run


@pytest.mark.slow
def test_every_figure_and_check_is_that_of_a_model_on_one_device(exported, tmp_path, monkeypatch):
    folders = {name: exported.folder / "export" / name for name in ("bf16", "adapter", "fp8")}
    formats = {name: [Candidate(name, str(folder), name == "adapter")] for name, folder in folders.items()}

    def results(scratch: Path | None) -> dict:
        verification = Verification(told(exported, scratch), formats)
        return {name: verification.of(name, found) for name, found in formats.items()}

    whole = results(None)
    said = []
    monkeypatch.setattr(verify, "progress", said.append)
    one_layer_on_disk(monkeypatch)
    parts = results(tmp_path)
    assert said.count("1 of 2 layers in host memory, 1 on disk") == 4  # the trained model and each export
    for name in formats:
        del whole[name]["seconds"], parts[name]["seconds"]
        assert parts[name] == whole[name] and "error" not in whole[name]
        assert whole[name]["tokens"] > 0 and not any(whole[name]["checks"].values())


@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_a_frozen_base_whose_layers_are_brought_from_host_memory_computes_the_same(tiny, tmp_path, form):
    """As a GPU would get them: each module's tensors are what compressed-tensors' cache in host memory hands out."""
    adapter = save_adapter(tiny, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])  # none on other layers
    whole = load_trained(tiny, adapter, torch.bfloat16, "cpu", form)

    def brought(model):
        from compressed_tensors.offload import dispatch_with_map

        cpu = torch.device("cpu")
        dispatch_with_map(model, {name: (cpu, cpu) for name, _ in model.named_modules()}, show_progress=False)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadmaster.models.load.settled", brought)
        parts = load_trained(tiny, adapter, torch.bfloat16, "cpu", form)
    assert is_spread(parts) and not is_spread(whole)
    assert torch.equal(log_probabilities(parts, ROW, 0)[0], log_probabilities(whole, ROW, 0)[0])
    ours, theirs = live_checks.sketches(parts), live_checks.sketches(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert live_checks.merged_weights(parts, [tiny], tiny) == live_checks.merged_weights(whole, [tiny], tiny)


def test_what_is_read_of_a_layer_on_disk_has_numbers_and_what_has_none_is_an_error(tiny, tmp_path, monkeypatch):
    one_layer_on_disk(monkeypatch)
    model = load_export(tiny, Spread(Room((0.0,)), "cpu", tmp_path / "offload"))
    up = model.model.layers[1].mlp.up_proj
    assert torch.equal(up.weight, load_export(tiny, "cpu").model.layers[1].mlp.up_proj.weight)
    with where_they_lie(model):
        assert up.weight.is_meta and not model.model.layers[0].mlp.up_proj.weight.is_meta
        with pytest.raises(RuntimeError, match="no numbers in its weight"):
            list(live_checks.live_weights(model))
    assert len(list(live_checks.live_weights(model))) == 21  # 20 tensors, and the tied head by its own name


def test_layers_stay_where_one_device_holds_them(tiny, tmp_path):
    enough = Spread(Room((1e9,)), "cpu", tmp_path / "offload")
    assert not is_spread(load_export(tiny, enough)) and enough.placement.is_whole
    assert not (tmp_path / "offload").exists()


def test_what_fits_nowhere_is_refused_before_a_weight_is_read(tiny, tmp_path):
    with pytest.raises(NoRoom, match=r"needs 0\.0 GiB for embeddings, head .*larger or more GPUs"):
        load_export(tiny, Spread(Room((1e6,)), "cpu", tmp_path))
    layers, rest = sizes(empty_model(tiny, torch.bfloat16, "nf4"))
    less = Spread(Room((rest + 1.5 * max(layers),)), "cpu", tmp_path)
    with pytest.raises(NoRoom, match="weights held as nf4 do not go to disk"):
        load_base(tiny, torch.bfloat16, less, "nf4")


def test_several_gpus_get_layers_and_the_first_all_that_is_outside_them(tiny):
    model = empty_model(tiny, torch.bfloat16)
    found = device_map(model, Placement((0, 1), 1), "cuda")
    assert found == {
        "model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0,
        "model.layers.0": 1, "model.layers.1": "cpu",
    }
    layers, rest = sizes(model)
    width = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 192 + 2 * 64
    assert layers == [2.0 * width] * 2 and rest == 2 * (49152 * 64 + 64) + 4 * 32  # rotary frequencies, twice


def test_a_model_without_a_list_of_layers_goes_to_one_device_or_nowhere():
    model = torch.nn.Linear(4, 4)
    model.get_decoder = lambda: model
    assert sizes(model) == ([], 80.0)
    assert place([], 80.0, Room((80.0,))) == Placement((0,)) and place([], 80.0, Room((79.0,), None)) is None


def test_every_visible_gpu_is_asked_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((10 + gpu) * GIB, 80 * GIB))
    monkeypatch.setattr(room, "free_host_bytes", lambda: 100.0 * GIB)
    settled = []
    monkeypatch.setattr(room.allocator, "settle", settled.append)
    found = room.spread_over("cuda", None, 3.0, 2.0, GIB).room
    assert found.gpus == pytest.approx([0.98 * (10 + gpu) * GIB for gpu in range(3)])
    assert found == Room(found.gpus, 99 * GIB, False, 3.0, 2.0)
    assert settled == [torch.device("cuda")]
    on_a_cpu = room.spread_over("cpu", Path("x"), 3.0, 2.0, GIB).room
    assert on_a_cpu == Room((99 * GIB,), 0.0, True, 3.0, 2.0)


MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
import torch
from loadmaster.export import live_checks, room
from loadmaster.export.figures import log_probabilities
from loadmaster.export.loading import load_export
from test_spread import ROW

def resident() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def measured(scratch: Path, free: float) -> dict:
    room.free_bytes = lambda device: ((), free)
    spread = room.spread_over("cpu", scratch, 0.0, 0.0, 0.0)
    gc.collect()
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    model = load_export(folder, spread)
    scores = log_probabilities(model, ROW, 0)[0]
    done.set()
    sketches = live_checks.sketches(model)
    wrong = live_checks.merged_weights(model, [folder], folder)
    torch.save({"scores": scores, "sketches": sketches}, scratch / "scores.pt")
    return {"peak": peak[0] - before, "words": spread.placement.words(False), "wrong": wrong}

folder = Path(sys.argv[1])
import compressed_tensors.offload, transformers.models.llama.modeling_llama
print(json.dumps(measured(Path(sys.argv[2]), float(sys.argv[3]))))
"""


@pytest.mark.slow
def test_a_real_model_on_disk_scores_to_the_bit_in_a_fraction_of_its_memory(smollm2, tmp_path):
    """SmolLM2-135M: 257 MiB in bf16, 54 of them embeddings; each copy of 29 positions' logits in fp32 is 5 MiB.

    It lies on disk in fp32, so that what a CPU holds of it are copies: how much of a mapped file counts as resident is
    the kernel's choice (up to 2 MiB around a byte that was read). Each is in a process of its own: what one lets go
    and its process keeps would not be counted for the other.
    """
    folder = shutil.copytree(smollm2, tmp_path / "fp32")
    weights = load_file(folder / "model.safetensors")
    save_file({n: w.float() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    layers, rest = sizes(empty_model(smollm2, torch.bfloat16))
    found = {}
    for name, kept in (("parts", 2.5), ("whole", 100)):
        scratch = tmp_path / name
        scratch.mkdir()
        command = [sys.executable, "-c", MEASURE, str(folder), str(scratch), str(rest + kept * layers[0])]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300)
        assert ran.returncode == 0, ran.stderr[-2000:]
        found[name] = json.loads(ran.stdout.splitlines()[-1]) | torch.load(scratch / "scores.pt")
    whole, parts = found["whole"], found["parts"]
    assert whole["words"] == "30 of 30 layers in host memory" and parts["words"].startswith("1 of 30 layers in host")
    assert torch.equal(whole["scores"], parts["scores"])
    assert all(torch.equal(whole["sketches"][name], parts["sketches"][name]) for name in whole["sketches"])
    assert whole["wrong"] == parts["wrong"] == {str(folder): []}
    model = sum(layers) + rest
    assert parts["peak"] < 0.5 * model < model < whole["peak"]


def test_pinned_memory_of_training_goes_back_to_the_host_as_well(monkeypatch):
    """PyTorch keeps it for itself, whatever empty_cache gives back: tens of GiB that a verification could not have."""
    given = []
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: given.append("host"), raising=False)
    spread.free_device_memory()
    assert not given, "a process that never used a GPU has none"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    spread.free_device_memory()
    assert given == ["host"]
