"""Model families that are modelled exactly: what a config.json may leave out, and what a family's code does anyway.

Defaults are those of transformers' configuration classes (tests/preflight/test_config_json.py holds them equal): files
on the Hub leave out what equals them. A family that is not here is counted like Llama and called an estimate, as long
as nothing in its config.json says that its layers are of another kind; then it is refused, for the count would be a
guess.
"""

from __future__ import annotations

from typing import Any

from loadmaster.errors import ConfigError, Problem
from loadmaster.preflight.multimodal import language_model
from loadmaster.preflight.other_layers import GEMMA_4, OTHER_HEADS, OTHER_LAYERS, OTHER_WORDS, beyond_family

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"biases": True, "whole_heads": True, "windows": False},
    "smollm3": {"biases": True},
    "mistral": {},
    "qwen2": {"query_key_value_bias": True},
    "qwen3": {"biases": True, "query_key_norm": True},
    "qwen3_moe": {"biases": True, "query_key_norm": True, "experts": 128},
    "mixtral": {"experts": 8},
    "gemma2": {"biases": True, "norms": 4, "gemma_norm": True, "scaled_embedding": True, "whole_heads": True},
    "gemma3_text": {
        "biases": True, "norms": 4, "gemma_norm": True, "scaled_embedding": True, "query_key_norm": True,
        "late_norm": True, "whole_heads": True,
    },
    "gemma4_text": {
        "biases": True, "norms": 4, "gemma_norm": True, "scaled_embedding": True, "query_key_norm": True,
        "power_norm": True, "value_norm": True, "layer_scalar": True,
    },
    "phi3": {"fused": True},
    "ministral": {},
    "arcee": {"biases": True, "whole_heads": True, "windows": False, "gated": False},
    "ministral3": {"scaled_query": True},
    "granite": {"biases": True, "scaled_embedding": True, "scaled_residual": True},
    "gemma": {"biases": True, "gemma_norm": True, "scaled_embedding": True},
    "olmo2": {"biases": True, "norms_after": True, "wide": True, "query_key_norm": True, "whole_norm": True},
    "olmo3": {"biases": True, "norms_after": True, "wide": True, "query_key_norm": True, "whole_norm": True},
    "exaone4": {"norms_after": True, "query_key_norm": True, "late_norm": True},
}
"""What the family's code does; `biases`: attention_bias in the config is read; `experts`: how many a layer has where
neither of the names of their number is in the config, and without it there are none; `windows`: whether sliding_window
is read; `whole_heads`: whether transformers insists on a hidden_size that is a multiple of the heads."""

