"""The files beside the weights: config, tokenizer, chat template, generation config.

Most exports that "do not work" fail here, not in the weights: a tokenizer class that the server does not
know, a quantization_config left over from training, an end-of-turn token that nothing stops at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadmaster.data import Conversation
from loadmaster.data.dialect import in_dialect
from loadmaster.export.servers import NEWEST, Server, model_config, tokenizer_config
from loadmaster.files import read_json, write_json

LEFT_BEHIND = (
    "quantization_config", "_name_or_path", "_model_name_or_path", "torch_dtype", "auto_map", "language_model_of",
)
"""Of the base's config.json: how it was quantized for training, where it lay, the older name of dtype, and code beside
it, which an export does not have: it was trained by transformers' own.
And that it was taken out of a multimodal one."""

SERVER_CAPS = ("max_new_tokens", "max_length")
"""Of generation_config.json: vLLM takes these as a cap for every request."""


def write_config(
    base: Path, target: Path, tied_embeddings: bool, server: Server = NEWEST,
    quantization: dict[str, Any] | None = None,
) -> None:
    """config.json of the export: the base's, without what belongs to its own quantization or its place.

    quantization: the export's own quantization_config.
    """
    config = {key: value for key, value in read_json(base / "config.json").items() if key not in LEFT_BEHIND}
    config["dtype"] = "bfloat16"
    if config.get("tie_word_embeddings", True) != tied_embeddings:
        config["tie_word_embeddings"] = tied_embeddings
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(target / "config.json", model_config(config, server))


def write_tokenizer(tokenizer: Any, target: Path, server: Server = NEWEST) -> None:
    """The tokenizer as used in training, chat template included, in a form that the server reads."""
    tokenizer.save_pretrained(str(target))
    path = target / "tokenizer_config.json"
    config = tokenizer_config(read_json(path), server)
    for key in ("name_or_path", "is_local", "local_files_only", "auto_map"):
        config.pop(key, None)
    write_json(path, config)


def write_generation_config(base: Path, target: Path, tokenizer: Any, stop_token_ids: list[int]) -> list[int]:
    """generation_config.json whose eos_token_id lists every id that ends a turn; returns that list.

    The base's own list is kept (a model may have learnt to stop in more ways than its template shows); where its
    generation_config.json has none, servers go by its config.json.
    """
    source = base / "generation_config.json"
    config = read_json(source) if source.is_file() else {}
    for key in SERVER_CAPS:
        config.pop(key, None)
    own = config.get("eos_token_id")
    own = read_json(base / "config.json").get("eos_token_id") if own is None else own
    own = own if isinstance(own, list) else [own]
    config["eos_token_id"] = sorted({*stop_token_ids, *(token for token in own if token is not None)})
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, key, None)
        if value is not None:
            config[key] = value
    write_json(target / "generation_config.json", config)
    return config["eos_token_id"]


def token_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """The conversation as the model sees it: through the chat template, or as it is where it is plain text."""
    if conversation.text is not None:
        return tokenizer(conversation.text)["input_ids"]
    messages = in_dialect(tokenizer, conversation.messages)
    rendered = tokenizer.apply_chat_template(messages, tools=conversation.tools, tokenize=True, return_dict=True)
    return rendered["input_ids"]
