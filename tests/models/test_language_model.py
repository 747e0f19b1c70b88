"""The language model of a multimodal checkpoint: taken out byte for byte, and its adapter goes onto the whole again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from loadmaster.config.schema import HardwareConfig, Job, LoraConfig, ModelConfig
from loadmaster.errors import LoadmasterError
from loadmaster.export.checks import as_trained
from loadmaster.export.loading import load_adapter
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.language_model import by_names_of, for_whole, language_model_of, multimodal_of, of_whole
from loadmaster.models.load import load_base
from loadmaster.models.resolve import base_revision, resolve_base
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.multimodal import FLAT
from loadmaster.preflight.setup import Setup

TEXT = {
    "hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}
PIXTRAL = {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}, "tie_word_embeddings": False}
SCALED = {"rope_theta": 1e4, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
GRIDS = {"mrope_section": [2, 3, 3]}
PLAIN = {key: value for key, value in TEXT.items() if key != "head_dim"} | {"eos_token_id": 2, "bos_token_id": 1}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
GEMMA_4 = {
    **TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision",
}
KINDS = {
    "gemma4": {
        "model_type": "gemma4",
        "text_config": GEMMA_4,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 14, "position_embedding_size": 64,
        },
    },
    "gemma3": {
        "model_type": "gemma3", "text_config": {**TEXT, "sliding_window": 8}, "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "model_type": "mistral3", "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None}, **PIXTRAL
    },
    "ministral3": {
        "model_type": "mistral3", **PIXTRAL, "text_config": {
            **TEXT, "model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "factor": 16.0, **SCALED},
        },
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl", "text_config": {**PLAIN, "rope_parameters": {"rope_theta": 1e4, **GRIDS}},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl", "text_config": {**PLAIN, "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, **GRIDS,
        }},
        "vision_config": QWEN_VISION,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": {**TEXT, "rope_parameters": {"rope_theta": 1e4, "mrope_interleaved": True, **GRIDS}},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
}
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request, tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**KINDS[request.param])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # stored, and not 1 in a trained model
            buffer.fill_(0.5)
    model.save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.fixture
def own(whole, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    return resolve_base(ModelConfig(path=str(whole)))


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


def test_it_is_the_language_model_to_the_bit_and_nothing_else(whole, own) -> None:
    alone, info = AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(alone), logits(loaded(whole)))
    left = json.loads((own / "MULTIMODAL").read_text())["left_out"]
    assert sum(file.stat().st_size for file in whole.glob("*.safetensors")) > left["bytes"] > 0 < left["tensors"]
    assert not (own / "preprocessor_config.json").exists() and multimodal_of(own) == whole


def test_it_is_made_once_and_again_where_the_files_are_others(whole, own, tmp_path) -> None:
    made = (own / "config.json").stat().st_mtime_ns
    assert language_model_of(whole) == own and (own / "config.json").stat().st_mtime_ns == made
    assert language_model_of(own) == own
    other = shutil.copytree(whole, tmp_path / "models--org--m" / "snapshots" / "0123abc")
    found = language_model_of(other)
    assert found != own and base_revision(ModelConfig(name="org/m"), found) == "0123abc"


@pytest.mark.parametrize("whole", FLAT, indirect=True)
def test_older_and_newer_files_of_qwens_give_the_same_one(whole, own, tmp_path) -> None:
    """A config.json without a text_config, as the Hub's of Qwen 2.5 VL is, and names of both kinds of layers."""
    config = json.loads((whole / "config.json").read_text())
    text, flat = config.pop("text_config"), tmp_path / "org" / "flat"
    rope = text.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    rope |= {"type": "mrope"} if rope.pop("rope_type") == "default" else {"type": "yarn"}
    flat.mkdir(parents=True)
    told = {**text, **config, "rope_theta": theta, "rope_scaling": rope}
    told |= {"tie_word_embeddings": text["tie_word_embeddings"]} if "tie_word_embeddings" in text else {}
    (flat / "config.json").write_text(json.dumps(told))
    tensors = {name: t for file in whole.glob("*.safetensors") for name, t in load_file(file).items()}
    assert any(name.startswith("model.layers.0.") for name in tensors)
    newer = {
        "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model."): t
        for name, t in tensors.items()
    }
    save_file(newer, flat / "model.safetensors", metadata={"format": "pt"})
    again = language_model_of(flat)
    alone = AutoModelForCausalLM.from_pretrained(again, dtype=torch.bfloat16)
    assert torch.equal(logits(alone), logits(loaded(whole))) and torch.equal(logits(alone), logits(loaded(flat)))
    kept = [{**json.loads((folder / "config.json").read_text()), "layer_types": None} for folder in (again, own)]
    for each in kept:
        for key in ("transformers_version", "dtype", "architectures", "sliding_window", "pad_token_id"):
            each.pop(key, None)
    assert kept[0] == kept[1] and "mrope" not in json.dumps(kept[0])


