"""A model's config.json: where it is, what the model is called, and the shape that it describes.

Nothing is loaded and torch is not imported. A family that is not in FAMILIES is counted like Llama and marked with
`estimate`, which every plan and table repeats.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loadmaster import catalog
from loadmaster.config.schema import ModelConfig
from loadmaster.config.shipped import local_path
from loadmaster.errors import IN_THE_JOB, ConfigError, Problem
from loadmaster.files import as_object, read_json
from loadmaster.preflight.families import (
    FAMILIES,
    UNGATED,
    full_config,
    refuse_quantized,
    refuse_uncountable,
    refuse_untrained,
)
from loadmaster.preflight.multimodal import language_model
from loadmaster.preflight.other_layers import gemma4_layer_types, global_sizes
from loadmaster.preflight.shape import FLASH_HEAD, ModelShape

FLAGS = ("gemma_norm", "wide", "norms_after", "query_key_norm", "whole_norm", "late_norm", "scaled_query",
         "scaled_residual", "scaled_embedding", "fused", "power_norm", "value_norm", "layer_scalar")
"""What a family's code does, as the shape calls it."""

def from_config(config: dict[str, Any], name: str) -> ModelShape:
    """The shape that a config.json describes.

    Raises ConfigError for a model that is no decoder with the usual sizes, or whose sizes do not go together.
    """
    config, family, estimate = full_config(config)
    known = FAMILIES.get(family, {"biases": True})
    _refuse_sizes(config, family, name)
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    experts = _experts(config, family)
    activation = str(config.get("hidden_activation") or config.get("hidden_act", "silu"))
    gated = known.get("gated", family not in UNGATED)
    if family in FAMILIES and not gated and activation != "relu2":
        estimate = f"{family} with {activation} between two matrices is not one that is modelled exactly"
    bias = bool(known.get("biases") and config.get("attention_bias"))
    rotary = config.get("rope_parameters") or {}
    return ModelShape(
        name=name,
        family=family,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norms=known.get("norms", 2),
        **{flag: known.get(flag, False) for flag in FLAGS},
        query_key_value_bias=known.get("query_key_value_bias", bias),
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and family in ("llama", "smollm3", "granite", "arcee"),
        rotary_fraction=config.get("partial_rotary_factor") or rotary.get("partial_rotary_factor") or 1.0,
        gated=gated,
        gelu="gelu" in activation,
        experts=experts,
        experts_per_token=config.get("num_experts_per_tok", 2) if experts else 0,
        expert_size=_expert_size(config, family) if experts else 0,
        dense_at=_dense_layers(config, layers) if experts and family != "mixtral" else (),
        normalised_routing=family == "mixtral" or bool(config.get("norm_topk_prob")),
        windows=_windows(config, family, layers),
        **_global_layers(config, family),
        attention_softcap=bool(config.get("attn_logit_softcapping")),
        logit_softcap=bool(config.get("final_logit_softcapping")),
        max_position=known_positions(config),
        short_positions=short_positions(config),
        estimate=estimate,
        language_model_of=config.get("language_model_of"),
    )


def known_positions(config: dict[str, Any]) -> int | None:
    """Tokens of the longest document, as vLLM derives them: max_position_embeddings, times the factor of a rotary
    scaling, of YaRN's its original number. LongRoPE's, Llama 3's and Gemma 3's numbers have their factor in them."""
    known, rotary = config.get("max_position_embeddings"), _rotation(config)
    kind, factor = rotary.get("rope_type", rotary.get("type")), rotary.get("factor")
    scaled = kind in ("yarn", "linear", "dynamic") and not str(config.get("model_type")).startswith("gemma3")
    if known is None or not scaled or not isinstance(factor, int | float):
        return None if known is None else int(known)  # JSON may write it with a point
    original = rotary.get("original_max_position_embeddings") if kind == "yarn" else None
    return int(factor * (original or known))


def short_positions(config: dict[str, Any]) -> int | None:
    """Tokens up to which LongRoPE (Phi 3.5, Phi 4 mini) turns by its short factors; None: there is one set of factors.

    transformers takes the long ones for documents beyond that, vLLM for every request once it may have more (#27431).
    """
    rotary = _rotation(config)
    said = "rope_parameters" in config or "rope_scaling" in config  # shipped shapes leave it out
    if said and rotary.get("rope_type", rotary.get("type")) not in ("longrope", "su"):
        return None
    short = config.get("original_max_position_embeddings") or rotary.get("original_max_position_embeddings")
    return int(short) if short and short < (config.get("max_position_embeddings") or 0) else None


def _rotation(config: dict[str, Any]) -> dict[str, Any]:
    return as_object(config.get("rope_parameters") or config.get("rope_scaling"))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OTHER_SIZES = ("num_key_value_heads", "head_dim", "num_local_experts", "num_experts", "num_experts_per_tok",
               "moe_intermediate_size", "sliding_window", "decoder_sparse_step", "max_window_layers",
               "global_head_dim", "num_global_key_value_heads")
