"""What a config.json says of layers that are not modelled, and which of Gemma 4's layers have heads of other sizes."""

from __future__ import annotations

from typing import Any

OTHER_LAYERS = {
    "kv_lora_rank": "latent attention",
    "q_lora_rank": "latent attention",
    "n_routed_experts": "experts of another layout",
    "moe_num_experts": "experts of another layout",
    "n_shared_experts": "shared experts",
    "num_shared_experts": "shared experts",
    "shared_expert_intermediate_size": "shared experts",
    "full_attention_interval": "layers without attention",
    "attn_layer_period": "layers without attention",
    "hybrid_override_pattern": "layers without attention",
    "block_types": "layers without attention",
    "conv_L_cache": "layers without attention",
    "num_kv_shared_layers": "layers that share keys and values",
    "hidden_size_per_layer_input": "an embedding of each layer's own",
    "enable_moe_block": "experts beside a dense feed-forward",
    "is_encoder_decoder": "an encoder and a decoder",
}
"""Keys of a config.json that say of a family which is not modelled, or in part, that its layers are not Llama's."""
OTHER_HEADS = dict.fromkeys(("global_head_dim", "per_layer_config"), "layers with heads of other sizes")
"""The same, of families whose layers are not modelled."""
OTHER_WORDS = {"mamba": "state space layers", "ssm": "state space layers", "rwkv": "state space layers"}
GEMMA_4 = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "sliding_window": 512,
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 256,
}
"""What its config.json may leave out."""
IN_PART = {"gemma4_text": GEMMA_4}
"""Families that are modelled exactly where neither their config.json nor these defaults of it have a key of the
above."""


def beyond_family(config: dict[str, Any]) -> list[str]:
    """What the config of a family that is modelled in part has that is not."""
    family = str(config.get("model_type"))
    if family not in IN_PART:
        return []
    config = {**IN_PART[family], **config}
    found = [f"{what} ({key})" for key, what in OTHER_LAYERS.items() if config.get(key)]
    if config.get("use_bidirectional_attention") == "all":
        found.append("attention to later tokens (use_bidirectional_attention=all)")
    if global_sizes(config) is None:
        found.append("layers of sizes of their own (per_layer_config)")
    return found


def global_sizes(config: dict[str, Any]) -> tuple[int, int] | None:
    """(head_dim, key-value heads) of Gemma 4's layers that see everything; None where its layers have more sizes.

    transformers reads per_layer_config where there is one, which it writes itself, and the two keys for them otherwise.
    """
    sizes = {"head_dim": config.get("head_dim"), "num_key_value_heads": config.get("num_key_value_heads")}
    own = config.get("per_layer_config")
    if own is None:
        groups = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        return config.get("global_head_dim"), groups or sizes["num_key_value_heads"]
    if not isinstance(own, dict):
        return None
    full = [str(layer) for layer, kind in enumerate(gemma4_layer_types(config)) if kind == "full_attention"]
    layers = sorted(str(layer).lstrip("0") or "0" for layer in own)  # written with as many digits as the last one has
    changed = [each for each in own.values() if isinstance(each, dict)]
    alike = len(changed) == len(own) and all(each == changed[0] and set(each) <= set(sizes) for each in changed)
    if not alike or (own and layers not in (sorted(full), ["full_attention"])):
        return None
    found = {**sizes, **(changed[0] if changed else {})}
    return found["head_dim"], found["num_key_value_heads"]


def gemma4_layer_types(config: dict[str, Any]) -> list[str]:
    """Of each layer, as transformers completes them: every sixth sees everything, and the last in any case."""
    layers = config.get("num_hidden_layers")
    count = layers if isinstance(layers, int) else 0
    types = config.get("layer_types") or [f"{'sliding' if (i + 1) % 6 else 'full'}_attention" for i in range(count)]
    return [*map(str, types[:-1]), "full_attention"]