def test_it_is_taken_from_the_files_that_the_whole_is_loaded_from(whole, tmp_path, monkeypatch) -> None:
    """Others beside them may hold older weights by the same names."""
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    beside = shutil.copytree(whole, tmp_path / "beside")
    names = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    old = {name: torch.zeros_like(load_file(whole / file)[name]) for name, file in names.items()}
    save_file(old, beside / "model-00099-of-00099.safetensors", metadata={"format": "pt"})
    own = language_model_of(beside)
    alone = AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16)
    assert torch.equal(logits(alone), logits(loaded(beside)))
    assert not (own / "model-00099-of-00099.safetensors").exists()


def test_files_that_are_not_there_or_torn_are_told_and_no_head_is_made_of_the_embedding(
    whole, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "cache"))
    torn = shutil.copytree(whole, tmp_path / "torn")
    names = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    shard = torn / next(file for name, file in names.items() if name.endswith("norm.weight"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(LoadmasterError, match=rf"no complete model: {shard.name} is torn"):
        language_model_of(torn)
    shard.unlink()
    with pytest.raises(LoadmasterError, match=rf"no complete model: {shard.name} of its index is not there"):
        language_model_of(torn)

    headless, tensors = tmp_path / "headless", {}
    headless.mkdir()
    for file in sorted(set(names.values())):
        tensors |= {name: t for name, t in load_file(whole / file).items() if "lm_head" not in name}
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(LoadmasterError, match="does not fill the model"):
        load_base(language_model_of(headless), torch.bfloat16, "cpu")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_plan_counts_what_is_trained(method, whole, own) -> None:
    shape = find_shape(ModelConfig(name="x", path=str(whole)))
    model = load_base(own, torch.float32, "cpu")
    kind = json.loads((whole / "config.json").read_text())["model_type"]
    assert shape.estimate is None and shape.language_model_of == kind
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    model = make_trainable(model, method, LoraConfig(rank=4))
    setup = Setup(method=method, precision="fp32", optimizer="adamw", master_weights=False, lora_rank=4)
    counted = setup.trainable(shape)
    assert counted == sum(p.numel() for _, p in trainable(model))


def test_its_adapter_goes_onto_the_whole_and_no_further(whole, own, tmp_path) -> None:
    model = make_trainable(load_base(own, torch.bfloat16, "cpu"), "lora", LoraConfig(rank=4, modules_to_save=["norm"]))
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "trained")
    exported, back = tmp_path / "exported", tmp_path / "back"
    for folder, make, source in ((exported, for_whole, tmp_path / "trained"), (back, of_whole, exported)):
        folder.mkdir()
        make(source, folder)
    over = PeftModel.from_pretrained(loaded(whole), str(exported))
    adapted = [name for name, _ in over.named_parameters() if "lora_" in name]
    linears = 2 * 7 - (json.loads((whole / "config.json").read_text())["model_type"] == "gemma4")  # no v_proj in one
    assert len(adapted) == 2 * linears and all(".language_model.layers." in name for name in adapted)
    wanted = logits(PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16), str(tmp_path / "trained")))
    assert torch.equal(logits(over), wanted) and not torch.equal(wanted, logits(loaded(whole)))

    tensors, again = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "trained", back))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)
    load_adapter(own, exported, "cpu")  # strictly
    with by_names_of(own, tmp_path / "trained", for_whole) as trained:
        assert as_trained(exported, trained) == []


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], "q_proj"])
def test_the_towers_of_a_model_that_is_loaded_whole_get_no_adapter(targets, whole) -> None:
    """Vision layers are called q_proj too; no gradient would reach them, and data parallel training fail of that."""
    model = make_trainable(loaded(whole), "lora", LoraConfig(rank=4, targets=targets))
    names = [name for name, _ in trainable(model)]
    assert names and all(".language_model.layers." in name for name in names)


def test_the_towers_of_a_model_that_is_loaded_whole_are_not_trained(whole) -> None:
    names = {name for name, _ in trainable(make_trainable(loaded(whole), "full", LoraConfig()))}
    assert all("language_model" in name or name == "lm_head.weight" for name in names)
    assert any("embed_tokens" in name for name in names) and any("mlp" in name for name in names)


def test_the_plan_says_what_is_trained_and_what_becomes_of_the_rest(whole) -> None:
    job = Job(model=ModelConfig(name="x", path=str(whole)), hardware=HardwareConfig(gpu="cpu"))
    plan = make_plan(job)
    (said,) = (reason for reason in plan.reasons if "multimodal" in reason)
    assert "its language model alone is trained" in said and plan.model.estimate is None