MOST, MOST_COUNTED = 2**31 - 1, 10_000
"""Of a width, and of layers, heads and experts, which are counted one by one: beyond what any model has."""
KINDS = {
    "architectures": (list, "list"), "layer_types": (list, "list"), "mlp_only_layers": (list, "list"),
    "quantization_config": (dict, "object"), "rope_parameters": (dict, "object"), "rope_scaling": (dict, "object"),
    "text_config": (dict, "object"), "partial_rotary_factor": (float | int, "number"), "num_experts": (int, "number"),
    "num_local_experts": (int, "number"), "max_position_embeddings": (float | int, "number"),
    "original_max_position_embeddings": (float | int, "number"), "per_layer_config": (dict, "object"),
}
"""What a key must hold, where it holds anything."""


def refuse_kinds(config: dict[str, Any], name: str) -> None:
    """Raises ConfigError where a key holds another kind of value than transformers reads there."""
    held = {**config, **full_config(config)[0]}
    held = {**_rotation(held), **held}  # original_max_position_embeddings may stand there
    wrong = [f"{key}={held[key]!r}, which is no {word}" for key, (kind, word) in KINDS.items()
             if held.get(key) is not None and not isinstance(held[key], kind)]
    if wrong:
        message = f"model type {held.get('model_type')!r}: it has {' and '.join(wrong)}"
        remedy = "the model's own config.json, as it was published or saved"
        raise ConfigError([Problem("model", name, "its config.json", message, remedy)])


def _refuse_sizes(config: dict[str, Any], family: str, name: str) -> None:
    """Raises ConfigError with everything that is missing, no whole number above 0, or does not go together."""

    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    missing = [key for key in SIZES if config.get(key) is None]
    wrong = [f"{key}={config[key]!r}" for key in SIZES if key not in missing and not whole(config[key])]
    others = OTHER_SIZES + ("sliding_window_pattern",) * (family == "gemma3_text")
    wrong += [f"{key}={config[key]!r}" for key in others if config.get(key) and not whole(config[key])]
    wrong += [f"{key}=0" for key in ("num_key_value_heads", "head_dim") if config.get(key) == 0]
    most = {key: MOST_COUNTED if "num_" in key else MOST for key in (*SIZES, *others)}
    huge = [f"{key}={config[key]}" for key in most if whole(config.get(key)) and config[key] > most[key]]
    said = [f"has no {', '.join(missing)}"] if missing else []
    said += [f"has {', '.join(huge)}, which no model has"] if huge else []
    said += [f"has {', '.join(wrong)}, which must be whole numbers above 0"] if wrong else []
    if not said:
        heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 1
        if heads % groups:
            said.append(f"has {heads} attention heads that do not divide over {groups} key-value heads")
        shared = _global_layers(config, family).get("global_key_value_heads") or 1
        if heads % shared:
            said.append(f"has {heads} attention heads that do not divide over {shared} global key-value heads")
        if not config.get("head_dim") and config["hidden_size"] < heads:
            said.append(f"has more heads ({heads}) than hidden_size={config['hidden_size']}")
        if FAMILIES.get(family, {}).get("whole_heads") and config["hidden_size"] % heads:
            said.append(f"has hidden_size={config['hidden_size']}, which is no multiple of its {heads} heads")
        types = config.get("layer_types")
        if types and len(types) != config["num_hidden_layers"]:
            said.append(f"has {len(types)} layer_types for {config['num_hidden_layers']} layers")
    if said:
        message = f"model type {family!r}: it {' and '.join(said)}, so its memory cannot be worked out"
        remedy = "the model's own config.json, as it was published or saved"
        if family not in FAMILIES:
            remedy = "a model of one of these types: " + ", ".join(FAMILIES)
        raise ConfigError([Problem("model", name, "its config.json", message, remedy)])


def _experts(config: dict[str, Any], family: str) -> int:
    """In a layer; none in a family that has none, whatever its config.json says."""
    usual = FAMILIES.get(family, {"experts": 0}).get("experts")
    said = [config[key] for key in ("num_local_experts", "num_experts") if config.get(key) is not None]
    return 0 if usual is None else (*said, usual)[0]


def _expert_size(config: dict[str, Any], family: str) -> int:
    own = None if family == "mixtral" else config.get("moe_intermediate_size")
    return own or config["intermediate_size"]


def _dense_layers(config: dict[str, Any], layers: int) -> tuple[int, ...]:
    step, dense = config.get("decoder_sparse_step", 1) or 1, set(config.get("mlp_only_layers") or ())
    return tuple(i for i in range(layers) if (i + 1) % step or i in dense)


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    read = FAMILIES.get(family, {}).get("windows", True)
    if not (read and window) or config.get("use_sliding_window") is False:
        return (None,) * layers
    if family == "gemma4_text":
        return tuple(window if kind == "sliding_attention" else None for kind in gemma4_layer_types(config))
    if types := config.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if family in ("qwen2", "qwen3"):
        first = config.get("max_window_layers", layers)
        return tuple(window if i >= first else None for i in range(layers))
    if family == "smollm3":  # layers without rotary embeddings
        every = config.get("no_rope_layer_interval", 4)
        turned = config.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]
        return tuple(None if turn else window for turn in turned)
    own = config.get("sliding_window_pattern")  # of Exaone 4 it may be a word, beside layer_types
    own = own if isinstance(own, int) else None
    period = {"gemma2": 2, "gemma3_text": own or 6, "olmo3": 4, "exaone4": own}.get(family)
    return tuple(None if period and (i + 1) % period == 0 else window for i in range(layers))


