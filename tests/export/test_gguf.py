from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_llama

from loadmaster.errors import ExportRejected
from loadmaster.export.gguf import export_gguf, llama3_divisors
from loadmaster.export.gguf_tokenizer import PATTERNS, pre_tokenizer
from loadmaster.files import read_json, write_json

SMALL = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 408, "max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def save(family: str, folder, tokenizer, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **options)).to(torch.bfloat16)
    for parameter in model.parameters():  # norms of one and biases of zero would look right in any order
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_tokens(tokenizer, tmp_path_factory):
    """The real tokenizer with its first 400 tokens: GGUF readers take a while for each token."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("few_tokens")
    tokenizer.save_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {token: index for token, index in backend["model"]["vocab"].items() if index < 400}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in backend["model"]["merges"]]
    kept = [merge for merge in merges if {*merge, "".join(merge)} <= vocabulary.keys()]
    assert kept
    backend["model"] |= {"vocab": vocabulary, "merges": kept}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    return AutoTokenizer.from_pretrained(folder)


def fields(file) -> dict:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(str(file)).fields.items()}


@pytest.mark.parametrize(
    ("family", "options", "architecture"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}, "llama"),
        ("mistral", {"sliding_window": 512, "head_dim": 32}, "llama"),
        ("qwen2", {}, "qwen2"),
        ("qwen3", {"head_dim": 32}, "qwen3"),
    ],
)
def test_transformers_reads_every_tensor_back_to_the_bit(
    family, options, architecture, few_tokens, tmp_path, monkeypatch
):
    base = save(family, tmp_path / "base", few_tokens, **options)
    target, read = tmp_path / "gguf", tmp_path / "read"
    target.mkdir()
    monkeypatch.chdir(tmp_path)  # a file of that name in the working directory is not the one that is read
    (tmp_path / "tickets-bf16.gguf").write_bytes(b"another model")
    facts = export_gguf(base, target, "tickets", "bf16", [2], str(read))
    assert (facts["file"], facts["architecture"]) == ("tickets-bf16.gguf", architecture)
    written, found = load_file(base / "model.safetensors"), load_file(read / "model.safetensors")
    assert written.keys() == found.keys()
    assert all(torch.equal(written[name], found[name]) for name in written)
    held = fields(target / "tickets-bf16.gguf")
    assert held[f"{architecture}.context_length"] == (512 if family == "mistral" else 2048)
    assert held[f"{architecture}.attention.key_length"] == options.get("head_dim", 16)


def test_tokens_template_and_ends_of_turns_are_in_the_file(few_tokens, tmp_path):
    tokenizer = few_tokens
    base = save("qwen2", tmp_path / "base", tokenizer)
    target = tmp_path / "gguf"
    target.mkdir()
    export_gguf(base, target, "team/tickets", "q8_0", [2, 0], str(tmp_path / "read"))
    held = fields(target / "team-tickets-q8_0.gguf")
    assert held["general.name"] == "team/tickets"
    tokens = held["tokenizer.ggml.tokens"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]" and len(tokens) == SMALL["vocab_size"]
    assert held["tokenizer.ggml.pre"] == "smollm"
    assert held["tokenizer.chat_template"] == tokenizer.chat_template
    assert (held["tokenizer.ggml.eos_token_id"], held["tokenizer.ggml.eot_token_id"]) == (2, 0)
    assert held["tokenizer.ggml.add_bos_token"] is False
    modelfile = (target / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in modelfile and "FROM ./team-tickets-q8_0.gguf" in modelfile
    exact, rounded = load_file(base / "model.safetensors"), load_file(tmp_path / "read" / "model.safetensors")
    errors = [((exact[n] - rounded[n]).abs().max() / exact[n].abs().max()).item() for n in exact if exact[n].dim() == 2]
    assert 0 < max(errors) < 1 / 100  # 8 bits


def test_a_template_for_tools_is_in_the_file_beside_the_default_one(few_tokens, tmp_path):
    tokenizer = copy.deepcopy(few_tokens)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "Tools! " + tokenizer.chat_template}
    (tmp_path / "gguf").mkdir()
    base = save("llama", tmp_path / "base", tokenizer)
    export_gguf(base, tmp_path / "gguf", "tickets", "q8_0", [2], str(tmp_path / "read"))
    held = fields(tmp_path / "gguf" / "tickets-q8_0.gguf")
    assert held["tokenizer.chat_template"] == tokenizer.get_chat_template()
    assert held["tokenizer.chat_template.tool_use"] == tokenizer.chat_template["tool_use"]


def test_llama_3_frequencies_are_those_of_transformers(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_parameters=LLAMA3, max_position_embeddings=131072
    )
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / llama3_divisors(LLAMA3, 500000.0, 128), stretched.numpy(), rtol=1e-5)


@pytest.mark.parametrize(("pattern", "name"), PATTERNS.items())
def test_a_tokenizer_is_named_by_how_it_cuts_text(pattern, name):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
    backend = {"model": {"type": "BPE"}, "pre_tokenizer": steps}
    assert pre_tokenizer(backend) == name
    split["pattern"]["Regex"] += "|x"
    with pytest.raises(ExportRejected, match=r"Split, ByteLevel\) is not known"):
        pre_tokenizer(backend)


def test_what_cannot_be_written_rightly_is_refused_by_name(few_tokens, tmp_path):
    base = save_tiny_llama(tmp_path / "base", few_tokens)
    config = read_json(base / "config.json")
    refused = {
        "not for gemma2.*convert_hf_to_gguf.py": {"model_type": "gemma2"},
        r"rotation \(yarn\)": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    }
    for named, change in refused.items():
        write_json(base / "config.json", {**config, **change})
        with pytest.raises(ExportRejected, match=named):
            export_gguf(base, tmp_path, "x", "bf16", [2], str(tmp_path / "read"))
    write_json(base / "config.json", config)
    backend = json.loads((base / "tokenizer.json").read_text())
    shutil.copyfile(base / "tokenizer.json", tmp_path / "tokenizer.json")
    write_json(base / "tokenizer.json", {**backend, "pre_tokenizer": {"type": "Metaspace"}})
    with pytest.raises(ExportRejected, match="SentencePiece"):
        export_gguf(base, tmp_path, "x", "bf16", [2], str(tmp_path / "read"))
