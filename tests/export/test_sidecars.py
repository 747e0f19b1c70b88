from __future__ import annotations

import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from loadmaster.data import Conversation, stop_token_ids
from loadmaster.export.sidecars import token_ids, write_config, write_generation_config, write_tokenizer
from loadmaster.files import read_json, write_json
from loadmaster.models.tokenizer import load_tokenizer

CHAT = Conversation(
    messages=[{"role": "user", "content": "Où est l'été ? 42"}, {"role": "assistant", "content": "ici"}],
    tools=None, text=None, origin="a:1", row_id="1",
)


def test_the_tokenizer_class_is_one_that_older_servers_know_and_loads_to_the_same_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "as_saved")
    write_tokenizer(tokenizer, tmp_path / "exported")
    assert read_json(tmp_path / "as_saved" / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    assert read_json(tmp_path / "exported" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    both = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("as_saved", "exported")]
    assert token_ids(both[0], CHAT) == token_ids(both[1], CHAT) == token_ids(tokenizer, CHAT)
    assert both[1].chat_template == tokenizer.chat_template
    assert (both[1].eos_token, both[1].pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


@pytest.mark.parametrize(
    ("own", "configured", "expected"),
    [(2, 9, [2]), ([0, 7], None, [0, 2, 7]), (None, None, [2]), (None, [2, 9], [2, 9])],
)
def test_generation_config_lists_every_id_that_ends_a_turn(tokenizer, tmp_path, own, configured, expected):
    write_json(tmp_path / "generation_config.json", {"eos_token_id": own, "max_new_tokens": 5, "temperature": 0.6})
    write_json(tmp_path / "config.json", {"eos_token_id": configured})
    target = tmp_path / "out"
    target.mkdir()
    assert stop_token_ids(tokenizer) == [2]
    assert write_generation_config(tmp_path, target, tokenizer, stop_token_ids(tokenizer)) == expected
    config = GenerationConfig.from_pretrained(target)
    assert config.eos_token_id == expected
    assert config.temperature == 0.6
    assert config.max_new_tokens is None  # vLLM would cap every request at it


def test_nothing_of_the_training_quantization_stays_in_the_config(tmp_path):
    write_json(
        tmp_path / "config.json",
        {
            "model_type": "llama",
            "quantization_config": {"load_in_4bit": True},
            "_name_or_path": "x",
            "dtype": "float32",
        },
    )
    (tmp_path / "out").mkdir()
    write_config(tmp_path, tmp_path / "out", tied_embeddings=True)
    assert read_json(tmp_path / "out" / "config.json") == {"model_type": "llama", "dtype": "bfloat16"}


def test_an_export_of_a_base_with_code_beside_it_asks_for_none(tiny, tokenizer, tmp_path):
    """Servers that trust remote code, as Phi's model card has it, look for the files that the config names."""
    base, export = shutil.copytree(tiny, tmp_path / "base"), tmp_path / "export"
    export.mkdir()
    codes = {"config.json": {"AutoConfig": "own.C"}, "tokenizer_config.json": {"AutoTokenizer": ["own.T", None]}}
    for name, code in codes.items():
        write_json(base / name, {**read_json(base / name), "auto_map": code})
    write_config(base, export, tied_embeddings=True)
    write_tokenizer(load_tokenizer(base), export)
    assert AutoConfig.from_pretrained(export, trust_remote_code=True).model_type == "llama"
    assert len(AutoTokenizer.from_pretrained(export, trust_remote_code=True)) == len(tokenizer)