def _global_layers(config: dict[str, Any], family: str) -> dict[str, Any]:
    """What the shape says of layers whose heads are of sizes of their own; nothing where they are of one."""
    sizes = global_sizes(config) if family == "gemma4_text" else None
    values = bool(config.get("attention_k_eq_v"))
    if sizes is None or (sizes == (config["head_dim"], config["num_key_value_heads"]) and not values):
        return {}
    at = tuple(layer for layer, kind in enumerate(gemma4_layer_types(config)) if kind == "full_attention")
    return {
        "global_at": at, "global_head_dim": sizes[0], "global_key_value_heads": sizes[1], "keys_as_values": values,
    }


KEPT_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""What a fine-tune has of its base; a vocabulary may have grown."""


def find_config(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """(config.json as a dict, where it was found), without reading any weight; of a multimodal model whose language
    model alone is trained, that one's.

    Looks at the local path, the shipped shapes, the Hub's local cache, and last the Hub itself.
    Raises ConfigError naming what was tried.
    """
    if model.path is not None:
        path = local_path(model.path) / "config.json"
        if not path.is_file():
            raise _no_config("model.path", model.path, "there is no config.json in that folder", model)
        return _read(path, "model.path", model), str(path)
    shipped = catalog.shapes().get(model.name.lower())
    if shipped is not None:
        return {key: value for key, value in shipped.items() if not key.startswith("_")}, "shipped shape"
    found = _from_hub(model)
    if found is not None:
        return _read(found, "model.name", model), str(found)
    if os.path.isfile(local_path(model.name) / "config.json"):
        message = "is a folder here, and no model of the Hub"
        remedy = f"model.path={model.name}; model.name=ORG/NAME beside it says what to call the model"
        raise ConfigError([Problem("model.name", model.name, IN_THE_JOB, message, remedy)])
    raise _no_config(
        "model.name", model.name,
        "no config.json found: it is not one of the shipped shapes, not in the Hub's local cache, and the Hub did not "
        "give it (no network, no such model, or a gated one without HF_TOKEN)", model,
    )


def _read(path: Path, key: str, model: ModelConfig) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise _no_config(key, str(path), f"config.json cannot be read ({error})", model) from None
    if not isinstance(found, dict):
        raise _no_config(key, str(path), "config.json holds no JSON object", model)
    return language_model(found)


def _no_config(key: str, value: str, message: str, model: ModelConfig) -> ConfigError:
    remedy = "model.path=FOLDER with its config.json, or model.name=" + " or ".join(nearest_names(model.name))
    return ConfigError([Problem(key, value, IN_THE_JOB, message, remedy)])


def nearest_names(name: str, count: int = 4) -> list[str]:
    import difflib

    known = {entry["_name"].lower(): entry["_name"] for entry in catalog.shapes().values()}
    close = difflib.get_close_matches(name.lower(), known, n=count, cutoff=0.4)
    return [known[key] for key in close] or sorted(known.values())[:count]


def _from_hub(model: ModelConfig) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(model.name, "config.json", revision=model.revision, etag_timeout=5))
    except Exception:  # offline, unknown, gated: the caller names all of these in one sentence
        return None


def find_shape(model: ModelConfig, traced: bool = False) -> ModelShape:
    """traced: the plan is going to be held against a trace, so an unknown kind of model is let through."""
    config, _ = find_config(model)
    refuse_kinds(config, model.path or model.name)
    refuse_quantized(config, model.path or model.name)
    refuse_untrained(config, model.path or model.name)
    refuse_uncountable(config, model.path or model.name, traced)
    shape = from_config(config, name_of(model, config))
    if any(view.head_dim > FLASH_HEAD and any(view.windows) for view, _ in shape.views):
        message = f"it has windows in layers with heads of {shape.head_dim} numbers, which no kernel here takes"
        remedy = f"a model with heads of at most {FLASH_HEAD} there"
        raise ConfigError([Problem("model", model.path or model.name, "its config.json", message, remedy)])
    return shape


def base_name(model: ModelConfig) -> str:
    """What plan, report, manifest and adapter call the base model."""
    return model.name if model.path is None else name_of(model, find_config(model)[0])


def name_of(model: ModelConfig, config: dict[str, Any]) -> str:
    """model.name; the folder's, where config is model.path's and of other sizes than the shipped shape of that name."""
    shipped = catalog.shapes().get(model.name.lower())
    if model.path is None or shipped is None:
        return model.name
    held, named = full_config(config)[0], full_config(shipped)[0]
    if all(held.get(key) == named.get(key) for key in KEPT_SIZES):
        return model.name
    folder = local_path(model.path).resolve()
    cached = next((part for part in reversed(folder.parts) if part.startswith("models--")), None)  # of the Hub's cache
    return "/".join(cached.split("--")[1:]) if cached else folder.name
