"""The tokenizer of a GGUF file: tokens, merges, and the name under which llama.cpp knows how text is cut.

llama.cpp has no general pre-tokenizer; it has some by name, and a file that names another one gives other tokens
without a word. So the name is found from what the tokenizer does (its regular expression), and one that is not known
is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadmaster.errors import ExportRejected

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""Regular expression of a Split before byte-level BPE -> llama.cpp's name (Llama 3, Qwen 2 and 3, Mistral's Tekken)."""


def pre_tokenizer(backend: dict[str, Any]) -> str:
    """llama.cpp's name of what tokenizer.json does before merging. Raises ExportRejected where it has none."""
    if backend["model"].get("type", "BPE") != "BPE" or "ByteLevel" not in json.dumps(backend.get("pre_tokenizer")):
        raise ExportRejected(
            "gguf is written for byte-level BPE tokenizers (Llama 3, Qwen, SmolLM, Mistral's Tekken); this one is of "
            "SentencePiece's kind, whose scores are not in tokenizer.json. Leave gguf out of export.formats, and "
            "convert the bf16 export with llama.cpp's convert_hf_to_gguf.py."
        )
    step = backend.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    kinds = [each.get("type") for each in steps]
    if kinds == ["Split", "ByteLevel"] and (found := PATTERNS.get(steps[0]["pattern"].get("Regex", ""))):
        return found
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    raise ExportRejected(
        f"llama.cpp's name for the way this tokenizer cuts text ({', '.join(map(str, kinds)) or 'none'}) is not known "
        "here, and a wrong one gives other tokens. Leave gguf out of export.formats, and convert the bf16 export with "
        "llama.cpp's convert_hf_to_gguf.py."
    )


def add_tokenizer(writer: Any, source: Path, vocabulary_size: int, stop_token_ids: list[int]) -> None:
    """Tokens, types, merges, special tokens and the chat template of the tokenizer in `source`."""
    from gguf import TokenType

    from loadmaster.models.tokenizer import load_tokenizer

    backend = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    pre = pre_tokenizer(backend)
    tokenizer = load_tokenizer(source)
    tokens = {index: token for token, index in backend["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in backend["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    listed = [tokens.get(index, f"[PAD{index}]") for index in range(vocabulary_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(listed)
    writer.add_token_types([types.get(index, TokenType.UNUSED) for index in range(vocabulary_size)])
    writer.add_token_merges(merges)
    _add_special(writer, tokenizer, stop_token_ids)
    if template := tokenizer.chat_template:
        named = isinstance(template, dict)  # default, tool_use
        each = [{"name": name, "template": text} for name, text in template.items()] if named else template
        writer.add_chat_template(each)


def _add_special(writer: Any, tokenizer: Any, stop_token_ids: list[int]) -> None:
    """BOS, EOS, padding and unknown; the first other token that ends a turn is llama.cpp's end of turn."""
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id), ("unk_token_id", writer.add_unk_token_id),
    ):
        if (value := getattr(tokenizer, name)) is not None:
            add(value)
    others = [token for token in stop_token_ids if token != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)