_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_GEMMA = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_7B, "vocab_size": 32000},
    "smollm3": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True, "use_sliding_window": False,
    },
    "mistral": {
        **_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096,
    },
    "qwen2": {
        **_7B, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936, "sliding_window": 4096,
        "use_sliding_window": False, "max_window_layers": 28,
    },
    "qwen3": {
        **_7B, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 151936,
        "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
    },
    "qwen3_moe": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 151936, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "sliding_window": 4096, "use_sliding_window": False,
    },
    "mixtral": {
        **_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000, "num_experts_per_tok": 2,
    },
    "gemma2": {
        **_GEMMA, "vocab_size": 256000, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_GEMMA, "vocab_size": 262208},
    "gemma4_text": GEMMA_4,
    "phi3": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32064,
    },
    "ministral": {
        **_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096,
    },
    "ministral3": {
        **_7B, "intermediate_size": 14336, "num_hidden_layers": 34, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 131072,
    },
    "arcee": {
        **_7B, "hidden_size": 2560, "intermediate_size": 18432, "vocab_size": 32000, "hidden_act": "relu2",
    },
    "granite": {**_7B, "vocab_size": 32000},
    "gemma": {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "olmo2": {**_7B, "vocab_size": 50304},
    "olmo3": {**_7B, "vocab_size": 50304, "sliding_window": 4096},
    "exaone4": {
        **_7B, "intermediate_size": 16384, "num_key_value_heads": 32, "vocab_size": 102400, "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
}
UNGATED = ("apertus", "jais2", "nanochat", "nemotron", "starcoder2")
"""Families that are not modelled exactly, and whose feed-forward layers are known to have two matrices, not three."""

TOWERS_AND_ALL = (
    "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant",
    "got_ocr2", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
)
"""Multimodal configs for which transformers has a model that continues a text; of others it has none, and they are
refused (tests/preflight/test_config_json.py holds this equal to transformers)."""

UNTRAINED = dict.fromkeys(("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"), "attention sinks") | {
    "doge": "a mask over the keys that each layer makes of its values, which packed attention does not take",
}
"""By model type, what packed attention cannot do; loadmaster.models.load refuses it too, once the weights are there."""


def full_config(config: dict[str, Any]) -> tuple[dict[str, Any], str, str | None]:
    """(config of the language model with what it leaves out, its family, why figures are an estimate or None)."""
    config = language_model(config)
    family, estimate = str(config.get("model_type", "unknown")), None
    if isinstance(config.get("text_config"), dict):
        estimate = f"{family} is multimodal: its language model is counted, its other towers are not"
        inner = config["text_config"]
        family = str(inner.get("model_type") or family)
        config = {**{k: v for k, v in config.items() if k == "tie_word_embeddings"}, **inner, "model_type": family}
    if beyond := beyond_family({**config, "model_type": family}):
        estimate = f"{family} is modelled only without what this one has, which is not counted: {', '.join(beyond)}"
    elif family not in FAMILIES:
        estimate = f"model type {family!r} is not one that is modelled exactly: it is counted like Llama"
        estimate += " without gates" * (family in UNGATED)
    return {**DEFAULTS.get(family, {}), **config}, family, estimate


def unlike_llama(config: dict[str, Any]) -> list[str]:
    """What in the config of a family that is not modelled says that counting it like Llama would be a guess."""
    config, family, _ = full_config(config)
    if family in FAMILIES:
        return beyond_family(config)[:3]
    found = [f"{what} ({key})" for key, what in (OTHER_LAYERS | OTHER_HEADS).items() if config.get(key)]
    found += [f"{what} ({key})" for key in config for word, what in OTHER_WORDS.items() if word in key.lower()]
    kinds = {str(kind) for kind in config.get("layer_types") or ()}
    kinds -= {"full_attention", "sliding_attention", "chunked_attention"}
    found += [f"layers of other kinds ({', '.join(sorted(kinds))})"] if kinds else []
    named = [str(name) for name in config.get("architectures") or ()]
    if named and not any(word in name for name in named for word in ("CausalLM", "ConditionalGeneration", "LMHead")):
        found.append(f"no language model that continues a text ({', '.join(named)})")
    return found[:3]


def quantized_by(config: dict[str, Any]) -> str | None:
    """What a checkpoint's weights are quantized with; None where they are not."""
    said = config.get("quantization_config") or {}
    older = said.get("load_in_4bit") or said.get("load_in_8bit")
    return said.get("quant_method") or ("bitsandbytes" if older else None)


def refuse_quantized(config: dict[str, Any], name: str) -> None:
    """Raises ConfigError for a checkpoint whose weights are codes already: bitsandbytes', GPTQ's, AWQ's, FP8."""
    if (kind := quantized_by(config)) is not None:
        message = f"its weights are quantized already ({kind}), and a base is read in bf16 or fp32"
        remedy = "the model that it was made from; method=qlora then quantizes it to nf4 while it is read"
        raise ConfigError([Problem("model", name, "its config.json", message, remedy)])


def refuse_untrained(config: dict[str, Any], name: str) -> None:
    """Raises ConfigError for a family that training would refuse when it is loaded."""
    kind = str(config.get("model_type"))
    if isinstance(config.get("text_config"), dict) and kind not in TOWERS_AND_ALL:
        message = f"model type {kind!r} is multimodal, and transformers loads no language model by itself from it"
        remedy = "a model of the family that is text only, or one of " + ", ".join(FAMILIES)
        raise ConfigError([Problem("model", name, "its config.json", message, remedy)])
    why = UNTRAINED.get(str(config.get("model_type")))
    if why is not None:
        message = f"model type {config['model_type']!r} has {why}; models of this family are not trained yet"
        raise ConfigError([Problem("model", name, "its config.json", message, "one of " + ", ".join(FAMILIES))])


def refuse_uncountable(config: dict[str, Any], name: str, traced: bool = False) -> None:
    """Raises ConfigError for an unknown family that is visibly not like Llama, unless its step will be traced."""
    why = unlike_llama(config)
    if why and not traced:
        kind = full_config(config)[1]
        said = "is modelled only without what this one has:" if kind in FAMILIES else "is not modelled, and it has"
        message = f"model type {config.get('model_type')!r} {said} {', '.join(why)}"
        remedy = "plan.trace=true, which traces a step of it, or one of " + ", ".join(FAMILIES)
        raise ConfigError([Problem("model", name, "its config.json", message, remedy)])
