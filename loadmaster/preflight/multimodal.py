"""The config.json of the language model in a multimodal checkpoint that is trained as its language model alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loadmaster.preflight.other_layers import beyond_family


@dataclass(frozen=True)
class Inner:
    """What a language model is trained as."""

    family: str
    architecture: str
    """transformers' class."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Of the text configuration's class, where they are not the family's."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """What its code does whatever the text configuration says."""


_QWEN2_VL = Inner(
    "qwen2", "Qwen2ForCausalLM",
    {
        "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
        "max_window_layers": 80, "bos_token_id": 151643, "eos_token_id": 151645, "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
)
_QWEN3_VL = Inner(
    "qwen3", "Qwen3ForCausalLM",
    {"max_position_embeddings": 128000, "rope_theta": 500000.0, "tie_word_embeddings": False},
    {"use_sliding_window": False},
)
WRAPPED = {
    "gemma3": {"gemma3_text": Inner("gemma3_text", "Gemma3ForCausalLM")},
    "gemma4": {"gemma4_text": Inner("gemma4_text", "Gemma4ForCausalLM")},
    "mistral3": {
        "mistral": Inner("mistral", "MistralForCausalLM"),
        "ministral3": Inner("ministral3", "Ministral3ForCausalLM"),
    },
    "qwen2_vl": {"qwen2_vl_text": _QWEN2_VL},
    "qwen2_5_vl": {"qwen2_5_vl_text": _QWEN2_VL},
    "qwen3_vl": {"qwen3_vl_text": _QWEN3_VL},
}
"""Multimodal configs whose language model is taken out and trained alone: by its model type there, the first where
there is none."""
FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Of those, the ones that may have no text_config, and what it would hold beside the rest."""
OUTER = ("quantization_config", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
         "tie_word_embeddings", "language_model_of")
"""Keys that a multimodal config.json has outside of its text_config, and that hold for the language model."""
OF_THE_OUTER = frozenset({"tie_word_embeddings", "eos_token_id"})
"""Of those, the ones that transformers reads there, whatever the text_config says."""
TIED = ("gemma3", "gemma4", "mistral3")
"""Multimodal configs that tie the head to the embedding where they do not say."""
OF_OTHERS = ("vision_config", "text_config", "image_token_id", "video_token_id", "vision_token_id",
             "vision_start_token_id", "vision_end_token_id", "architectures")
"""Keys that a text_config, or a config without one, may have of the other towers."""
GRIDS = ("mrope_section", "mrope_interleaved")
"""Which parts of a head are turned by which of an image's three positions; a text's are one and the same."""


def language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the language model in a multimodal one that it is taken out of; any other as it is.

    language_model_of: model type of the multimodal one.
    """
    kind, inner = config.get("model_type"), config.get("text_config")
    kinds = WRAPPED.get(str(kind), {})
    if inner is None and kind in FLAT:
        inner = {key: value for key, value in config.items() if key != "model_type"}
    if not isinstance(inner, dict) or not kinds:
        return config
    own = str(inner.get("model_type") or next(iter(kinds)))
    if own not in kinds or beyond_family({**inner, "model_type": own}):
        return config
    alone = kinds[own]
    outer = {key: config[key] for key in OUTER if config.get(key) is not None}
    held = {key: value for key, value in inner.items() if value is not None and key not in OF_OTHERS}
    held = {key: value for key, value in held.items() if key not in OF_THE_OUTER or key not in outer}
    found = {**alone.defaults, **outer, **held, **alone.fixed}
    if alone.defaults:
        found = by_one_position(found)
    return {
        **found, "model_type": alone.family, "architectures": [alone.architecture], "language_model_of": kind,
    }


def by_one_position(config: dict[str, Any]) -> dict[str, Any]:
    """The config with a rotation by one position in the place of one by an image's three."""
    old = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(old, dict):  # told by config_json.refuse_kinds
        return config
    kind = old.get("rope_type", old.get("type", "default"))
    rope = {key: value for key, value in old.items() if key not in (*GRIDS, "type")}
    rope = {"rope_theta": config.get("rope_theta"), **rope, "rope_type": "default" if kind == "mrope" else kind}
    return {
        **{key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")},
        "rope_parameters": rope,
    }
