from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter, save_tiny_llama

from loadmaster.data import PackedRow
from loadmaster.errors import ExportRejected
from loadmaster.export.adapter import read_adapter, refusals
from loadmaster.export.merge import merge, round_trip
from loadmaster.export.sidecars import write_config
from loadmaster.export.weights import shards, tensor_files
from loadmaster.files import read_json, write_json
from loadmaster.models.shards import Checkpoint

IDS = torch.arange(500, 564).reshape(2, 32)
SOME = ["q_proj", "v_proj"]
"""Targets that leave layers of a frozen base without an adapter."""


def merged_logits(base, adapter, target, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    target.mkdir()
    report = merge(base, target, read_adapter(adapter), dtype)
    write_config(base, target, report.tied_embeddings)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
        return model(input_ids=IDS).logits.float(), report


def live_logits(base, adapter, dtype=torch.float32):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter).eval()
        live = model(input_ids=IDS).logits.float()
        with model.disable_adapter():
            return live, model(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def tiny32(tmp_path_factory, tokenizer):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny32"), tokenizer, dtype=torch.float32)


def test_merged_logits_of_the_real_model_equal_the_live_adapters_in_float32_and_bf16(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    adapter = save_adapter(smollm2, tmp_path / "adapter", std=0.01, r=8, lora_alpha=16)
    live, base = live_logits(smollm2, adapter)
    assert (live - base).abs().max() > 1.0
    exact, _ = merged_logits(smollm2, adapter, tmp_path / "merged", torch.float32)
    assert (exact - live).abs().max() <= 2e-4  # of logits up to 22: sums of fp32, in the order of the processor's
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
        rounded = model(input_ids=IDS).logits.float()
    log_p, log_q = live.log_softmax(-1), rounded.log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 5e-3


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["o_proj", "embed_tokens"]},
        {"use_dora": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["rslora", "patterns", "tied head", "tied embedding", "dora", "modules_to_save", "whole embedding, tied"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_kind_of_adapter_merges_to_the_live_logits(tiny32, tmp_path, options):
    adapter = save_adapter(tiny32, tmp_path / "adapter", **options)
    live, base = live_logits(tiny32, adapter)
    assert (live - base).abs().max() > 0.05
    merged, report = merged_logits(tiny32, adapter, tmp_path / "merged")
    assert (merged - live).abs().max() <= 1e-4
    unties = {"lm_head", "embed_tokens"} & set(options.get("target_modules", ()))
    assert report.tied_embeddings == (not unties)
    assert ("lm_head.weight" in tensor_files(tmp_path / "merged")) == bool(unties)


def test_a_qlora_adapter_is_merged_into_the_weights_it_was_trained_over(tiny, tiny_adapter, tmp_path):
    from loadmaster.export.figures import Reference, compare, log_probabilities
    from loadmaster.export.loading import load_export
    from loadmaster.models.load import load_trained

    row = PackedRow(IDS[0].numpy(), IDS[0].numpy(), torch.arange(32).numpy(), [])
    trained = load_trained(tiny, tiny_adapter, torch.float32, "cpu", frozen="nf4")
    reference = Reference(row, *log_probabilities(trained, row, 0))
    divergence = {}
    for name, seen_as in (("as trained", round_trip("nf4", torch.float32)), ("16-bit base", None)):
        target = tmp_path / name
        target.mkdir()
        merge(tiny, target, read_adapter(tiny_adapter), torch.bfloat16, seen_as)
        write_config(tiny, target, tied_embeddings=True)
        divergence[name] = compare(load_export(target, "cpu"), [reference], 0)["mean_kl"]
    assert divergence["as trained"] < 0.05 * divergence["16-bit base"]


@pytest.mark.parametrize(
    ("form", "targets", "stored"),
    [
        ("nf4", "all-linear", "bfloat16"), ("fp8", "all-linear", "bfloat16"), (None, "all-linear", "float32"),
        (None, "all-linear", "float16"), ("nf4", SOME, "bfloat16"), ("fp8", SOME, "bfloat16"),
    ],
)
def test_a_merge_of_an_adapter_trained_in_bf16_holds_what_was_trained(tokenizer, tmp_path, form, targets, stored):
    """On GPUs adapters are trained in bf16, where the base is rounded to bf16 before it is multiplied with."""
    tiny = save_tiny_llama(tmp_path / "base", tokenizer, dtype=getattr(torch, stored))
    from loadmaster.export.live_checks import merged_weights
    from loadmaster.models.load import load_trained

    folder = save_adapter(tiny, tmp_path / "adapter", std=0.02, target_modules=targets)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    adapter, seen_as = read_adapter(folder), round_trip(form, torch.bfloat16)
    louder = replace(adapter, updates={name: replace(u, alpha=1.1 * u.alpha) for name, u in adapter.updates.items()})
    merges = {
        "as trained": (adapter, seen_as), "stored base": (adapter, None), "no adapter": (None, seen_as),
        "scale 10% off": (louder, seen_as),
    }
    for name, (update, base) in merges.items():
        (tmp_path / name).mkdir()
        merge(tiny, tmp_path / name, update, torch.bfloat16, base)
    trained = load_trained(tiny, folder, torch.bfloat16, "cpu", frozen=form)

    def is_as_trained() -> dict[str, bool]:
        found = merged_weights(trained, [tmp_path / name for name in merges], tiny)
        return {name: found[str(tmp_path / name)] == [] for name in merges}

    right = {"as trained": True, "stored base": form is not None, "no adapter": False, "scale 10% off": False}
    assert is_as_trained() == right
    # A GPU adds up magnitudes in another order than the CPU that merges.
    for module in trained.modules():
        if hasattr(module, "absmax_offset"):
            module.absmax_offset.mul_(1 + 2**-19)
    assert is_as_trained() == right


def test_an_expert_of_a_mixture_that_is_not_the_bases_is_named(tmp_path):
    """transformers fuses experts as it loads them, so the live model has none under the name that is in the files."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from loadmaster.export.live_checks import merged_weights
    from loadmaster.models.load import load_trained

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )
    base, target = tmp_path / "base", tmp_path / "merged"
    Qwen3MoeForCausalLM(config).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    target.mkdir()
    merge(base, target, read_adapter(adapter), torch.bfloat16)
    trained = load_trained(base, adapter, torch.float32, "cpu")
    assert merged_weights(trained, [target], base) == {str(target): []}
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[name] = 1.02 * tensors[name]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert merged_weights(trained, [target], base)[str(target)][0].startswith(f"{name} is not the weight")


def test_an_adapter_over_an_fp8_base_is_merged_into_the_fp8_values(tiny32, tmp_path):
    adapter = read_adapter(save_adapter(tiny32, tmp_path / "adapter"))
    target = tmp_path / "merged"
    target.mkdir()
    report = merge(tiny32, target, adapter, torch.float32, round_trip("fp8", torch.bfloat16))
    name = "model.layers.1.mlp.up_proj.weight"
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny32, target))
    scale = base[name].bfloat16().abs().amax(dim=1, keepdim=True).float() / 448
    seen = (base[name].bfloat16() / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(merged[name], seen + adapter.delta(name).rows(slice(None)), rtol=0, atol=1e-6)
    error = (base[name] - seen).norm() / adapter.delta(name).rows(slice(None)).norm()
    assert report.relative_error[name] == pytest.approx(error.item(), rel=1e-4)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_merging_many_shards_gives_the_same_bits_as_one(tiny32, tokenizer, tmp_path):
    sharded = save_tiny_llama(tmp_path / "sharded", tokenizer, dtype=torch.float32, max_shard_size="200KB")
    assert len(shards(sharded)) == 3
    adapter = read_adapter(save_adapter(tiny32, tmp_path / "adapter"))
    one, many = tmp_path / "one", tmp_path / "many"
    for source, target in ((tiny32, one), (sharded, many)):
        target.mkdir()
        merge(source, target, adapter, torch.bfloat16)
    whole = load_file(one / "model.safetensors")
    parts = {name: tensor for shard in shards(many) for name, tensor in load_file(shard).items()}
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    index = read_json(many / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in whole.values())
    assert set(index["weight_map"]) == set(whole)


def test_without_an_adapter_the_trained_weights_are_copied_in_the_dtype_asked_for(tiny32, tmp_path):
    merge(tiny32, tmp_path, None, torch.bfloat16)
    before, after = load_file(tiny32 / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(torch.bfloat16), after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_qalora": True}, "QA-LoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_parameters": ["experts.w1"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_adapters_that_are_not_a_sum_are_refused_by_name(change, named):
    reasons = refusals({"peft_type": "LORA", "bias": "none", "init_lora_weights": True, **change})
    assert len(reasons) == 1 and named in reasons[0]
    assert refusals({"peft_type": "LORA", "bias": "none", "init_lora_weights": True}) == []


def test_a_refusal_says_what_would_work(tiny, tiny_adapter, tmp_path):
    import shutil

    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    write_json(tmp_path / "adapter" / "adapter_config.json", {**config, "use_qalora": True})
    with pytest.raises(ExportRejected, match=r"QA-LoRA(.|\n)*export\.formats=\[adapter\]"):
        read_adapter(tmp_path / "adapter")


def test_dora_without_its_magnitudes_is_refused(tiny_adapter, tmp_path):
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "use_dora": True})
    with pytest.raises(ExportRejected, match="has no magnitudes"):
        read_adapter(folder)


def test_an_adapter_of_another_base_is_refused(tiny, tokenizer, tmp_path):
    deeper = save_tiny_llama(tmp_path / "deeper", tokenizer, num_hidden_layers=3)
    wider = save_tiny_llama(tmp_path / "wider", tokenizer, intermediate_size=256)
    with pytest.raises(ExportRejected, match=r"layers\.2"):
        merge(tiny, tmp_path, read_adapter(save_adapter(deeper, tmp_path / "a")), torch.bfloat16)
    with pytest.raises(ExportRejected, match="shape"):
        merge(tiny, tmp_path, read_adapter(save_adapter(wider, tmp_path / "b")), torch.bfloat16)


def test_an_adapter_that_diverged_is_refused(tiny, tiny_adapter, tmp_path):
    import shutil

    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ExportRejected, match="NaN"):
        merge(tiny, tmp_path, read_adapter(tmp_path / "adapter"), torch.bfloat16)


def test_an_incomplete_download_is_named(tiny, tmp_path):
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    with pytest.raises(ExportRejected, match=r"model-1\.safetensors is not there"):
        shards(tmp_path)


def test_an_index_that_names_no_file_is_no_complete_model(tmp_path):
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}})
    with pytest.raises(ExportRejected, match=r"model\.safetensors is not there"):
        shards(tmp_path)


def test_what_is_merged_is_what_transformers_loads_whatever_index_or_shards_were_left_beside(tiny32, tmp_path):
    """It takes model.safetensors first, which others beside it may contradict, older or gone."""
    folder = shutil.copytree(tiny32, tmp_path / "base")
    names = load_file(folder / "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "model-1.safetensors")})
    assert shards(folder) == [folder / "model.safetensors"]
    assert Checkpoint(folder).rows("model.norm.weight").shape == names["model.norm.weight"].shape
    save_file({name: torch.zeros_like(tensor) for name, tensor in names.items()}, folder / "model-1.safetensors")
    assert Checkpoint(folder).rows("model.norm.weight").any()


def test_one_shard_that_an_index_names_is_merged_to_one_that_can_be_loaded(tiny32, tmp_path):
    base, merged = shutil.copytree(tiny32, tmp_path / "base"), tmp_path / "merged"
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    names = load_file(base / "model-00001-of-00001.safetensors")
    where = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    merged.mkdir()
    merge(base, merged, None, torch.float32)
    write_config(base, merged, tied_embeddings=True)
    assert shards(merged) == [merged / "model-00001-of-00001.safetensors"]


def test_an_adapter_whose_config_says_another_rank_than_its_tensors_is_refused(tiny_adapter, tmp_path):
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "r": 8})
    with pytest.raises(ExportRejected, match=r"has rank 4 in adapter_model\.safetensors and 8 in adapter_config"):
        read_adapter(folder)
    write_json(folder / "adapter_config.json", {key: value for key, value in config.items() if key != "r"})
    with pytest.raises(ExportRejected, match=r"and None in adapter_config\.json"):
        read_adapter(folder)


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_that_lacks_one_side_of_a_module_is_refused_by_name(tiny_adapter, tmp_path, side):
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in tensors if f".lora_{side}." in name)
    del tensors[lost]
    save_file(tensors, folder / "adapter_model.safetensors")
    module = lost.removeprefix("base_model.model.").partition(".lora_")[0]
    with pytest.raises(ExportRejected, match=rf"is incomplete: {module} has no lora_{side}\."):
        read_adapter(folder)


def test_a_module_that_was_trained_whole_is_there_in_its_shape_and_finite(tiny, tiny_adapter, tmp_path):
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config | {"modules_to_save": ["norm"]})
    save_file(tensors | {"base_model.model.model.anorm.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ExportRejected, match="it was trained with norm whole"):
        read_adapter(folder)
    for norm, said in ((torch.ones(3), "shape"), (torch.full((64,), torch.nan), "norm.weight holds NaN")):
        save_file(tensors | {"base_model.model.model.norm.weight": norm}, folder / "adapter_model.safetensors")
        with pytest.raises(ExportRejected, match=said):
            merge(tiny, tmp_path, read_adapter(folder), torch.bfloat16)
