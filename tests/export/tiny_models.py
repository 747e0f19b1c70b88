"""Models and adapters small enough to export in seconds."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_llama(folder: Path, tokenizer, **changes) -> Path:
    """A random two-layer Llama, spread out enough that its predictions differ from uniform; bf16 unless `dtype`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(changes.pop("seed", 1))
    max_shard_size, dtype = changes.pop("max_shard_size", "1GB"), changes.pop("dtype", torch.bfloat16)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15, **changes,
        }
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, dtype: torch.dtype = torch.float32, std: float = 0.1, **options) -> Path:
    """An adapter whose B is random, as after training (peft starts it at zero, where nothing could be told apart)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(2)  # before peft draws A, or every run has another adapter
    model = get_peft_model(model, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=std)
        if "modules_to_save" in name:
            parameter.data += 0.01
    model.save_pretrained(folder)
    return folder
