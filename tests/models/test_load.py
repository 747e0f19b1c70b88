"""A folder that holds no whole model of a kind that is known: a sentence, and no library's traceback."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from loadmaster.errors import LoadmasterError
from loadmaster.export.loading import load_export
from loadmaster.models.attention import PACKED
from loadmaster.models.load import load_base
from loadmaster.models.shards import empty_model
from loadmaster.models.tokenizer import load_tokenizer


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_weights_of_another_size_than_the_configuration_are_named(folder: Path):
    edit(folder, hidden_size=128)
    said = r"fill the model \(mismatched keys: model.embed_tokens.weight is \[49152, 64\] and not \[49152, 128\]"
    with pytest.raises(LoadmasterError, match=said):
        load_base(folder, torch.float32, "cpu")


def test_layers_that_the_checkpoint_has_not_are_named(folder: Path):
    edit(folder, num_hidden_layers=3)
    with pytest.raises(LoadmasterError, match=r"missing keys: model.layers.2.input_layernorm.weight"):
        load_base(folder, torch.float32, "cpu")


@pytest.mark.parametrize("load", [partial(load_base, device="cpu"), empty_model])
def test_a_model_type_that_is_not_known_is_named(load, folder: Path):
    edit(folder, model_type="lama")
    with pytest.raises(LoadmasterError, match=r"transformers 5.* cannot load .*model type `lama`"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize("load", [partial(load_base, device="cpu"), empty_model])
def test_a_model_that_continues_no_text_is_named(load, folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3"}))
    said = r"has no causal language model of type 'mistral3'.*\n    fix: a text-only"
    with pytest.raises(LoadmasterError, match=said):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize("load", [partial(load_base, device="cpu"), empty_model])
def test_a_family_whose_code_takes_no_other_attention_than_its_own_is_refused(load, folder: Path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 49152}
    (folder / "config.json").write_text(json.dumps({"model_type": "falcon", **sizes}))
    with pytest.raises(LoadmasterError, match=r"cannot be trained here: its family's code .*\n    fix: a model of"):
        load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("named_in", "kind", "load"),
    [
        ("tokenizer_config.json", "AutoTokenizer", load_tokenizer),
        ("config.json", "AutoConfig", partial(load_base, dtype=torch.float32, device="cpu")),
        ("config.json", "AutoConfig", partial(empty_model, dtype=torch.float32)),
        ("config.json", "AutoConfig", partial(load_export, device="cpu")),
    ],
)
def test_code_beside_a_model_is_not_run_whatever_is_answered(named_in, kind, load, folder: Path, monkeypatch):
    """Without trust_remote_code=False transformers asks on standard input, and takes what comes there for a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = folder / "ran"
    (folder / "other.py").write_text(f"open({str(ran)!r}, 'w')\nclass Other: pass\n")
    settings = json.loads((folder / named_in).read_text())
    named = {"tokenizer_class": "Other", "auto_map": {kind: ["other.Other"] * 2}}
    if kind == "AutoConfig":
        named = {"model_type": "other", "auto_map": {kind: "other.Other"}}
    (folder / named_in).write_text(json.dumps(settings | named))
    with pytest.raises(LoadmasterError, match="custom code"):
        load(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "load", [partial(load_base, dtype=torch.float32, device="cpu"), partial(load_export, device="cpu")]
)
def test_attention_is_the_one_that_is_asked_for_whatever_the_folder_names(load, folder: Path):
    edit(folder, _attn_implementation="somebody/kernel", attn_implementation="sdpa")
    assert load(folder).config._attn_implementation == PACKED


@pytest.mark.parametrize("broken", ["gone", "cut"])
def test_a_folder_without_a_tokenizer_is_named(broken: str, folder: Path):
    if broken == "gone":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text('{"version": "1.0"')
    said = rf"no tokenizer can be loaded from {folder}: .*\n    fix: put tokenizer.json"
    with pytest.raises(LoadmasterError, match=said):
        load_tokenizer(folder)


@pytest.mark.parametrize(("named", "model_type"), [("LlamaTokenizerFast", "llama"), ("LlamaTokenizerFast", "qwen3")])
def test_text_is_split_by_the_rules_of_the_folder_whatever_class_it_names(named: str, model_type: str, folder: Path):
    edit(folder, model_type=model_type)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": named}))
    assert type(AutoTokenizer.from_pretrained(str(folder))).__name__ == "LlamaTokenizer"
    tokenizer, text = load_tokenizer(folder), "We had 2,048 of them:\n\n  two  spaces"
    assert tokenizer.encode(text) == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == settings["eos_token"] and tokenizer.chat_template
